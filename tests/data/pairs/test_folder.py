import json
import resource
import shutil

import numpy as np
import pytest

from magnetar.data.errors import UserError
from magnetar.data.pairs.folder import open_pairs
from magnetar.data.text.prepare import PrepareConfig, prepare
from tests.data.parallel import LANGUAGES, prepared_verses, verses


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepared_verses(tmp_path_factory.mktemp("pairs"), 100).path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_a_pair_has_the_tag_of_its_target_and_two_ends(folder):
    prepared = open_pairs(folder)
    codec, rows = prepared.codec, verses(100)
    pairs = prepared.pairs("train", "de", "pt-br")
    assert len(pairs) == 100
    for pair, row in zip(pairs, rows, strict=True):
        assert pair.source.tolist() == codec.source_ids(row["de"], "pt-br")
        assert pair.target.tolist() == codec.target_ids(row["pt-br"])
        assert pair.source.dtype == pair.target.dtype == np.int64


def test_pairs_come_table_after_table(folder):
    prepared = open_pairs(folder)
    pairs = [*prepared.pairs("train", "en", "de")]
    assert len(pairs) == len(prepared.pairs("train", "en", "de")) == 120
    rows = verses(100) + verses(20, seed=2)
    assert [prepared.codec.decode(pair.target.tolist()) for pair in pairs] == [
        r["de"] for r in rows
    ]


def test_lengths_and_unchecked_rows_are_those_of_the_documents(folder):
    column = open_pairs(folder).tables["train"][0].source
    documents = [column.document(i) for i in range(column.num_documents)]
    assert column.lengths.tolist() == [len(document) for document in documents]
    assert column.unchecked(5).tolist() == documents[5].tolist()


def test_more_directions_may_be_open_than_a_shell_allows_files(folder):
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, most))
    open_pairs(folder)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(65536, most), most)


def test_an_opened_folder_says_what_it_holds(folder):
    prepared = open_pairs(folder)
    assert prepared.languages == LANGUAGES
    assert prepared.manifest.vocab_size == prepared.codec.vocab_size == 320
    assert [table.name for table in prepared.manifest.tables] == ["verses", "help.en-de"]
    assert len(prepared.directions("train")) == len(prepared.directions("valid")) == 6


def test_equal_data_have_equal_fingerprints_wherever_they_lie(folder, tmp_path):
    again = prepared_verses(tmp_path, 100)
    assert again.fingerprint == open_pairs(folder).fingerprint
    (tmp_path / "other").mkdir()
    assert prepared_verses(tmp_path / "other", 99).fingerprint != again.fingerprint


def test_what_is_not_there_is_a_message(folder):
    prepared = open_pairs(folder)
    with pytest.raises(UserError, match=r"language 'fr' is unknown here: use one of en, de, pt-br"):
        prepared.pairs("train", "en", "fr")
    with pytest.raises(
        UserError, match=r"no pair of direction en-en in its train split: it has en"
    ):
        prepared.pairs("train", "en", "en")


def test_a_folder_that_holds_no_pairs_is_a_message(tmp_path, text_file):
    with pytest.raises(UserError, match=r"is not a prepared folder: .* `magnetar prepare-pairs --"):
        open_pairs(tmp_path)
    text = PrepareConfig(
        tmp_path / "text", train=(str(text_file),), documents="line", vocab_size=300
    )
    prepare(text)
    with pytest.raises(
        UserError,
        match=r"manifest\.json is not a valid manifest of version 1 of `magnetar prepare-p",
    ):
        open_pairs(tmp_path / "text")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer.model", r"tokenizer\.model is missing: copy it back, or delete"),
        ("verses.train.de.bin", r"verses\.train\.de\.bin is missing: copy it back, or delete"),
        ("verses.train.de.idx", r"verses\.train\.de\.idx is missing: copy it back, or delete"),
        ("verses.train.en+de.rows", r"verses\.train\.en\+de\.rows is missing: copy it back"),
    ],
)
def test_a_missing_file_is_a_message(copy, name, message):
    (copy / name).unlink()
    with pytest.raises(UserError, match=message):
        open_pairs(copy)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer.model", r"holds tokens made by another vocabulary: tokenizer\.model has"),
        ("verses.train.de.bin", r"verses\.train\.de\.bin has \d+ bytes where the manifest says"),
        ("verses.train.en+de.rows", r"en\+de\.rows has 398 bytes where the manifest says 400"),
        (
            "manifest.json",
            r"manifest\.json is not a valid manifest of version 1 of `magnetar prepare-p",
        ),
    ],
)
def test_a_file_that_was_cut_short_is_a_message(copy, name, message):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-2])
    with pytest.raises(UserError, match=message):
        open_pairs(copy)


def test_a_pair_of_rows_that_are_not_there_is_a_message(copy):
    file = copy / "verses.train.en+de.rows"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match=r"rows names row 16777216, but there are 100: copy it"):
        open_pairs(copy)


def test_pairs_of_a_language_that_is_not_there_are_a_message(copy):
    file = copy / "manifest.json"
    manifest = json.loads(file.read_text())
    split = manifest["tables"][0]["splits"]["train"]
    split["columns"]["fr"] = split["columns"].pop("de")
    file.write_text(json.dumps(manifest))
    for path in copy.glob("verses.train.de.*"):
        path.rename(path.with_name(path.name.replace(".de.", ".fr.")))
    with pytest.raises(UserError, match=r"is of 'de', a language without a column: copy it back"):
        open_pairs(copy)


def test_a_manifest_with_another_key_is_a_message(copy):
    file = copy / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "colour": "blue"}))
    with pytest.raises(UserError, match=r"prepare-pairs`: colour is not a key"):
        open_pairs(copy)


def test_a_token_beyond_the_vocabulary_is_a_message(copy):
    tokens = np.memmap(copy / "verses.train.de.bin", dtype="<u2", mode="r+")
    tokens[0] = 60_000
    tokens.flush()
    with pytest.raises(
        UserError, match=r"verses\.train\.de\.bin holds token id 60000 at position 0"
    ):
        [*open_pairs(copy).pairs("train", "de", "en")]
