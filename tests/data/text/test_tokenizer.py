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
