from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import magnetar.data.pairs.filters
from magnetar.data.pairs.filters import PairFilter, row_hashes
from magnetar.data.pairs.folder import open_pairs
from magnetar.data.pairs.prepare import PreparePairsConfig, TableConfig, prepare_pairs
from tests.data.parallel import long_rows, verses, write_jsonl, write_tsv

TRAIN, VALID = verses(60), verses(6, seed=1)


@pytest.fixture
def make(tmp_path):
    """Prepares rows with a filter; the prepared pairs."""

    def prepared(train, asked, valid=VALID, others=()):
        number = len([*tmp_path.iterdir()])
        table = TableConfig(
            "verses",
            str(write_tsv(tmp_path / f"train{number}.tsv", train)) if train else "",
            str(write_tsv(tmp_path / f"valid{number}.tsv", valid)),
        )
        config = PreparePairsConfig(
            tmp_path / f"out{number}", (table, *others), vocab_size=310, filter=asked
        )
        prepare_pairs(config)
        return open_pairs(config.out)

    return prepared


def dropped(prepared, source="en", target="de", split="train"):
    records = prepared.manifest.tables[0].splits[split].pairs
    return next(pairs.dropped for pairs in records if pairs.languages == (source, target))


def texts(prepared, source="en", target="de"):
    pairs = prepared.pairs("train", source, target)
    return [*zip(pairs.sources, pairs.references, strict=True)]


def test_a_pair_that_comes_again_is_dropped_once_for_each_direction(make):
    again = [dict(TRAIN[3]), {**TRAIN[4], "pt-br": "outro"}]
    prepared = make([*TRAIN, *again], PairFilter(dedupe=True))
    expected = [(row["en"], row["de"]) for row in TRAIN]
    assert texts(prepared) == expected
    assert texts(prepared, "de", "en") == [(de, en) for en, de in expected]
    assert dropped(prepared) == {"duplicate": 2}
    assert dropped(prepared, "en", "pt-br") == dropped(prepared, "pt-br", "en") == {"duplicate": 1}
    assert len(texts(prepared, "pt-br", "en")) == 61
    assert len(texts(make([*TRAIN, *again], PairFilter()))) == 62


def test_one_equal_side_is_no_duplicate(make):
    prepared = make([*TRAIN, {**TRAIN[0], "de": "anders"}], PairFilter(dedupe=True))
    assert len(texts(prepared)) == 61
    assert dropped(prepared) == {}


def test_a_pair_that_will_be_validated_is_not_trained_on(make):
    prepared = make([*TRAIN, VALID[0], VALID[0]], PairFilter(dedupe=True))
    assert texts(prepared) == [(row["en"], row["de"]) for row in TRAIN]
    assert dropped(prepared) == {"in the validation split": 2}
    assert len(prepared.pairs("valid", "en", "de")) == 6


def test_duplicates_are_found_in_other_tables_in_either_direction(make, tmp_path):
    rows = long_rows(TRAIN[:5], "de", "en") + long_rows(verses(3, seed=4), "de", "en")
    path = write_jsonl(tmp_path / "other.jsonl", rows)
    prepared = make(TRAIN, PairFilter(dedupe=True), others=(TableConfig("other", str(path)),))
    assert len(texts(prepared, "de", "en")) == 63
    assert prepared.manifest.tables[1].splits["train"].pairs[0].dropped == {"duplicate": 5}


def test_a_long_table_that_lists_both_directions_keeps_both(make, tmp_path):
    rows = long_rows(TRAIN, "en", "de") + long_rows([*TRAIN, TRAIN[0]], "de", "en")
    path = write_jsonl(tmp_path / "both.jsonl", rows + long_rows(VALID[:2], "de", "en"))
    prepared = make([], PairFilter(dedupe=True), others=(TableConfig("both", str(path)),))
    assert [len(texts(prepared, *pair)) for pair in (("en", "de"), ("de", "en"))] == [60, 60]
    counts = [table.splits["train"].pairs[0].dropped for table in prepared.manifest.tables[1:]]
    assert counts == [{}, {"in the validation split": 2, "duplicate": 1}]


def test_pairs_of_unequal_lengths_are_dropped_and_counted(make):
    long = {"en": "the sea", "de": "die See " * 30, "pt-br": "o mar"}
    prepared = make([*TRAIN, long], PairFilter(max_length_ratio=12))
    assert texts(prepared) == [(row["en"], row["de"]) for row in TRAIN]
    assert dropped(prepared) == {"length ratio": 1}
    assert dropped(prepared, "en", "pt-br") == {}
    ratios = [
        max(len(s) - 2, len(t) - 1) / min(len(s) - 2, len(t) - 1)
        for s, t in make(TRAIN, PairFilter()).pairs("train", "en", "de")
    ]
    prepared = make(TRAIN, PairFilter(max_length_ratio=1.5))
    assert len(texts(prepared)) == sum(ratio <= 1.5 for ratio in ratios)


def test_pairs_with_a_side_that_is_too_long_are_dropped_and_counted(make):
    pairs = make(TRAIN, PairFilter()).pairs("train", "en", "de")
    # A target that is read as a source has a tag too.
    longest = [max(len(source), len(target) + 1) for source, target in pairs]
    limit = sorted(longest)[30]
    expected = sum(length <= limit for length in longest)
    prepared = make(TRAIN, PairFilter(max_length=limit))
    assert len(texts(prepared)) == expected
    assert dropped(prepared) == {"too long": 60 - expected}


def test_validation_pairs_are_not_filtered(make):
    everything = PairFilter(dedupe=True, max_length_ratio=1, max_length=8)
    train = [{"en": "a", "de": "a", "pt-br": "a"}, *TRAIN]
    prepared = make(train, everything, [*VALID, VALID[0]])
    assert len(prepared.pairs("valid", "en", "de")) == 7
    assert dropped(prepared, split="valid") == {}


def test_each_row_counts_under_one_reason(make):
    empty = {"en": "", "de": "See", "pt-br": "mar"}
    prepared = make([*TRAIN, empty, TRAIN[0], VALID[0]], PairFilter(True, 1.5, 40))
    record = prepared.manifest.tables[0].splits["train"]
    for pairs in record.pairs:
        assert pairs.num_pairs + sum(pairs.dropped.values()) == record.num_rows


def test_rows_have_equal_hashes_exactly_when_their_tokens_are_equal(make, monkeypatch):
    prepared = make([*TRAIN, *reversed(TRAIN)], PairFilter())
    column = prepared.tables["train"][0].source
    hashes = row_hashes(column)
    assert len({*hashes.tolist()}) == 60
    np.testing.assert_array_equal(hashes[:60], hashes[60:][::-1])
    for size in (1, 7, 100):
        monkeypatch.setattr(magnetar.data.pairs.filters, "HASHED_AT_ONCE", size)
        np.testing.assert_array_equal(row_hashes(column), hashes)
    lengths = [end - start for start, end in pairwise(column.document_starts.tolist())]
    assert min(lengths) >= 1


def test_a_table_of_which_every_pair_is_dropped_has_none(make, tmp_path):
    rows = long_rows(TRAIN[:5], "en", "de")
    path = write_jsonl(tmp_path / "other.jsonl", rows)
    other = TableConfig("other", str(path))
    prepared = make(TRAIN, PairFilter(dedupe=True), others=(replace(other, weight=3),))
    assert prepared.manifest.tables[1].splits["train"].pairs[0].num_pairs == 0
    assert [part.table for part in prepared.tables["train"]] == ["verses"] * 6
