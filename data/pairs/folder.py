"""The folder of prepared pairs: one vocabulary, token files by language, and the rows of pairs.

tokenizer.model                    the vocabulary, with a tag for each language
TABLE.SPLIT.LANGUAGE.bin, .idx     the rows of one language as in data.text.token_files: a row is a
                                   document; one that holds nothing but the end is a missing side
TABLE.SPLIT.A+B.rows               uint32, little endian: the rows that are pairs from A to B; of
                                   older folders, also those from B to A
manifest.json                      sizes, checksums, counts, and the settings that made the folder

An n-way table is stored once for all directions; a direction is two of its columns. A long table is
stored as one such table for each of its directions.
"""

import hashlib
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from magnetar.data.errors import UserError, first_problem
from magnetar.data.pairs.codec import Codec, check_language
from magnetar.data.text.packed_lm import IntArray
from magnetar.data.text.token_files import SplitRecord, TokenSplit
from magnetar.data.text.tokenizer import load_tokenizer

PAIRS_VERSION = 1
MOST_OPEN_FILES = 65536
# By direction, source and target language: sources, and their references.
Texts = Mapping[tuple[str, str], tuple[Sequence[str], Sequence[str]]]
REMEDY = "run `magnetar prepare-pairs --out ...`"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PairsRecord(_Record):
    """The pairs of a direction in one split of a table; in older folders of either direction."""

    languages: tuple[str, str]  # source and target
    num_pairs: int = Field(ge=0)
    dropped: dict[str, int]  # rows that are no pair, by reason


class TableSplitRecord(_Record):
    """One split of a table."""

    num_rows: int = Field(ge=1)
    columns: dict[str, SplitRecord]  # by language
    pairs: list[PairsRecord]

    def pairs_of(self, direction: tuple[str, str]) -> PairsRecord | None:
        """The record of a direction."""
        found = {record.languages: record for record in self.pairs}
        return found.get(direction) or found.get((direction[1], direction[0]))


class TableRecord(_Record):
    """One table as it is stored."""

    name: str  # what its files begin with
    weight: float = Field(gt=0)
    directions: list[tuple[str, str]]  # source and target language
    splits: dict[str, TableSplitRecord]

    def pairs(self, split: str) -> list[PairsRecord]:
        """The record of each direction in one split; none without that split."""
        record = self.splits.get(split)
        found = [record.pairs_of(direction) for direction in self.directions] if record else []
        return [pairs for pairs in found if pairs is not None]


class PairsManifest(_Record):
    """The content of manifest.json."""

    kind: Literal["pairs"] = "pairs"
    version: Literal[1] = 1
    tokenizer_file: Literal["tokenizer.model"] = "tokenizer.model"
    tokenizer_fingerprint: str
    vocab_size: int = Field(ge=2)
    eos_id: int = Field(ge=0)
    dtype: Literal["uint16", "uint32"]
    languages: list[str]
    tables: list[TableRecord]
    settings: dict[str, Any]  # whatever determined the result: see data.pairs.prepare


class Pair(NamedTuple):
    """One pair as a model reads it.

    Attributes:
        source: (S,) int64, tag of the target language, text, end.
        target: (T,) int64, text, end.
    """

    source: IntArray
    target: IntArray


@dataclass(frozen=True)
class TablePairs:
    """The pairs of one direction in one table, mapped into memory."""

    table: str
    weight: float
    source: TokenSplit
    target: TokenSplit
    rows: npt.NDArray[np.uint32]  # (n,)
    direction: tuple[str, str]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def source_row(self) -> Callable[[int], npt.NDArray[Any]]:
        """Source tokens of a row with the end, unchecked: (length,) uint16 or uint32."""
        return _row_reader(self.source)

    @cached_property
    def target_row(self) -> Callable[[int], npt.NDArray[Any]]:
        """Target tokens of a row with the end, unchecked: (length,) uint16 or uint32."""
        return _row_reader(self.target)

    @cached_property
    def source_lengths(self) -> IntArray:
        """Tokens of each source, tag and end included: (n,) int64."""
        return _lengths(self.source, self.rows) + 1

    @cached_property
    def target_lengths(self) -> IntArray:
        """Tokens of each target, the end included: (n,) int64."""
        return _lengths(self.target, self.rows)


