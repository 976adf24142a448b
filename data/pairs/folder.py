"""The folder of prepared pairs: one vocabulary, token files by language, and the rows of pairs.

tokenizer.model                    the vocabulary, with a tag for each language
TABLE.SPLIT.LANGUAGE.bin, .idx     the rows of one language as in data.text.token_files: a row is a
                                   document; one that holds nothing but the end is a missing side
TABLE.SPLIT.A+B.rows               uint32, little endian: the rows that are pairs from A to B
manifest.json                      sizes, checksums, counts, and the settings that made the folder

An n-way table is stored once for all directions; a direction is two of its columns. A long table is
stored as one such table for each of its directions.
"""

import hashlib
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from magnetar.data.errors import UserError
from magnetar.data.pairs.codec import Codec, check_language
from magnetar.data.prepared_folder import manifest_of, remedy, require_size, require_vocabulary
from magnetar.data.text.packed_lm import IntArray
from magnetar.data.text.token_files import SPLITS, Record, SplitRecord, TokenSplit
from magnetar.data.text.tokenizer import load_tokenizer

PAIRS_VERSION = 1
MOST_OPEN_FILES = 65536
# By direction, source and target language: sources, and their references.
Texts = Mapping[tuple[str, str], tuple[Sequence[str], Sequence[str]]]


class PairsRecord(Record):
    """The pairs of a direction in one split of a table."""

    languages: tuple[str, str]  # source and target
    num_pairs: int = Field(ge=0)
    dropped: dict[str, int]  # rows that are no pair, by reason


class TableSplitRecord(Record):
    """One split of a table."""

    num_rows: int = Field(ge=1)
    columns: dict[str, SplitRecord]  # by language
    pairs: list[PairsRecord]


class TableRecord(Record):
    """One table as it is stored."""

    name: str  # what its files begin with
    weight: float = Field(gt=0, allow_inf_nan=False)
    directions: list[tuple[str, str]]  # source and target language
    splits: dict[str, TableSplitRecord]

    def pairs(self, split: str) -> list[PairsRecord]:
        """The record of each direction in one split; none without that split."""
        return self.splits[split].pairs if split in self.splits else []


class PairsManifest(Record):
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


@dataclass(frozen=True)
class DirectionPairs:
    """The pairs of one direction in one split, table after table."""

    parts: Sequence[TablePairs]
    codec: Codec

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Pair]:
        for part in self.parts:
            tag = np.array([self.codec.tag_id(part.direction[1])], dtype=np.int64)
            for row in part.rows.tolist():
                source, target = part.source.document(row), part.target.document(row)
                yield Pair(np.concatenate([tag, source]), target)

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
    # By split: its pairs by table and direction, if any. Arrays cannot be compared at once.
    tables: dict[str, list[TablePairs]] = field(compare=False, repr=False)

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages that have a tag."""
        return tuple(self.manifest.languages)

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
        return [*dict.fromkeys(part.direction for part in self.tables[split])]

    def pairs(self, split: str, source: str, target: str) -> DirectionPairs:
        """The pairs of a direction.

        Raises:
            UserError: if a language is unknown, or the split has no pair of this direction.
        """
        for language in (source, target):
            check_language(language, self.languages)
        parts = [part for part in self.tables[split] if part.direction == (source, target)]
        if not parts:
            known = ", ".join(map("-".join, self.directions(split))) or "none"
            raise UserError(
                f"{self.path} has no pair of direction {source}-{target} in its {split} split: "
                f"it has {known}"
            )
        return DirectionPairs(parts, self.codec)

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
    manifest = manifest_of(path, PairsManifest, "magnetar prepare-pairs")
    require_vocabulary(path, manifest)
    return PreparedPairs(
        path,
        manifest,
        {
            split: [
                part
                for table in manifest.tables
                for part in _open_table(path, manifest, table, split)
            ]
            for split in SPLITS
        },
    )


def token_columns(
    folder: Path, table: TableRecord, split: str, dtype: str, vocab_size: int
) -> dict[str, TokenSplit]:
    """The token files of one split of a table, by language."""
    return {
        language: TokenSplit(
            folder / f"{table.name}.{split}.{language}.bin", column, dtype, vocab_size
        )
        for language, column in table.splits[split].columns.items()
    }


def _open_table(
    path: Path, manifest: PairsManifest, table: TableRecord, split: str
) -> Iterator[TablePairs]:
    """The pairs of each direction that has some, after a look at every file."""
    if split not in table.splits:
        return
    columns = token_columns(path, table, split, manifest.dtype, manifest.vocab_size)
    for column in columns.values():
        column.require_whole()
    for record in table.pairs(split):
        file = rows_file(path, table.name, split, record.languages)
        require_size(file, 4 * record.num_pairs)
        absent = [language for language in record.languages if language not in columns]
        if absent:
            raise UserError(
                f"{file} is of {absent[0]!r}, a language without a column: {remedy(path)}"
            )
        if not record.num_pairs:
            continue
        rows = np.asarray(np.memmap(file, dtype="<u4", mode="r"))
        source, target = (columns[language] for language in record.languages)
        num_rows = min(source.num_documents, target.num_documents)
        if rows.max() >= num_rows:
            raise UserError(
                f"{file} names row {rows.max()}, but there are {num_rows}: {remedy(path)}"
            )
        yield TablePairs(table.name, table.weight, source, target, rows, record.languages)
