import gzip
import json
import lzma
from dataclasses import replace

import numpy as np
import pytest
import tokenizers

import magnetar.data.text.shards
from magnetar.data.errors import UserError
from magnetar.data.prepared_folder import Reporter
from magnetar.data.text.prepare import PrepareConfig, prepare
from magnetar.data.text.token_files import open_prepared


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(magnetar.data.text.shards, "SHARD_CHARS", 1500)  # about a dozen shards


@pytest.fixture
def config(tmp_path, text_file):
    return PrepareConfig(
        out=tmp_path / "out",
        train=(str(text_file),),
        valid_fraction=0.1,
        documents="blank-line",
        vocab_size=300,
    )


def all_texts(prepared):
    for split in (prepared.train, prepared.valid):
        for i in range(split.num_documents):
            yield prepared.tokenizer.decode(split.document(i))


def test_every_document_is_in_exactly_one_split(config, documents):
    prepare(config)
    prepared = open_prepared(config.out)
    assert sorted(all_texts(prepared)) == sorted(documents)
    assert 2 <= prepared.valid.num_documents <= 30
    assert not config.out.with_name("out.partial").exists()


def test_a_finished_folder_is_never_replaced(config, text_file):
    prepare(config)
    with pytest.raises(
        UserError, match=r"out was made with vocab_size=300, not 310: choose another --out"
    ):
        prepare(replace(config, vocab_size=310))
    text_file.write_text(text_file.read_text() + "\n\nmore\n")
    with pytest.raises(UserError, match=r"out was made with train_files=\(1 files, \d+ bytes"):
        prepare(config)


def test_the_formats_of_the_same_documents_give_the_same_tokens(config, tmp_path, documents):
    prepare(config)
    expected = open_prepared(config.out)
    vocabulary = config.out / "tokenizer.model"
    rows = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "rows.jsonl.xz").write_bytes(lzma.compress(rows.encode()))
    (tmp_path / "part.1.txt.gz").write_bytes(gzip.compress("\n\n".join(documents[:50]).encode()))
    (tmp_path / "part.2.txt").write_text("\n\n".join(documents[50:]))
    for glob in ("rows.jsonl.xz", "part.*"):
        out = tmp_path / f"out-{glob[:4]}"
        given = replace(config, out=out, train=(str(tmp_path / glob),), vocab_size=None)
        prepare(replace(given, tokenizer=vocabulary))
        prepared = open_prepared(out)
        assert prepared.fingerprint == expected.fingerprint


def test_a_document_cut_into_pieces_and_shards_is_still_one_document(
    config, tmp_path, text_file, monkeypatch
):
    monkeypatch.setattr("magnetar.data.text.corpus.PIECE_CHARS", 100)
    monkeypatch.setattr(magnetar.data.text.shards, "SHARD_CHARS", 150)
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text_file.read_bytes())
    prepare(replace(config, documents="file", valid=(str(copy),), valid_fraction=None))
    prepared = open_prepared(config.out)
    assert prepared.train.num_documents == prepared.valid.num_documents == 1
    assert list(all_texts(prepared)) == [text_file.read_text()] * 2


def test_equal_documents_are_validated_or_trained_on_never_both(config, text_file):
    text_file.write_text("\n\n".join(f"ship {i % 40} sails on sea {i % 40}" for i in range(400)))
    prepare(replace(config, vocab_size=None, tokenizer=tiny_vocabulary(text_file.parent)))
    prepared = open_prepared(config.out)
    both = [
        {prepared.tokenizer.decode(split.document(i)) for i in range(split.num_documents)}
        for split in (prepared.train, prepared.valid)
    ]
    assert not both[0] & both[1]
    assert len(both[0] | both[1]) == 40


def test_another_seed_validates_other_documents(config, tmp_path):
    prepare(config)
    prepare(replace(config, out=tmp_path / "seed", seed=1))
    first, second = open_prepared(config.out), open_prepared(tmp_path / "seed")
    assert not np.array_equal(first.valid.tokens, second.valid.tokens)


