import hashlib
import json
import random

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.data.errors import UserError
from magnetar.data.text.tokenizer import evenly_sampled, load_tokenizer, train_sentencepiece

DRAW = random.Random(0)
SYLLABLES = ["ba", "ce", "di", "fo", "gu", "ly", "mon", "ter", "sch", "ing", "ous", "wa", "x", "qu"]
WORDS = ["".join(DRAW.choices(SYLLABLES, k=DRAW.randint(1, 4))) for _ in range(300)]
TEXTS = [" ".join(DRAW.choices(WORDS, k=20)) + "\nthe ship " + str(i) for i in range(200)]
AWKWARD = [
    "",
    " ",
    " two  spaces\n\n\tand a tab \r\n",
    "caf\u00e9 漢字 \U0001f642 a\u0300 \ufb01 \u00a0 \u2028",
    "a\u2581b \u2581 c\u2581",
    "</s> <unk> <0x41> <|endoftext|> <s>",
    "\x00 zero \ufeff mark",
]


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    train_sentencepiece(TEXTS, 320, path)
    return path


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS, vocab_size=320, special_tokens=["<|endoftext|>"])
    tokenizer.save_model(str(folder))
    return folder


@pytest.fixture(params=["sentencepiece", "gpt2"], scope="module")
def tokenizer(request, sentencepiece_file, gpt2_folder):
    return load_tokenizer(sentencepiece_file if request.param == "sentencepiece" else gpt2_folder)


@pytest.mark.parametrize("text", AWKWARD)
def test_decoding_gives_an_awkward_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text())
@settings(deadline=None, max_examples=200)
def test_decoding_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_fit_the_vocabulary_and_text_never_ends_a_document(tokenizer):
    ids = [i for text in AWKWARD + TEXTS for i in tokenizer.encode(text)]
    assert tokenizer.eos_id not in ids
    assert 0 <= min(ids) <= max(ids) < tokenizer.vocab_size
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size == 320


def test_the_end_of_a_document_decodes_to_nothing(tokenizer):
    ids = tokenizer.encode("the ship")
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "the ship"


def test_the_stored_file_is_the_same_tokenizer(tokenizer, tmp_path):
    copy = tmp_path / tokenizer.file_name
    copy.write_bytes(tokenizer.file_content)
    again = load_tokenizer(copy)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.fingerprint == hashlib.sha256(copy.read_bytes()).hexdigest()
    assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_gpt2_may_be_named_by_its_old_file_names(gpt2_folder, tmp_path):
    (tmp_path / "encoder.json").write_bytes((gpt2_folder / "vocab.json").read_bytes())
    (tmp_path / "vocab.bpe").write_bytes((gpt2_folder / "merges.txt").read_bytes())
    expected = load_tokenizer(gpt2_folder)
    assert load_tokenizer(tmp_path).fingerprint == expected.fingerprint
    assert load_tokenizer(tmp_path / "encoder.json").fingerprint == expected.fingerprint


def test_cutting_a_text_at_line_ends_changes_no_token(sentencepiece_file):
    tokenizer = load_tokenizer(sentencepiece_file)
    text = "\n".join(TEXTS[:5])
    parts = text.splitlines(keepends=True)
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


def test_training_twice_gives_the_same_file(sentencepiece_file, tmp_path):
    train_sentencepiece(iter(TEXTS), 320, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == sentencepiece_file.read_bytes()


@pytest.mark.parametrize("max_chars", [100, 3999, 4000])
def test_a_sample_is_spread_evenly_over_the_whole_text(max_chars):
    kept = [int(line) for line in evenly_sampled((f"{i:04}" for i in range(1000)), max_chars)]
    assert max_chars / 2 < 4 * len(kept) <= max_chars or len(kept) == 1000
    assert len(set(np.diff(kept))) == 1
    assert kept[0] == 0
    assert kept[-1] >= 1000 - 2 * (kept[1] - kept[0])


def test_too_large_a_vocabulary_names_the_largest(tmp_path):
    with pytest.raises(UserError, match=r"vocab_size=5000 is too large.*use at most \d+"):
        train_sentencepiece(TEXTS, 5000, tmp_path / "t.model")


def test_too_small_a_vocabulary_names_the_smallest(tmp_path):
    with pytest.raises(UserError, match=r"vocab_size=270 is too small.*use more than \d+"):
        train_sentencepiece(TEXTS, 270, tmp_path / "t.model")


def test_a_vocabulary_of_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"vocab_size=300 is impossible without text"):
        train_sentencepiece(["\n\n"], 300, tmp_path / "t.model")


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist: give a SentencePiece"):
        load_tokenizer(tmp_path / "nowhere")