def _row_reader(column: TokenSplit) -> Callable[[int], npt.NDArray[Any]]:
    # A plain array is cut several times as fast as the np.memmap beneath it.
    tokens, starts = np.asarray(column.tokens), np.asarray(column.document_starts)
    return lambda row: tokens[starts[row] : starts[row + 1]]


def _lengths(column: TokenSplit, rows: npt.NDArray[np.uint32]) -> IntArray:
    starts = np.asarray(column.document_starts).astype(np.int64)
    return starts[1:][rows] - starts[:-1][rows]


class DirectionPairs(Sequence[Pair]):
    """The pairs of one direction in one split, table after table."""

    def __init__(self, parts: Sequence[TablePairs], codec: Codec, direction: tuple[str, str]):
        self.parts = tuple(parts)
        self.codec = codec
        self.direction = direction
        self._starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        """Pair `index`, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        at = index % len(self)
        which = int(np.searchsorted(self._starts, at, side="right")) - 1
        part = self.parts[which]
        row = int(part.rows[at - self._starts[which]])
        tag = np.array([self.codec.tag_id(self.direction[1])], dtype=np.int64)
        return Pair(np.concatenate([tag, part.source.document(row)]), part.target.document(row))

    @property
    def sources(self) -> Iterator[str]:
        """The original text of each source."""
        return (self.codec.decode(pair.source.tolist()) for pair in self)

    @property
    def references(self) -> Iterator[str]:
        """The original text of each target, exactly as it was given."""
        return (self.codec.decode(pair.target.tolist()) for pair in self)


@dataclass(frozen=True)
class PreparedPairs:
    """An opened folder of prepared pairs."""

    path: Path
    manifest: PairsManifest

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary."""
        return self.manifest.vocab_size

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages that have a tag."""
        return tuple(self.manifest.languages)

    @property
    def tables(self) -> list[TableRecord]:
        """The tables of the folder."""
        return self.manifest.tables

    @cached_property
    def codec(self) -> Codec:
        """The vocabulary, loaded at the first access."""
        return Codec(load_tokenizer(self.path / self.manifest.tokenizer_file), self.languages)

    @property
    def fingerprint(self) -> str:
        """sha256 of the manifest without its settings: equal for equal data."""
        content = self.manifest.model_dump_json(exclude={"settings"})
        return hashlib.sha256(content.encode()).hexdigest()

    def directions(self, split: str) -> list[tuple[str, str]]:
        """Every direction that has a pair in a split, in the order of the tables."""
        return [*self._of_split(split)]

    def pairs(self, split: str, source: str, target: str) -> DirectionPairs:
        """The pairs of a direction.

        Raises:
            UserError: if a language is unknown, or the split has no pair of this direction.
        """
        for language in (source, target):
            check_language(language, self.languages)
        by_direction = self._of_split(split)
        if (source, target) not in by_direction:
            known = ", ".join("-".join(found) for found in by_direction) or "none"
            raise UserError(
                f"{self.path} has no pair of direction {source}-{target} in its {split} split: "
                f"it has {known}"
            )
        return by_direction[source, target]

    def texts(
        self,
        split: str,
        directions: Sequence[tuple[str, str]] | None = None,
        max_sentences: int | None = None,
    ) -> Texts:
        """The first pairs of each direction of a split, as text.

        Args:
            split: "train" or "valid".
            directions: source and target languages; None for all that the split has.
            max_sentences: largest number of pairs of a direction; None for all.

        Raises:
            UserError: the split has no pair of a direction.
        """
        chosen = self.directions(split) if directions is None else directions
        pairs = {direction: self.pairs(split, *direction) for direction in chosen}
        return {
            direction: (
                list(islice(found.sources, max_sentences)),
                list(islice(found.references, max_sentences)),
            )
            for direction, found in pairs.items()
        }

    def _of_split(self, split: str) -> dict[tuple[str, str], DirectionPairs]:
        """The pairs of every direction that has pairs, in the order of the tables; opened once."""
        if split not in self._opened:
            parts: dict[tuple[str, str], list[TablePairs]] = {}
            for part in self.table_pairs(split):
                parts.setdefault(part.direction, []).append(part)
            self._opened[split] = {
                direction: DirectionPairs(of_it, self.codec, direction)
                for direction, of_it in parts.items()
            }
        return self._opened[split]

    @cached_property
    def _opened(self) -> dict[str, dict[tuple[str, str], DirectionPairs]]:
        return {}

    def table_pairs(self, split: str) -> list[TablePairs]:
        """The pairs of a split, by table and direction; empty ones are left out."""
        return [part for table in self.tables for part in self._parts(table, split)]

    def _parts(self, table: TableRecord, split: str) -> Iterator[TablePairs]:
        record = table.splits.get(split)
        if record is None:
            return
        columns = {
            language: TokenSplit(
                self.path / f"{table.name}.{split}.{language}.bin",
                column,
                self.manifest.dtype,
                self.vocab_size,
            )
            for language, column in record.columns.items()
        }
        for source, target in table.directions:
            pairs = record.pairs_of((source, target))
            if pairs and pairs.num_pairs:
                file = rows_file(self.path, table.name, split, pairs.languages)
                rows = np.asarray(np.memmap(file, dtype="<u4", mode="r"))
                yield TablePairs(
                    table.name,
                    table.weight,
                    columns[source],
                    columns[target],
                    rows,
                    (source, target),
                )


def rows_file(folder: Path, table: str, split: str, languages: tuple[str, str]) -> Path:
    """The file of the row numbers that are pairs."""
    return folder / f"{table}.{split}.{languages[0]}+{languages[1]}.rows"


def open_pairs(path: Path) -> PreparedPairs:
    """The pairs of a folder; reads the manifest and maps the rest.

    Raises:
        UserError: if the folder, the manifest or a file in it is missing, cut short, or does not
            fit the others.
    """
    # A file for each direction stays open: 33 languages have more than the usual 1,024.
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN_FILES if most == resource.RLIM_INFINITY else min(MOST_OPEN_FILES, most)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    file = path / "manifest.json"
    if not file.is_file():
        raise UserError(f"{path} is not a folder of prepared pairs (no {file}): {REMEDY} first")
    try:
        manifest = PairsManifest.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{file} is not a manifest of pairs of version {PAIRS_VERSION}: "
            f"{first_problem(error)}. Give a folder of pairs, or {REMEDY}"
        ) from error
    again = f"copy it back, or delete {path} and prepare it again"
    vocabulary = path / manifest.tokenizer_file
    if not vocabulary.is_file():
        raise UserError(f"{vocabulary} is missing: {again}")
    fingerprint = hashlib.sha256(vocabulary.read_bytes()).hexdigest()
    if fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(
            f"{path} holds tokens made by another vocabulary: {vocabulary.name} has the sha256 "
            f"{fingerprint[:12]}, the tokens were made with {manifest.tokenizer_fingerprint[:12]}: "
            f"{again}"
        )
    for table in manifest.tables:
        for split, record in table.splits.items():
            for language, column in record.columns.items():
                stem = path / f"{table.name}.{split}.{language}.bin"
                _check_column(TokenSplit(stem, column, manifest.dtype, manifest.vocab_size), again)
            for pairs in record.pairs:
                rows = rows_file(path, table.name, split, pairs.languages)
                _check_size(rows, 4 * pairs.num_pairs, again)
                _check_rows(rows, pairs.languages, record, again)
    return PreparedPairs(path, manifest)


def _check_rows(
    file: Path, languages: tuple[str, str], record: TableSplitRecord, again: str
) -> None:
    absent = [language for language in languages if language not in record.columns]
    if absent:
        raise UserError(f"{file} is of {absent[0]!r}, a language without a column: {again}")
    num_rows = min(record.columns[language].num_documents for language in languages)
    rows = np.memmap(file, dtype="<u4", mode="r") if file.stat().st_size else np.zeros(0)
    if rows.size and rows.max() >= num_rows:
        raise UserError(f"{file} names row {rows.max()}, but there are {num_rows}: {again}")


def _check_column(column: TokenSplit, again: str) -> None:
    record, index = column.record, column.path.with_suffix(".idx")
    _check_size(column.path, record.num_tokens * np.dtype(column.dtype).itemsize, again)
    if not column.has_index:
        raise UserError(
            f"{index} is not the index of {record.num_documents} rows that the manifest promises: "
            f"{again}"
        )


def _check_size(file: Path, size: int, again: str) -> None:
    if not file.is_file():
        raise UserError(f"{file} is missing: {again}")
    if file.stat().st_size != size:
        raise UserError(
            f"{file} has {file.stat().st_size} bytes where the manifest says {size}: {again}"
        )
