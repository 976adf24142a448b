"""The choice of the rows that are pairs of a direction, and the reasons against the others.

A row of the validation split is a pair if both sides hold something. Training pairs can also be
filtered. A dropped row counts under the first reason that holds.

Memory is 8 bytes a row for each column that is searched for duplicates, and one byte a row for each
direction.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from magnetar.data.atomic import write_atomically
from magnetar.data.errors import UserError
from magnetar.data.pairs.folder import PairsRecord, TableRecord, rows_file, token_columns
from magnetar.data.text.packed_lm import BoolArray, WordArray, mixed
from magnetar.data.text.token_files import SPLITS, TokenSplit, token_dtype

HASHED_AT_ONCE = 1 << 22  # tokens
WAYS_OUT = {  # by the reason why a row is no pair, in the order in which they are looked for
    "empty side": "fill in the sides that are empty",
    "too long": "raise --max-length",
    "length ratio": "raise --max-length-ratio",
    "in the validation split": "train on other rows than are validated",
    "duplicate": "leave out --dedupe",
}


@dataclass(frozen=True)
class PairFilter:
    """The filters of training pairs."""

    dedupe: bool = False  # once a direction, and in neither direction of the validation split
    max_length_ratio: float | None = None  # of the longer side to the shorter, in tokens
    max_length: int | None = None  # of a side, tag and end included, in tokens

    def check(self) -> None:
        """Raise a UserError for values without a meaning."""
        ratio, length = self.max_length_ratio, self.max_length
        if ratio is not None and not 1 <= ratio < float("inf"):
            raise UserError(f"max_length_ratio={ratio} must be at least 1: use 3, say")
        if length is not None and length < 3:
            raise UserError(f"max_length={length} must be at least 3: tag, a token, and the end")


@dataclass
class _Candidates:
    """The rows of a direction in one split of a table that have not been dropped."""

    table: TableRecord
    split: str
    languages: tuple[str, str]  # source and target
    columns: tuple[TokenSplit, TokenSplit]
    is_pair: BoolArray  # (rows,)
    dropped: dict[str, int]

    def drop(self, reason: str, is_bad: BoolArray) -> None:
        """Drop the bad rows, and count those that were not dropped before."""
        is_bad = is_bad & self.is_pair
        self.is_pair &= ~is_bad
        if count := int(is_bad.sum()):
            self.dropped[reason] = count


def choose_pairs(
    folder: Path, tables: Sequence[TableRecord], asked: PairFilter, vocab_size: int
) -> None:
    """Add the pairs to the records, and write the row files.

    Args:
        folder: folder of the token files.
        tables: records without pairs.
        asked: filters of the training split.
        vocab_size: size of the vocabulary of the tokens.
    """
    candidates = [one for table in tables for one in _candidates(folder, table, vocab_size)]
    for one in candidates:
        first, second = (column.lengths - 1 for column in one.columns)  # without the ends
        one.drop("empty side", (first == 0) | (second == 0))
        if one.split != "train":
            continue
        longer, shorter = np.maximum(first, second), np.minimum(first, second)
        if asked.max_length is not None:
            one.drop("too long", longer + 2 > asked.max_length)
        if asked.max_length_ratio is not None:
            one.drop("length ratio", longer > asked.max_length_ratio * shorter)
    if asked.dedupe:
        _drop_duplicates(candidates)
    for one in candidates:
        record = PairsRecord(
            languages=one.languages, num_pairs=int(one.is_pair.sum()), dropped=one.dropped
        )
        one.table.splits[one.split].pairs.append(record)
        rows = np.flatnonzero(one.is_pair).astype("<u4")
        write_atomically(
            rows_file(folder, one.table.name, one.split, one.languages), rows.tobytes()
        )


def dropped(tables: Sequence[TableRecord], split: str) -> dict[str, int]:
    """Number of dropped rows by reason, summed over the directions."""
    totals: Counter[str] = Counter()
    for table in tables:
        for pairs in table.pairs(split):
            totals.update(pairs.dropped)
    return {reason: totals[reason] for reason in WAYS_OUT if reason in totals}


def in_words(reasons: dict[str, int]) -> str:
    """The reasons and numbers of dropped rows, in words."""
    return ", ".join(f"{reason} {count:,}" for reason, count in reasons.items()) or "none"


def refuse_no_pair(tables: Sequence[TableRecord]) -> None:
    """Raise a UserError if a split has rows and none of them is a pair."""
    for split in SPLITS:
        of_split = [table for table in tables if split in table.splits]
        if of_split and not any(one.num_pairs for table in of_split for one in table.pairs(split)):
            reasons = dropped(of_split, split)
            raise UserError(
                f"no row of the {split} split is a pair of any direction (tables "
                f"{', '.join(table.name for table in of_split)}; dropped: "
                f"{in_words(reasons)}): {' and '.join(WAYS_OUT[reason] for reason in reasons)}"
            )


def _candidates(folder: Path, table: TableRecord, vocab_size: int) -> Iterator[_Candidates]:
    for split, record in table.splits.items():
        columns = token_columns(folder, table, split, token_dtype(vocab_size), vocab_size)
        for source, target in table.directions:
            everything = np.ones(record.num_rows, dtype=np.bool_)
            sides = (columns[source], columns[target])
            yield _Candidates(table, split, (source, target), sides, everything, {})


def _drop_duplicates(candidates: list[_Candidates]) -> None:
    """Drop pairs that occur before in any table, or in the validation split in either direction."""
    column_hashes: dict[Path, WordArray] = {}

    def pair_hashes(one: _Candidates) -> WordArray:
        """Hashes of the pairs, equal for both directions of a pair."""
        for column in one.columns:
            if column.path not in column_hashes:
                column_hashes[column.path] = row_hashes(column)
        sides = dict(zip(one.languages, one.columns, strict=True))
        first, second = (column_hashes[sides[language].path] for language in sorted(sides))
        return mixed(first + mixed(second))

    for languages in {frozenset(one.languages) for one in candidates}:
        of_both = [one for one in candidates if {*one.languages} == languages]
        validated = [pair_hashes(one)[one.is_pair] for one in of_both if one.split == "valid"]
        seen = np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *validated]))
        earlier: dict[tuple[str, str], WordArray] = {}
        for one in of_both:
            if one.split == "train":
                hashes = pair_hashes(one)
                one.drop("in the validation split", np.isin(hashes, seen))
                rows = np.flatnonzero(one.is_pair)
                distinct, first_at = np.unique(hashes[rows], return_index=True)
                is_first = np.zeros(len(hashes), dtype=np.bool_)
                is_first[rows[first_at]] = True
                before = earlier.get(one.languages, np.empty(0, dtype=np.uint64))
                one.drop("duplicate", ~is_first | np.isin(hashes, before))
                earlier[one.languages] = np.union1d(before, distinct)


def row_hashes(column: TokenSplit) -> WordArray:
    """A hash of each row's tokens, a function of them alone: (rows,) uint64."""
    starts = np.asarray(column.document_starts).astype(np.int64)
    cuts = np.searchsorted(starts, np.arange(0, starts[-1], HASHED_AT_ONCE), side="left")
    blocks = []
    for first, last in pairwise([*np.unique(cuts), len(starts) - 1]):
        inner = starts[first : last + 1] - starts[first]
        tokens = column.read(int(starts[first]), int(starts[last])).astype(np.uint64)
        position = np.arange(inner[-1]) - np.repeat(inner[:-1], np.diff(inner))
        words = mixed(tokens + mixed(position.astype(np.uint64)))
        blocks.append(np.add.reduceat(words, inner[:-1]))
    return mixed(np.concatenate(blocks))
