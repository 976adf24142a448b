"""The prepared folder: a vocabulary, token files, and the manifest that ties them together.

tokenizer.model | tokenizer.json   the vocabulary
train.bin, valid.bin               token ids, uint16 or uint32, little endian; each document
                                   ends with the end-of-document id
train.idx, valid.idx               .npy, uint64 (num_documents + 1,): where documents begin
manifest.json                      sizes, checksums, and the settings that made the folder
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from magnetar.data.errors import UserError
from magnetar.data.prepared_folder import (
    manifest_of,
    remedy,
    require_size,
    require_vocabulary,
)
from magnetar.data.text.tokenizer import Tokenizer, TokenizerFile, load_tokenizer

SPLITS = ("train", "valid")
FORMAT_VERSION = 1
READ_TOKENS = 1 << 24  # tokens in memory at once when a whole file is scanned
OPEN_SCAN_TOKENS = 1 << 26  # tokens looked at when a folder is opened (about 0.1 s)


class Record(BaseModel):
    """A part of a manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SplitRecord(Record):
    """What the manifest says about one split."""

    num_tokens: int = Field(ge=1)  # ends of documents included
    num_documents: int = Field(ge=1)
    num_bytes: int = Field(ge=0)  # UTF-8 bytes of the source text
    sha256: str  # of the .bin file


class Manifest(Record):
    """The content of manifest.json."""

    version: Literal[1] = 1
    tokenizer_file: TokenizerFile
    tokenizer_fingerprint: str
    vocab_size: int = Field(ge=2)
    eos_id: int = Field(ge=0)
    dtype: Literal["uint16", "uint32"]
    splits: dict[str, SplitRecord]
    settings: dict[str, Any]  # whatever determined the result: see data.text.prepare


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The narrowest type of token file that holds ids below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def unigram_perplexity(counts: npt.NDArray[np.int64]) -> float:
    """exp(entropy) of the frequencies of some tokens among themselves.

    A model of these frequencies that ignores the order of tokens would reach it.
    """
    frequencies = counts[counts > 0] / counts.sum()
    return float(np.exp(-(frequencies * np.log(frequencies)).sum()))


@dataclass(frozen=True)
class TokenSplit:
    """The tokens of one split, mapped into memory rather than read."""

    path: Path  # of the .bin file
    record: SplitRecord
    dtype: str
    vocab_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens, ends of documents included."""
        return self.record.num_tokens

    @property
    def num_documents(self) -> int:
        """Documents."""
        return self.record.num_documents

    @cached_property
    def tokens(self) -> npt.NDArray[Any]:
        """Every token id: (num_tokens,) uint16 or uint32, a np.memmap."""
        return np.memmap(self.path, dtype=np.dtype(self.dtype).newbyteorder("<"), mode="r")

    @cached_property
    def document_starts(self) -> npt.NDArray[np.uint64]:
        """Starts of all documents, and the end of the last: (num_documents + 1,) uint64."""
        return np.load(self.path.with_suffix(".idx"), mmap_mode="r")

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, its end included: (num_documents,) int64."""
        starts = np.asarray(self.document_starts).astype(np.int64)
        return starts[1:] - starts[:-1]

    @cached_property
    def unchecked(self) -> Callable[[int], npt.NDArray[Any]]:
        """Function that gives tokens of document i: (length,) uint16 or uint32.

        It cuts a plain array, which takes a fraction of the time that the np.memmap beneath takes.
        """
        tokens, starts = np.asarray(self.tokens), np.asarray(self.document_starts)
        return lambda i: tokens[starts[i] : starts[i + 1]]

    def require_whole(self) -> None:
        """Refuse files that are missing or do not fit the record.

        Only the beginning of a huge index is looked at.
        """
        require_size(self.path, self.num_tokens * np.dtype(self.dtype).itemsize)
        index = self.path.with_suffix(".idx")
        if not index.is_file():
            raise UserError(f"{index} is missing: {remedy(index.parent)}")
        try:
            starts = self.document_starts
            looked_at = starts[:OPEN_SCAN_TOKENS]
            is_right = (
                starts.shape == (self.num_documents + 1,)
                and starts.dtype == np.uint64
                and starts[0] == 0
                and starts[-1] == self.num_tokens
                and bool((looked_at[1:] >= looked_at[:-1]).all())
            )
        except Exception:  # numpy says of damaged files whatever its parsers meet
            is_right = False
        if not is_right:
            raise UserError(
                f"{index} is not the index of {self.num_documents} documents that the manifest "
                f"promises: {remedy(index.parent)}"
            )

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens start to stop - 1: (stop - start,) int64.

        Raises:
            UserError: if one of them is beyond the vocabulary.
        """
        tokens = self.tokens[start:stop].astype(np.int64)
        if tokens.size and tokens.max() >= self.vocab_size:
            at = int(np.argmax(tokens >= self.vocab_size))
            raise UserError(
                f"{self.path} holds token id {tokens[at]} at position {start + at}, but its "
                f"vocabulary ends at {self.vocab_size - 1}: the file is damaged; delete "
                f"{self.path.parent} and prepare it again"
            )
        return tokens

    def document(self, i: int) -> npt.NDArray[np.int64]:
        """Tokens of document i, its end of document included: (length,) int64."""
        return self.read(int(self.document_starts[i]), int(self.document_starts[i + 1]))

    def unigram_perplexity(self, start: int = 0, stop: int | None = None) -> float:
        """`unigram_perplexity` of tokens start to stop - 1."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        stop = self.num_tokens if stop is None else stop
        for first in range(start, stop, READ_TOKENS):
            tokens = self.read(first, min(first + READ_TOKENS, stop))
            counts += np.bincount(tokens, minlength=self.vocab_size)
        return unigram_perplexity(counts)


