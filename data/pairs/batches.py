"""Batches of sentence pairs by token budget, as a function of the bin's number.

Letters: n pairs of a direction in a table, w the table's weight, T temperature, R rows of a bin, S
and T' its padded source and target length.

A BIN holds pairs of similar lengths, of any directions, with R * (S + T') <= bin_tokens. Each
direction of each table is an endless STREAM of pairs, pass after pass. A pass holds each pair once,
in an order of its own. A ROUND takes the next pairs of every stream, sorts them by length, cuts
them into bins, and shuffles the bins. So, apart from an unfinished round, every pair of a stream
has been used equally often, give or take one. A direction is drawn in proportion to (sum of w *
n)^(1/T) over its tables, and each of its tables in proportion to w * n. A stream with less than one
pair a round has its turn only in some rounds.

Within a pass the lengths are spread evenly, in the same pattern each time. So the lengths in a
round, and the number of its bins, are known without shuffling. Any bin is found by counting through
the rounds before it (milliseconds each) and planning only its own round.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from magnetar.data.errors import UserError
from magnetar.data.pairs.codec import parse_direction
from magnetar.data.pairs.folder import PreparedPairs, TablePairs
from magnetar.data.text.packed_lm import (
    IGNORE_INDEX,
    Batch,
    IntArray,
    WordArray,
    mixed,
    sample_order,
)

LENGTH_MULTIPLE = 8  # of padded lengths: what tensor cores like, and few shapes
MAX_ROUND_PAIRS = 1 << 20
FloatArray = npt.NDArray[np.float64]
SmallArray = npt.NDArray[np.int32]
TooLong = Literal["drop", "truncate", "refuse"]


def padded(lengths: npt.ArrayLike, longest: int) -> IntArray:
    """Padded lengths in a bin; never more than the model's positions."""
    rounded = -(-np.asarray(lengths, dtype=np.int64) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return np.minimum(rounded, longest)


class PairOptions(NamedTuple):
    """Settings of the bins.

    Attributes:
        bin_tokens: largest value of rows * (source + target length) in a bin.
        temperature: T, 1 or more.
        directions: directions to learn, such as "en-de"; None: all.
        too_long: treatment of longer training pairs. A truncated side keeps its end.
        max_len: largest number of tokens of a source, tag and end included.
        max_target_len: largest number of tokens of a target, the end included.
    """

    bin_tokens: int
    temperature: float
    directions: Sequence[str] | None
    too_long: TooLong
    max_len: int
    max_target_len: int


class Stream:
    """The pairs of one direction of one table that bins are made of.

    Attributes:
        pairs: the pairs of the table.
        index: (n,) int64, indices into `pairs` of the pairs that are used.
        cells: (n,) int64, a number for each padded shape: equal for pairs that are padded alike.
    """

    def __init__(self, pairs: TablePairs, options: PairOptions):
        lengths = pairs.source.lengths[pairs.rows] + 1, pairs.target.lengths[pairs.rows]
        longest = options.max_len, options.max_target_len
        is_long = (lengths[0] > longest[0]) | (lengths[1] > longest[1])
        self.pairs = pairs
        self.num_too_long = int(is_long.sum())
        drops = options.too_long == "drop"
        self.index = np.flatnonzero(~is_long) if drops else np.arange(len(pairs))
        source, target = map(padded, (side[self.index] for side in lengths), longest)
        self.cells = snake(source, target)

    def __len__(self) -> int:
        return len(self.index)

    def lay_out(self, cells: IntArray) -> None:
        """Lay out the passes among the cells of all streams, ascending.

        Passes differ only in the order within a cell.
        """
        self._cell_of = np.searchsorted(cells, self.cells).astype(np.int32)  # (n,)
        self._sizes = np.bincount(self._cell_of, minlength=len(cells))
        cell, rank = spread_pattern(self._sizes)
        first = np.cumsum(self._sizes) - self._sizes
        self._pattern = cell.astype(np.int32)  # (n,) by place in the pass
        self._slot = (first[cell] + rank).astype(np.int32)  # (n,) place if cells came in turn

    def counts_before(self, place: int) -> IntArray:
        """Pairs of each cell before a place of the stream: (cells,) int64."""
        passes, rest = divmod(place, len(self))  # every pass has the same pattern
        part = np.bincount(self._pattern[:rest], minlength=len(self._sizes))
        return passes * self._sizes + part

    def drawn(self, start: int, stop: int, key: WordArray) -> tuple[IntArray, SmallArray]:
        """The pairs at places start to stop - 1 of the stream, and their cells."""
        blocks = [np.empty(0, dtype=np.int64)]
        size = len(self)
        for number in range(start // size, -(-stop // size)):
            word = mixed(key + np.uint64(number % 2**64))
            words = mixed(np.arange(size, dtype=np.uint64) + word)
            by_cell = np.lexsort((words, self._cell_of))  # another order within each cell
            first = max(start - number * size, 0)
            blocks.append(by_cell[self._slot[first : stop - number * size]])
        pairs = np.concatenate(blocks)
        return pairs, self._cell_of[pairs]


def snake(source: IntArray, target: IntArray) -> IntArray:
    """Numbers that sort pairs of padded lengths so that neighbours are alike in both.

    The order is by source length first. Within a source length it is by target length, alternately
    ascending and descending.
    """
    row = -(-source // LENGTH_MULTIPLE)
    up = row % 2 == 0
    # Source in the high 32 bits; target below, mirrored in every other row of source lengths.
    return source << 32 | np.where(up, target, (1 << 31) - target)


def unsnaked(cells: IntArray) -> tuple[IntArray, IntArray]:
    """Padded source and target lengths of `snake`'s numbers."""
    source, low = cells >> 32, cells & ((1 << 32) - 1)
    up = -(-source // LENGTH_MULTIPLE) % 2 == 0
    return source, np.where(up, low, (1 << 31) - low)


def spread_pattern(sizes: IntArray) -> tuple[IntArray, IntArray]:
    """A pass over cells of some sizes, each spread evenly over it.

    Args:
        sizes: (cells,) int64, pairs of each cell.

    Returns:
        Two (n,) int64 arrays over the places of the pass: the cell, and the number of its pairs
        before.
    """
    cell = np.repeat(np.arange(len(sizes)), sizes)
    rank = np.arange(len(cell)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within its cell
    # The i-th of n pairs of a cell belongs at (i + 1/2) / n of the pass.
    order = np.argsort((rank + 0.5) / np.repeat(sizes, sizes), kind="stable")
    return cell[order], rank[order]


def round_rates(
    weights: Sequence[float],
    sizes: Sequence[int],
    directions: Sequence[tuple[str, str]],
    temperature: float,
) -> FloatArray:
    """Pairs of each stream in a round, on average: (streams,) float64.

    Args:
        weights: w, weight of each stream's table.
        sizes: n, number of pairs of each stream.
        directions: source and target language of each stream.
        temperature: T.
    """
    masses = np.array(weights) / max(weights) * np.array(sizes, dtype=np.float64)
    same = np.array([[one == other for other in directions] for one in directions])
    # m * M^(1/T - 1): the tables of a direction share its M^(1/T) in proportion to their m.
    rates = masses * (same @ masses) ** (1 / temperature - 1)
    return rates / rates.sum() * min(MAX_ROUND_PAIRS, sum(sizes))


def cut_bins(cells: IntArray, counts: IntArray, bin_tokens: int) -> IntArray:
    """Cut pairs that are sorted by cell into bins.

    Args:
        cells: (cells,) int64, ascending, see `snake`.
        counts: (cells,) int64, number of pairs of each cell.
        bin_tokens: largest value of rows * (source + target length).

    Returns:
        (bins + 1,) int64, start of each bin among the pairs, and the end of the last.
    """
    sizes: list[IntArray] = []
    rows = longest_source = longest_target = 0
    lengths = zip(*(array.tolist() for array in unsnaked(cells)), counts.tolist(), strict=True)
    for source, target, count in lengths:
        left = count
        if rows and left:  # the open bin takes the pairs that fit
            wide = max(longest_source, source) + max(longest_target, target)
            taken = min(left, max(0, bin_tokens // wide - rows))
            if taken:
                longest_source = max(longest_source, source)
                longest_target = max(longest_target, target)
                rows, left = rows + taken, left - taken
        if left:
            capacity = bin_tokens // (source + target)
            assert capacity >= 1
            if rows:
                sizes.append(np.array([rows]))
            # Full bins of this cell at once; the rest, 1 to `capacity` pairs, opens a bin.
            sizes.append(np.full((left - 1) // capacity, capacity))
            rows = left - (left - 1) // capacity * capacity
            longest_source, longest_target = source, target
    if rows:
        sizes.append(np.array([rows]))
    return np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)


class _Bins:
    """What training and validation have in common.

    Attributes:
        directions: source and target language of every direction.
        num_too_long: number of pairs longer than the model reads.

    Raises:
        UserError: if a direction is unknown, there is no pair, a pair is too long and `too_long` is
            "refuse", or a bin does not hold the longest pair.
    """

    def __init__(self, prepared: PreparedPairs, split: str, options: PairOptions):
        self._codec, self._options = prepared.codec, options
        parts = prepared.tables[split]
        if options.directions is not None:
            known = prepared.languages
            asked = [parse_direction(direction, known) for direction in options.directions]
            for direction in asked:
                prepared.pairs(split, *direction)  # says what there is instead
            parts = [part for part in parts if part.direction in asked]
        streams = [Stream(part, options) for part in parts]
        self.directions = [*dict.fromkeys(part.direction for part in parts)]
        self.num_too_long = sum(stream.num_too_long for stream in streams)
        self._streams = [stream for stream in streams if len(stream)]
        are_longer = (
            f"{self.num_too_long} pairs of the {split} split of {prepared.path} are longer than "
            f"seq_len={options.max_len} or max_target_len={options.max_target_len} tokens"
        )
        if self.num_too_long and options.too_long == "refuse":
            raise UserError(f"{are_longer}: raise these, or let long pairs be dropped or truncated")
        if not self._streams:
            remedy = f"{are_longer}: raise these"
            if not self.num_too_long:
                remedy = (
                    "give `magnetar prepare-pairs` a file for it, --table NAME=TRAIN,VALID, and a "
                    "new --out"
                )
            raise UserError(f"{prepared.path} has no pair for the {split} split: {remedy}")
        cells = np.concatenate([stream.cells for stream in self._streams])
        widest = int(np.add(*unsnaked(cells)).max())
        if widest > options.bin_tokens:
            raise UserError(
                f"bin_tokens={options.bin_tokens} does not hold the longest pair of "
                f"{prepared.path}, which takes {widest} with its padding: use {widest} or more, or "
                "a smaller seq_len"
            )

    def _batch(self, streams: npt.NDArray[Any], pairs: npt.NDArray[Any]) -> Batch:
        """A batch of some pairs of some streams; a side that is cut keeps its end.

        Returns:
            Inputs and targets. Inputs are the arguments of EncoderDecoder.forward: source (R, S)
            and decoder input (R, T') int64, and the padding of both, bool. Targets: (R, T') int64.
        """
        codec = self._codec
        max_len, max_target_len = self._options.max_len, self._options.max_target_len
        rows = []
        for s, i in zip(streams.tolist(), pairs.tolist(), strict=True):
            stream = self._streams[s]
            rows.append((stream.pairs, int(stream.pairs.rows[stream.index[i]])))
        sources = [_cut(part.source.unchecked(row), max_len - 1) for part, row in rows]
        targets = [_cut(part.target.unchecked(row), max_target_len) for part, row in rows]
        source = _side_by_side(sources, max_len, codec.eos_id, first=1)
        source[:, 0] = [codec.tag_id(part.direction[1]) for part, _ in rows]
        asked = _side_by_side(targets, max_target_len, IGNORE_INDEX)
        if max(source.max(), asked.max()) >= codec.vocab_size:
            for part, row in rows:  # one of these says where
                part.source.document(row)
                part.target.document(row)
        decoder_input = np.full_like(asked, codec.eos_id)
        decoder_input[:, 1:] = np.where(asked[:, :-1] == IGNORE_INDEX, codec.eos_id, asked[:, :-1])
        lengths = np.array([[len(s) + 1, len(t)] for s, t in zip(sources, targets, strict=True)])
        source_padding = np.arange(source.shape[1]) >= lengths[:, :1]
        target_padding = np.arange(asked.shape[1]) >= lengths[:, 1:]
        return Batch((source, decoder_input, source_padding, target_padding), asked)


class PairBatches(_Bins):
    """The training bins of prepared pairs.

    Bin `index` of step `step` is a function of (seed, step, index), the pairs and the options
    alone. So the data depend neither on the number of ranks nor on accumulation, and resuming needs
    only the step.
    """

    def __init__(self, prepared: PreparedPairs, options: PairOptions, bins: int, seed: int):
        """Bins of the training split.

        Args:
            prepared: the pairs.
            options: settings of the bins.
            bins: number of bins of a step, over all ranks.
            seed: seed of the order.
        """
        super().__init__(prepared, "train", options)
        self.bins, self.seed = bins, seed
        weights = [stream.pairs.weight for stream in self._streams]
        of_streams = [stream.pairs.direction for stream in self._streams]
        sizes = [*map(len, self._streams)]
        self._rates = round_rates(weights, sizes, of_streams, options.temperature)
        self._cells = np.unique(np.concatenate([stream.cells for stream in self._streams]))
        for stream in self._streams:
            stream.lay_out(self._cells)
        self._first_bins = [0]  # of each round
        self._plan = lru_cache(maxsize=2)(self._planned)

    def bin(self, step: int, index: int) -> Batch:
        """Bin `index`, from 0 to bins - 1, of an optimizer step; see `_Bins._batch`."""
        assert 0 <= index < self.bins
        return self._batch(*self.pair_indices(step * self.bins + index))

    def pair_indices(self, number: int) -> tuple[SmallArray, SmallArray]:
        """Stream and pair of each row of a bin, (R,) each. Bins are numbered from 0."""
        # Rounds are only counted up to this bin, which takes no shuffling; one is planned.
        while self._first_bins[-1] <= number:
            num_bins = len(self._starts(len(self._first_bins) - 1)) - 1
            self._first_bins.append(self._first_bins[-1] + num_bins)
        which = int(np.searchsorted(self._first_bins, number, side="right")) - 1
        streams, pairs, starts = self._plan(which)
        place = number - self._first_bins[which]
        chosen = int(sample_order(place, len(starts) - 1, self.seed + which))
        rows = slice(starts[chosen], starts[chosen + 1])
        return streams[rows], pairs[rows]

    def _starts(self, which: int) -> IntArray:
        """The start of each bin of a round among its pairs."""
        counts = np.zeros(len(self._cells), dtype=np.int64)
        for stream, start, stop in zip(self._streams, *self._places(which), strict=True):
            counts += stream.counts_before(stop) - stream.counts_before(start)
        return cut_bins(self._cells, counts, self._options.bin_tokens)

    def _places(self, which: int) -> tuple[list[int], list[int]]:
        """The start and the end of a round in each stream."""
        # Rounding the running total, not the rate: a stream of 0.3 pairs a round gets 3 in 10.
        start, stop = (np.floor(self._rates * n + 0.5).astype(np.int64) for n in (which, which + 1))
        return start.tolist(), stop.tolist()

    def _planned(self, which: int) -> tuple[SmallArray, SmallArray, IntArray]:
        """Stream and pair of each row of a round in the order of the bins; starts of the bins."""
        cells, streams, pairs = list[SmallArray](), list[SmallArray](), list[SmallArray]()
        for s, (start, stop) in enumerate(zip(*self._places(which), strict=True)):
            found, of_cells = self._streams[s].drawn(start, stop, self._key(s))
            pairs.append(found.astype(np.int32))
            cells.append(of_cells)
            streams.append(np.full(len(found), s, dtype=np.int32))
        of_cell, of_stream, of_pair = map(np.concatenate, (cells, streams, pairs))
        # Pairs of a cell in an order of their own, so that directions mix in a bin.
        words = mixed(np.arange(len(of_cell), dtype=np.uint64) + mixed(self._key(-1 - which)))
        order = np.lexsort((words, of_cell))
        return of_stream[order], of_pair[order], self._starts(which)

    def _key(self, stream: int) -> WordArray:
        seed = mixed(np.array([self.seed % 2**64], dtype=np.uint64))
        return mixed(seed + np.array([stream % 2**64], dtype=np.uint64))


class ValidBins(_Bins):
    """The validation pairs in bins, each pair once."""

    def __init__(
        self, prepared: PreparedPairs, options: PairOptions, max_pairs: int | None = None
    ) -> None:
        """Bins of the validation split; longer pairs are truncated, so that every pair counts.

        Args:
            prepared: the pairs.
            options: settings of the bins.
            max_pairs: number of pairs of each direction of each table, from the start; None: all.
        """
        super().__init__(prepared, "valid", options._replace(too_long="truncate"))
        cells = [stream.cells[:max_pairs] for stream in self._streams]
        of_stream = np.repeat(np.arange(len(cells)), [*map(len, cells)])
        of_pair = np.concatenate([np.arange(len(found)) for found in cells])
        of_cell = np.concatenate(cells)
        order = np.argsort(of_cell, kind="stable")
        self._rows = of_stream[order], of_pair[order]
        self._starts = cut_bins(*np.unique(of_cell, return_counts=True), options.bin_tokens)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def bin(self, index: int) -> Batch:
        """Bin `index`, as `PairBatches.bin` returns it; a bin beyond the last has no targets."""
        start, stop = self._starts[index % len(self) :][:2]
        if index < len(self):
            return self._batch(*(rows[start:stop] for rows in self._rows))
        filling = self._batch(*(rows[start : start + 1] for rows in self._rows))
        return Batch(filling.inputs, np.full_like(filling.targets, IGNORE_INDEX))


def _cut(tokens: npt.NDArray[Any], longest: int) -> npt.NDArray[Any]:
    if len(tokens) <= longest:
        return tokens
    return np.concatenate([tokens[: longest - 1], tokens[-1:]])


def _side_by_side(
    texts: Sequence[npt.NDArray[Any]], longest: int, fill: int, first: int = 0
) -> IntArray:
    """Texts as the rows of one padded array, each from column `first` on."""
    width = int(padded(first + max(map(len, texts)), longest))
    rows = np.full((len(texts), width), fill, dtype=np.int64)
    for row, tokens in zip(rows, texts, strict=True):
        row[first : first + len(tokens)] = tokens
    return rows
