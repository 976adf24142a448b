import json
import shutil

import numpy as np
import pytest

from magnetar.data.errors import UserError
from magnetar.data.loader import open_folder
from magnetar.data.text.prepare import PrepareConfig, prepare
from magnetar.data.text.token_files import open_prepared, token_dtype


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for name, count in (("train", 60), ("valid", 5)):
        lines = (f"the ship {name} {i} sails {i * i} miles north" for i in range(count))
        (folder / f"{name}.txt").write_text("\n".join(lines))
    config = PrepareConfig(
        out=folder / "prepared",
        train=(str(folder / "train.txt"),),
        valid=(str(folder / "valid.txt"),),
        documents="line",
        vocab_size=300,
    )
    prepare(config)
    return config.out


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "prepared")
    return tmp_path / "prepared"


def edit_manifest(folder, **changes):
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_documents_decode_to_their_source(folder):
    prepared = open_prepared(folder)
    eos = prepared.tokenizer.eos_id
    for i in (0, 7, 59):
        document = prepared.train.document(i)
        assert document[-1] == eos
        assert eos not in document[:-1]
        text = f"the ship train {i} sails {i * i} miles north"
        assert prepared.tokenizer.decode(document[:-1]) == text


def test_sizes_agree_with_the_files(folder):
    prepared = open_prepared(folder)
    for split, num_documents in ((prepared.train, 60), (prepared.valid, 5)):
        assert split.num_documents == num_documents
        assert len(split.tokens) == split.num_tokens
        assert (split.tokens == prepared.manifest.eos_id).sum() == num_documents
        text = "".join(prepared.tokenizer.decode(split.document(i)) for i in range(num_documents))
        assert split.record.num_bytes == len(text.encode())


def test_unigram_perplexity_of_equal_frequencies_is_their_number(make_split):
    assert make_split(400, vocab_size=50).unigram_perplexity() == pytest.approx(50, rel=1e-9)


def test_unigram_perplexity_does_not_depend_on_the_chunks(make_split, monkeypatch):
    split = make_split(333, vocab_size=50)
    expected = split.unigram_perplexity()
    monkeypatch.setattr("magnetar.data.text.token_files.READ_TOKENS", 7)
    assert split.unigram_perplexity() == expected


def test_the_fingerprint_follows_the_tokens(folder):
    before = open_prepared(folder).fingerprint
    assert open_prepared(folder).fingerprint == before
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    splits["train"]["sha256"] = "0" * 64
    edit_manifest(folder, splits=splits)
    assert open_prepared(folder).fingerprint != before


@pytest.mark.parametrize(
    ("size", "dtype"), [(2000, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_the_dtype_is_the_narrowest_that_holds_the_vocabulary(size, dtype):
    assert token_dtype(size) == dtype
    assert np.iinfo(dtype).max >= size - 1


def test_a_missing_folder_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match=r"none does not exist: run `magnetar prepare "):
        open_prepared(tmp_path / "none")


@pytest.mark.parametrize("name", ["manifest.json", "train.bin"])
def test_a_file_in_place_of_a_folder_is_refused(folder, name):
    with pytest.raises(UserError, match=rf"{name} is a file, not a prepared folder: give the fold"):
        open_prepared(folder / name)


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json is missing.*not a prepared folder: give"):
        open_prepared(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "the whole file: Invalid JSON: "),
        (b"\xff\xfe{", "the whole file: Invalid JSON: "),
        (b'{"settings": ' + b"[" * 100_000, "the whole file: Invalid JSON: recursion limit"),
        (b'{"vocab_size": ' + b"7" * 5000 + b"}", "the whole file: Invalid JSON: number out of"),
        (b"null", "the whole file=null: it should be an object|the whole file: it should be an"),
        (b"[]", "the whole file: it should be an object"),
        (b'{"version": 2}', "version=2: it should be 1"),
    ],
    ids=lambda value: repr(value[:12]),
)
def test_a_manifest_that_is_none_is_refused(folder, content, problem):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(
        UserError, match=rf"not a valid manifest of version 1 of `magnetar prepare`: ({problem})"
    ):
        open_prepared(folder)
    with pytest.raises(UserError, match=r"is not a valid manifest|holds running text"):
        open_folder(folder, holds_pairs=True)


def test_a_manifest_without_a_split_is_refused(folder):
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    del splits["valid"]
    edit_manifest(folder, splits=splits)
    with pytest.raises(
        UserError, match=r"manifest\.json: splits has no 'valid': copy it back, or delete"
    ):
        open_prepared(folder)


@pytest.mark.parametrize("name", ["train.bin", "valid.bin", "train.idx", "tokenizer.model"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing: copy it back, or delete"):
        open_prepared(folder)


@pytest.mark.parametrize("keep", [0, 100])
def test_a_token_file_that_was_cut_short_is_named(folder, keep):
    content = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(content[:keep])
    with pytest.raises(
        UserError, match=rf"train\.bin has {keep} bytes where the manifest says {len(content)}"
    ):
        open_prepared(folder)


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda content, keep=keep: content[:keep] for keep in (0, 3, 150)),
        *(
            lambda content, at=at: content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1 :]
            for at in (0, 6, 8, 20, 30, 128, 138, 150)
        ),
    ],
)
def test_an_index_that_was_cut_short_or_altered_is_named(folder, damage):
    content = (folder / "valid.idx").read_bytes()
    (folder / "valid.idx").write_bytes(damage(content))
    with pytest.raises(UserError, match=r"valid\.idx is not the index of 5 documents"):
        open_prepared(folder)


def test_an_exchanged_vocabulary_is_noticed(folder):
    with (folder / "tokenizer.model").open("ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match=r"tokens made by another vocabulary: tokenizer\.model has"):
        open_prepared(folder)


def test_a_dtype_too_small_for_the_vocabulary_is_refused(folder):
    edit_manifest(folder, vocab_size=70_000)
    with pytest.raises(UserError, match=r"dtype=uint16 is too small for vocab_size=70000.*uint32"):
        open_prepared(folder)


def test_an_id_beyond_the_vocabulary_is_noticed_when_opening(folder):
    edit_manifest(folder, vocab_size=100)
    with pytest.raises(
        UserError, match=r"train\.bin holds token id \d+ at position \d+.*ends at 99"
    ):
        open_prepared(folder)


def test_unigram_perplexity_of_a_range_counts_that_range_alone(make_split):
    split = make_split(400, vocab_size=50)
    counts = np.bincount(np.asarray(split.tokens[7:45]))
    frequencies = counts[counts > 0] / 38
    expected = np.exp(-(frequencies * np.log(frequencies)).sum())
    assert split.unigram_perplexity(7, 45) == pytest.approx(expected, rel=1e-12)