def tiny_vocabulary(folder, num_added=0):
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["sea ship"], vocab_size=270, special_tokens=["<|endoftext|>"])
    tokenizer.add_tokens([f"<extra{i}>" for i in range(num_added)])
    file = folder / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def test_a_vocabulary_beyond_two_bytes_gives_uint32_tokens(config, tmp_path, documents):
    given = replace(config, vocab_size=None, tokenizer=tiny_vocabulary(tmp_path, 66_000))
    assert prepare(given).dtype == "uint32"
    prepared = open_prepared(config.out)
    assert prepared.train.tokens.dtype == np.uint32
    assert sorted(all_texts(prepared)) == sorted(documents)


def test_progress_counts_to_the_size_of_the_input(config, text_file):
    seen = []
    prepare(config, Reporter(progress=lambda *state: seen.append(state)))
    size = text_file.stat().st_size
    assert [state for state in seen if state[1] == size][-1] == ("tokenising", size, size)
    assert all(done <= total == size for _, done, total in seen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "sotu"}, r"either --corpus sotu or --train"),
        ({"train": ()}, r"either --corpus sotu or --train"),
        ({"train": (), "corpus": "moby"}, r"corpus='moby' is unknown: use sotu"),
        ({"train": (), "corpus": "sotu"}, r"--corpus sotu has its own validation.*leave out"),
        ({"valid": ("x",)}, r"--valid and --valid-fraction contradict each other: leave one"),
        ({"valid_fraction": 1.5}, r"valid_fraction=1\.5 must lie between 0 and 1: use 0\.01"),
        ({"tokenizer": "t"}, r"either --vocab-size N.*or --tokenizer PATH"),
        ({"vocab_size": None}, r"either --vocab-size N.*or --tokenizer PATH"),
        ({"vocab_size": 100}, r"vocab_size=100 is too small.*use 300 at least"),
        ({"workers": 0}, r"workers=0 must be at least 1"),
        ({"documents": "file"}, r"valid_fraction=0\.1 with seed=0 leaves no document.*--valid"),
        ({"vocab_size": 50_000}, r"vocab_size=50000 is too large.*use at most \d+"),
    ],
)
def test_bad_settings_are_named_with_a_way_out(config, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(replace(config, **changes))
    assert not config.out.exists()


def test_a_file_is_not_both_trained_on_and_validated(config):
    with pytest.raises(UserError, match=r"text\.txt is matched by --train and by --valid.*narrow"):
        prepare(replace(config, valid=config.train, valid_fraction=None))


def test_a_split_is_chosen_by_the_text_alone(config, tmp_path, documents):
    prepare(config)
    turned = tmp_path / "turned.txt"
    turned.write_text("\n\n".join(reversed(documents)))
    prepare(replace(config, out=tmp_path / "turned", train=(str(turned),)))
    first, second = open_prepared(config.out), open_prepared(tmp_path / "turned")
    texts = [
        sorted(p.tokenizer.decode(p.valid.document(i)) for i in range(p.valid.num_documents))
        for p in (first, second)
    ]
    assert texts[0] == texts[1]


def test_letters_that_a_vocabulary_loses_are_counted_and_one_that_raises_is_named(config, tmp_path):
    file, text = tmp_path / "letters.json", tmp_path / "short.txt"
    tokenizers.Tokenizer(tokenizers.models.BPE({"</s>": 0, "a": 1, "b": 2}, [])).save(str(file))
    text.write_text("ab ba cc\n\nccc")
    messages = []
    files = {"train": (str(text),), "valid": config.train, "valid_fraction": None}
    given = replace(config, **files, vocab_size=None, tokenizer=file)
    prepare(given, Reporter(message=messages.append))
    expected = "cannot spell 7 of 11 characters (63.64%) of train, most often 'c' 5, ' ' 2: they"
    assert any(expected in message for message in messages)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1}))
    words.save(str(file))
    for workers in (1, 2):
        with pytest.raises(UserError, match=rf"{file} cannot encode the text: .*UNK.*--tokenizer"):
            prepare(replace(given, out=tmp_path / "words", workers=workers))
    assert not [*tmp_path.glob("words*")]