def test_an_unknown_suffix_is_named(tmp_path):
    (tmp_path / "vocab.pkl").touch()
    with pytest.raises(UserError, match=r"vocab\.pkl has the suffix '\.pkl': give a \.model"):
        load_tokenizer(tmp_path / "vocab.pkl")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds none of tokenizer\.model.*add one"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "vocab.json"])
def test_a_damaged_vocabulary_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"not a vocabulary")
    with pytest.raises(UserError, match=rf"{name} is not a vocabulary.*--vocab-size"):
        load_tokenizer(tmp_path / name)


def test_a_vocabulary_without_an_end_of_document_is_refused(gpt2_folder, tmp_path):
    vocabulary = json.loads((gpt2_folder / "vocab.json").read_text())
    del vocabulary["<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_bytes((gpt2_folder / "merges.txt").read_bytes())
    with pytest.raises(UserError, match=r"vocab\.json.*has no <\|endoftext\|>.*--tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(
        tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).to_str()
    )
    with pytest.raises(UserError, match=r"tokenizer\.json.*has no end-of-document token"):
        load_tokenizer(tmp_path)


def test_a_panic_of_the_library_is_a_message(tmp_path):
    pair = {"vocab": {"</s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]}
    model = {"type": "BPE", **pair, "continuing_subword_prefix": "##"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    with pytest.raises(UserError, match=r"tokenizer\.json is not a vocabulary that can be used"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_model_without_an_end_of_document_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three four"] * 50),
        model_prefix=str(tmp_path / "endless"),
        vocab_size=24,
        hard_vocab_limit=False,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(UserError, match=r"endless\.model.*no end-of-sentence piece"):
        load_tokenizer(tmp_path / "endless.model")


def saved(folder, model, pre_tokenizer=None, decoder=None, **changes):
    """A tokenizer.json of a model; `changes` are made in its JSON."""
    tokenizer = tokenizers.Tokenizer(model)
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    if decoder:
        tokenizer.decoder = decoder
    settings = json.loads(tokenizer.to_str())
    settings["model"] |= changes.pop("model", {})
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(settings | changes), encoding="utf-8-sig")
    return path


LETTERS = "abcdefghilnorstu<>/|"
SPELT_END = "the end </s> is </s></s>a<</s>>"


def unigram(letters=LETTERS):
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in letters)]
    return tokenizers.models.Unigram(pieces, unk_id=0)


def word_level():
    return tokenizers.models.WordLevel({"</s>": 0, "<unk>": 1, "<": 2, "/s>": 3}, "<unk>")


def letters_bpe(merges=()):
    words = ["</s>", " ", *LETTERS, *("".join(pair) for pair in merges if pair[1] != "/s>")]
    if merges:
        words.append("/s>")
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return tokenizers.models.BPE(vocabulary, [*merges])


METASPACE = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
MERGES = [("s", ">"), ("/", "s>"), ("<", "/s>")]
ADDED = {"id": 0, "content": "</s>", "single_word": False, "normalized": False}


@pytest.mark.parametrize(
    "build",
    [
        lambda folder: saved(folder, unigram(), *METASPACE),
        lambda folder: saved(folder, unigram("abt")),
        lambda folder: saved(folder, letters_bpe(MERGES), None, tokenizers.decoders.Fuse()),
        lambda folder: saved(
            folder,
            letters_bpe(),
            None,
            tokenizers.decoders.Fuse(),
            added_tokens=[{**ADDED, "special": False, "lstrip": True, "rstrip": True}],
        ),
        lambda folder: saved(folder, word_level(), tokenizers.pre_tokenizers.WhitespaceSplit()),
    ],
    ids=["unigram", "unigram without the letters", "merged", "added", "words"],
)
def test_text_that_spells_the_end_never_becomes_it(tmp_path, request, build):
    tokenizer = load_tokenizer(build(tmp_path))
    for text in (SPELT_END, "</s>", "</s>" * 3000, " </s> "):
        ids = tokenizer.encode(text)
        assert tokenizer.eos_id not in ids
        if request.node.callspec.id != "words" and tokenizer.unspelt(text, ids) == "":
            assert tokenizer.decode([*ids, tokenizer.eos_id]) == text


def test_what_is_random_or_loses_text_is_switched_off(tmp_path, gpt2_folder):
    exact = load_tokenizer(gpt2_folder)
    settings = json.loads(exact.file_content)
    settings["model"]["dropout"] = 0.9
    settings["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFKC"},
            {"type": "Lowercase"},
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ],
    }
    settings["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(path)
    for text in [*AWKWARD, *TEXTS[:20]]:
        assert tokenizer.encode(text) == exact.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.file_content == path.read_bytes()


@pytest.mark.parametrize(
    ("model", "text", "lost"),
    [
        (letters_bpe([("a", "b")]), "ab xyz ab 12", "xyz12"),
        (unigram(), "ab xyz\n", "xyz\n"),
        (word_level(), "< b /s>", "b"),
    ],
)
def test_letters_that_a_vocabulary_cannot_spell_are_named(tmp_path, model, text, lost):
    pre, decoder = METASPACE if isinstance(model, tokenizers.models.Unigram) else (None, None)
    if isinstance(model, tokenizers.models.WordLevel):
        pre = tokenizers.pre_tokenizers.Split(" ", "isolated")
    tokenizer = load_tokenizer(saved(tmp_path, model, pre, decoder))
    found = tokenizer.unspelt(text, tokenizer.encode(text))
    assert found.replace(" ", "") == lost


def test_a_sentencepiece_model_names_them_too(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three four"] * 50),
        model_prefix=str(tmp_path / "small"),
        vocab_size=24,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "small.model")
    assert tokenizer.unspelt("one \u00e9 two", tokenizer.encode("one \u00e9 two")) == "\u00e9"
    assert tokenizer.unspelt("one two", tokenizer.encode("one two")) == ""


def test_a_vocabulary_that_raises_is_a_message(tmp_path):
    model = tokenizers.models.WordLevel({"</s>": 0, "sea": 1})
    path = saved(tmp_path, model, tokenizers.pre_tokenizers.Whitespace())
    with pytest.raises(UserError, match=rf"{path} cannot encode the text: .*\[UNK\].*--vocab-size"):
        load_tokenizer(path).encode("ship")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda merges: "\ufeff" + merges.replace("\n", "\r\n") + "\n\n", ""),
        (lambda merges: merges.partition("\n")[2], ""),
        (lambda merges: merges + "a  b\n", r"merges\.txt, line \d+, 'a  b' must be two pieces"),
        (lambda merges: merges + "qq zz\n", r"'qq zz' must be .* vocabulary beside it lacks 'qq'"),
        (lambda merges: merges + "\udcff a\n", r"merges\.txt, line \d+, is not UTF-8 at byte 1"),
        (lambda merges: None, r"merges\.txt must lie beside it"),
    ],
)
def test_a_merges_file_is_read_or_named(gpt2_folder, tmp_path, change, message):
    (tmp_path / "vocab.json").write_bytes((gpt2_folder / "vocab.json").read_bytes())
    content = change((gpt2_folder / "merges.txt").read_text())
    if content is not None:
        (tmp_path / "merges.txt").write_bytes(content.encode(errors="surrogateescape"))
    if not message:
        assert load_tokenizer(tmp_path).fingerprint == load_tokenizer(gpt2_folder).fingerprint
        return
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)
