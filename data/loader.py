"""The data of a run, for training and validation: running text or sentence pairs.

`TextData` and `PairData` have the same methods, so the engine never asks which of the two it has.

| | TextData | PairData |
|---|---|---|
| a sample of a batch | a window of seq_len tokens | a bin of sentence pairs |
| made by | data/text/packed_lm.py | data/pairs/batches.py |
| what is asked | the next token, or masked tokens | the tokens of the translation |
| tokens of the run | the places of its windows | the targets that it has seen |
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from magnetar.data.errors import UserError
from magnetar.data.pairs.batches import PairBatches, PairOptions, ValidBins
from magnetar.data.pairs.codec import Codec, parse_direction
from magnetar.data.pairs.folder import PreparedPairs, Texts, open_pairs
from magnetar.data.prepared_folder import read_json
from magnetar.data.text.masked_lm import Masking, denoising, masked_lm
from magnetar.data.text.packed_lm import (
    IGNORE_INDEX,
    Batch,
    Objective,
    PackedLM,
    causal,
    train_micro_batch,
    valid_batches,
    window_batch,
)
from magnetar.data.text.token_files import Prepared, open_prepared, unigram_perplexity
from magnetar.data.text.tokenizer import Tokenizer, load_tokenizer

# More rows than any bin has: row r of bin b has the place b * MAX_BIN_ROWS + r in its step.
MAX_BIN_ROWS = 1 << 20
STEPS_AHEAD = 4  # steps whose batches are made before they are asked for

Architecture = Literal["decoder", "encoder", "encoder_decoder"]


@dataclass(frozen=True)
class DataOptions:
    """What the loader needs of a run's config.

    Attributes:
        architecture: the model's; it decides what is asked about a window of text.
        seq_len: tokens of a window, or of the longest source sentence.
        train_batch_size: samples of an optimizer step over all ranks.
        micro_batch_size: samples of a micro-batch on one rank.
        seed: seed of the order of the samples and of the masks.
        eval_sequences: number of validation windows, or of validation pairs of each direction;
            None for all.
        masking: settings of the masks; None for a decoder and for pairs.
        pairs: settings of the sentence pairs; None for text.
    """

    architecture: Architecture
    seq_len: int
    train_batch_size: int
    micro_batch_size: int
    seed: int
    eval_sequences: int | None = None
    masking: Masking | None = None
    pairs: PairOptions | None = None


class ToTranslate(NamedTuple):
    """Validation sentences whose translation is scored, and their vocabulary."""

    codec: Codec
    texts: Texts


class RunData(ABC):
    """The data of a run; `TextData` and `PairData` fill in what differs between the two.

    Attributes:
        path: the prepared folder.
        manifest: content of its manifest.json.
        vocab_size: entries of the vocabulary.
        fingerprint: sha256 of vocabulary and tokens.
        sample_words: a sample's size in words.
        asked_tokens: the tokens that a loss is the mean over, in words.
        tokens_per_step: tokens of an optimizer step; None if they differ and are to be counted.
        max_rows: upper bound of a micro-batch's rows; None if all have the same number.
        directions: translation directions of the validation split; text has none.
        run_files: files that the run's folder keeps a copy of.
    """

    sample_words: str
    asked_tokens: str
    tokens_per_step: int | None = None
    max_rows: int | None = None
    directions: Sequence[tuple[str, str]] = ()
    run_files: Sequence[str] = ()

    def __init__(self, prepared: Prepared | PreparedPairs, options: DataOptions) -> None:
        self.path, self.manifest = prepared.path, prepared.manifest
        self.vocab_size, self.fingerprint = self.manifest.vocab_size, prepared.fingerprint
        self.options = options

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary, loaded at its first use."""
        return load_tokenizer(self.path / self.manifest.tokenizer_file)

    @abstractmethod
    def micro_batch(self, step: int, micro_step: int, rank: int, world_size: int) -> Batch:
        """One rank's part of one micro-step (from 0) of an optimizer step (from 1)."""

    @abstractmethod
    def valid_batches(self, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
        """One rank's validation batches, of `batch_size` windows; a bin of pairs is a batch.

        Every rank gets the same number, since ranks that share experts step together.
        """

    @abstractmethod
    def unigram_perplexity(self, num_tokens: int) -> float:
        """Perplexity of a model that knows only the frequencies of the tokens asked about."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Lines about the data, by their titles."""

    def predicted_bytes(self) -> int | None:
        """UTF-8 bytes of the text that validation predicts; None if bits per byte mean nothing."""
        return None

    def to_translate(self, max_sentences: int) -> ToTranslate | None:
        """The first validation sentences of each direction; None for text."""
        return None

    def beginnings(self, count: int, length: int) -> list[list[int]]:
        """The first `length` tokens of up to `count` validation documents, all different."""
        return []

    def example_windows(self, count: int) -> Batch | None:
        """Up to `count` validation windows from all over the split; None for pairs."""
        return None


class TextData(RunData):
    """Running text in windows of seq_len tokens."""

    def __init__(self, prepared: Prepared, options: DataOptions) -> None:
        super().__init__(prepared, options)
        self.prepared = prepared
        self.sample_words = f"{options.seq_len} tokens"
        self.asked_tokens = "masked tokens" if options.architecture == "encoder" else "tokens"
        self.tokens_per_step = options.train_batch_size * options.seq_len
        self._objective = objective(options.architecture, options.masking, self.vocab_size)

    @cached_property
    def train(self) -> PackedLM:
        """The training windows."""
        return PackedLM(self.prepared.train, self.options.seq_len, self._objective)

    @cached_property
    def valid(self) -> PackedLM:
        """The validation windows, which are all that evaluation needs."""
        return PackedLM(self.prepared.valid, self.options.seq_len, self._objective)

    def micro_batch(self, step: int, micro_step: int, rank: int, world_size: int) -> Batch:
        """Windows in the order of the seed."""
        return train_micro_batch(
            self.train,
            first_sample=(step - 1) * self.options.train_batch_size,
            micro_step=micro_step,
            micro_batch_size=self.options.micro_batch_size,
            rank=rank,
            world_size=world_size,
            seed=self.options.seed,
        )

    def valid_batches(self, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
        """Windows in the order of the file."""
        limit = self.options.eval_sequences
        return valid_batches(self.valid, batch_size, rank, world_size, limit)

    def predicted_bytes(self) -> int | None:
        """None if the model has seen the text with masks: it then has no probability."""
        if self.options.masking is not None:
            return None
        return self.prepared.num_text_bytes(self.valid.num_targets(self.options.eval_sequences))

    def unigram_perplexity(self, num_tokens: int) -> float:
        """The frequencies are those of all tokens that can be asked about."""
        # A decoder and an encoder-decoder predict all tokens but the first.
        stop = None if self.options.architecture == "encoder" else 1 + num_tokens
        return self.prepared.valid.unigram_perplexity(1, stop)

    def describe(self) -> dict[str, str]:
        """The number of tokens, and how they are masked."""
        size = f"{self.prepared.train.num_tokens:,} tokens"
        lines = {"data": f"{self.path}: {size}, vocabulary {self.vocab_size:,}"}
        if (masking := self.options.masking) is not None:
            unit = "tokens"
            if masking.mean_span_length is not None:
                unit = f"tokens in spans of {masking.mean_span_length:g} on average"
            lines["masking"] = f"{masking.probability:.1%} of the {unit}, {masking.replace}"
        return lines

    def beginnings(self, count: int, length: int) -> list[list[int]]:
        """The documents' in the order of the file."""
        valid, found = self.prepared.valid, list[list[int]]()
        for index in range(valid.num_documents):
            beginning = valid.document(index)[:length].tolist()
            if len(beginning) == length and beginning not in found:
                found.append(beginning)
            if len(found) == count:
                break
        return found

    def example_windows(self, count: int) -> Batch | None:
        """Windows at equal distances."""
        every = max(1, len(self.valid) // count)
        return window_batch(self.valid, range(0, len(self.valid), every)[:count])


class PairData(RunData):
    """Sentence pairs in bins of like lengths."""

    asked_tokens = "target tokens"
    max_rows = MAX_BIN_ROWS

    def __init__(self, prepared: PreparedPairs, options: DataOptions) -> None:
        super().__init__(prepared, options)
        assert options.pairs is not None
        self.prepared, self.pairs = prepared, options.pairs
        self.sample_words = f"{self.pairs.bin_tokens:,} places for pairs"
        self.directions = prepared.directions("valid")
        self.run_files = (prepared.manifest.tokenizer_file,)  # all that translating needs
        self.train = PairBatches(prepared, self.pairs, options.train_batch_size, options.seed)
        self.valid = ValidBins(prepared, self.pairs, options.eval_sequences)

    def micro_batch(self, step: int, micro_step: int, rank: int, world_size: int) -> Batch:
        """One bin."""
        return self.train.bin(step - 1, micro_step * world_size + rank)

    def valid_batches(self, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
        """Bin after bin; those beyond the last ask for nothing."""
        del batch_size
        return (self.valid.bin(first + rank) for first in range(0, len(self.valid), world_size))

    def unigram_perplexity(self, num_tokens: int) -> float:
        """The frequencies are those of the targets of all bins."""
        del num_tokens
        counts = np.zeros(0, dtype=np.int64)
        for index in range(len(self.valid)):
            targets = self.valid.bin(index).targets
            found = np.bincount(targets[targets != IGNORE_INDEX], minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
        return unigram_perplexity(counts)

    def describe(self) -> dict[str, str]:
        """The numbers of languages and directions, and of pairs that are too long."""
        done = {"drop": "dropped", "truncate": "truncated"}.get(self.pairs.too_long, "")
        counts = (
            (self.train.num_too_long, "pairs", done),
            (self.valid.num_too_long, "validation pairs", "truncated"),
        )
        too_long = "; ".join(f"{count:,} {what}, {how}" for count, what, how in counts if count)
        size = f"{len(self.prepared.languages)} languages, {len(self.train.directions)} directions"
        lines = {"too long": too_long} if too_long else {}
        return lines | {"data": f"{self.path}: {size}, vocabulary {self.vocab_size:,}"}

    def to_translate(self, max_sentences: int) -> ToTranslate | None:
        """The sentences of the directions that are learned."""
        directions = None
        if self.pairs.directions is not None:
            known = self.prepared.languages
            directions = [parse_direction(name, known) for name in self.pairs.directions]
        texts = self.prepared.texts("valid", directions, max_sentences)
        return ToTranslate(self.prepared.codec, texts)


def objective(architecture: Architecture, masking: Masking | None, vocab_size: int) -> Objective:
    """What a model of this architecture learns from windows of this vocabulary."""
    if architecture == "decoder":
        return causal
    assert masking is not None
    asked = masked_lm if architecture == "encoder" else denoising
    return partial(asked, masking=masking, vocab_size=vocab_size)


def open_data(path: Path, options: DataOptions) -> RunData:
    """The data of a run, checked to be enough for training and validation.

    Raises:
        UserError: the folder is missing, damaged or of the other kind, or holds too little.
    """
    prepared = open_folder(path, holds_pairs=options.pairs is not None)
    if not isinstance(prepared, Prepared):
        return PairData(prepared, options)
    data = TextData(prepared, options)
    _ = data.train, data.valid  # made now, so that a split that is too short is refused here
    return data


def open_folder(path: Path, holds_pairs: bool) -> Prepared | PreparedPairs:
    """A prepared folder of text, or of sentence pairs.

    Raises:
        UserError: the folder is missing, damaged or of the other kind.
    """
    manifest = read_json(path / "manifest.json")
    if manifest and (manifest.get("kind") == "pairs") != holds_pairs:
        if not holds_pairs:
            raise UserError(
                f"{path} holds sentence pairs, and magnetar.data.pairs is null, which is for "
                "running text: set magnetar.data.pairs ({} for its defaults), or name a folder of "
                "text"
            )
        raise UserError(
            f"{path} holds running text, and magnetar.data.pairs asks for sentence pairs: remove "
            "magnetar.data.pairs, or name a folder that magnetar prepare-pairs has made"
        )
    return open_pairs(path) if holds_pairs else open_prepared(path)


class TrainingBatches:
    """One rank's micro-batches of any optimizer step, made ahead by a thread.

    The samples of a step follow from its number alone, so those of the next steps are made while
    the device computes.
    """

    def __init__(
        self,
        data: RunData,
        num_micro_steps: int,
        rank: int,
        world_size: int,
        to_host: Callable[[Any], Any] = lambda array: array,
        to_device: Callable[[Any], Any] = lambda array: array,
    ) -> None:
        """Take the data; from now on only the thread draws from its training split.

        Args:
            data: the run's data.
            num_micro_steps: gradient_accumulation_steps.
            rank: this rank.
            world_size: number of ranks.
            to_host: conversion of each array in the thread.
            to_device: conversion of each array when its step begins.
        """
        self._data, self._num_micro_steps = data, num_micro_steps
        self._ranks = rank, world_size
        self._to_host, self._to_device = to_host, to_device
        self._thread = ThreadPoolExecutor(1, "batches")
        self._made: dict[int, Future[list[Batch]]] = {}

    def of_step(self, step: int) -> list[tuple[tuple[Any, ...], Any]]:
        """The micro-batches of a step (from 1): the model's inputs, and the targets."""
        wanted = range(step, step + STEPS_AHEAD + 1)
        self._made = {
            number: self._made.get(number) or self._thread.submit(self._make, number)
            for number in wanted
        }
        return [
            (tuple(map(self._to_device, inputs)), self._to_device(targets))
            for inputs, targets in self._made[step].result()
        ]

    def _make(self, step: int) -> list[Batch]:
        made = []
        for micro_step in range(self._num_micro_steps):
            batch = self._data.micro_batch(step, micro_step, *self._ranks)
            inputs = tuple(map(self._to_host, batch.inputs))
            made.append(Batch(inputs, self._to_host(batch.targets)))
        return made