@dataclass(frozen=True)
class Prepared:
    """An opened prepared folder."""

    path: Path
    manifest: Manifest
    train: TokenSplit
    valid: TokenSplit

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary, loaded at the first access."""
        return load_tokenizer(self.path / self.manifest.tokenizer_file)

    def num_text_bytes(self, num_targets: int) -> int:
        """UTF-8 bytes of the first `num_targets` predicted tokens of the validation split.

        The bytes of the whole split were counted when it was made; for fewer targets the tokens are
        decoded and counted.
        """
        if num_targets >= self.valid.num_tokens - 1:
            return self.valid.record.num_bytes
        tokens = self.valid.read(1, 1 + num_targets)
        text = self.tokenizer.decode(tokens[tokens != self.tokenizer.eos_id].tolist())
        return len(text.encode())

    @property
    def fingerprint(self) -> str:
        """sha256 of vocabulary and tokens: equal for equal data, wherever it came from."""
        parts = [self.manifest.tokenizer_fingerprint, self.manifest.dtype]
        parts += [self.manifest.splits[split].sha256 for split in SPLITS]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a folder of running text.

    Raises:
        UserError: if the folder is missing, is a file, or was not made by `magnetar prepare`.
    """
    return manifest_of(path, Manifest, "magnetar prepare")


def open_prepared(path: Path) -> Prepared:
    """The data of a prepared folder; reads the manifest and maps the tokens.

    Raises:
        UserError: if the folder, the manifest or a file in it is missing, cut short, or does not
            fit the others.
    """
    manifest = read_manifest(path)
    require_vocabulary(path, manifest)
    if manifest.vocab_size > np.iinfo(manifest.dtype).max + 1:
        raise UserError(
            f"{path / 'manifest.json'}: dtype={manifest.dtype} is too small for "
            f"vocab_size={manifest.vocab_size}, which needs {token_dtype(manifest.vocab_size)}: "
            f"{remedy(path)}"
        )
    splits = []
    for name in SPLITS:
        record = manifest.splits.get(name)
        if record is None:
            raise UserError(f"{path / 'manifest.json'}: splits has no {name!r}: {remedy(path)}")
        split = TokenSplit(path / f"{name}.bin", record, manifest.dtype, manifest.vocab_size)
        split.require_whole()
        for start in range(0, min(record.num_tokens, OPEN_SCAN_TOKENS), READ_TOKENS):
            split.read(start, min(start + READ_TOKENS, record.num_tokens))
        splits.append(split)
    return Prepared(path, manifest, *splits)
