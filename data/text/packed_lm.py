"""Batches from a token file, as pure functions of the global sample index.

Letters: B batch_size, T seq_len, n windows in the split.

Documents follow one another, each closed by the end-of-document token, and are cut into windows
of T + 1 tokens that share their border token. The g-th sample that training ever reads is a
function of (seed, g) alone, so the order of the data depends neither on the number of ranks nor
on gradient accumulation, and resuming needs one number: the samples consumed so far.

The objective of a dataset turns windows into inputs and targets: `causal` here, two others in
    data/text/masked_lm.py.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from magnetar.data.errors import UserError
from magnetar.data.text.token_files import TokenSplit

IGNORE_INDEX = -100  # targets that do not count, as in torch.nn.functional.cross_entropy
NUM_FEISTEL_ROUNDS = 6

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
WordArray = npt.NDArray[np.uint64]


class Rows(NamedTuple):
    """Windows side by side.

    Attributes:
        tokens: (B, T + 1) int64, token ids; 0 past the end of a short window.
        lengths: (B,) int64, number of tokens after the first of each window; 0 in rows without one.
        keys: (B,) int64, the global sample g in training, the window in validation.
    """

    tokens: IntArray
    lengths: IntArray
    keys: IntArray

    @property
    def padding(self) -> BoolArray:
        """(B, T) bool, True where there is no token."""
        return np.arange(self.tokens.shape[1] - 1) >= self.lengths[:, None]


class Batch(NamedTuple):
    """The inputs of a model and its targets.

    Attributes:
        inputs: the arguments of the model's forward, each (B, T): tokens int64 and, only if
            something is padding, masks bool.
        targets: (B, T) int64, IGNORE_INDEX at positions that do not count.
    """

    inputs: tuple[npt.NDArray[Any], ...]
    targets: IntArray


Objective = Callable[[Rows, int], Batch]  # the second argument is the seed


def causal(rows: Rows, seed: int) -> Batch:
    """The objective of a decoder: predict each token from those before it. Draws nothing."""
    del seed
    padding = rows.padding
    targets = np.where(padding, IGNORE_INDEX, rows.tokens[:, 1:])
    inputs = np.where(padding, 0, rows.tokens[:, :-1])
    return Batch((inputs, padding) if padding.any() else (inputs,), targets)


class PackedLM:
    """The windows of T + 1 tokens of one split, with their objective.

    Raises:
        UserError: if the split is shorter than one window.
    """

    def __init__(self, split: TokenSplit, seq_len: int, objective: Objective = causal):
        if seq_len < 1:
            raise UserError(f"seq_len={seq_len} must be at least 1 token")
        if split.num_tokens < seq_len + 1:
            raise UserError(
                f"{split.path} has {split.num_tokens} tokens, but one sequence of "
                f"seq_len={seq_len} needs {seq_len + 1}: prepare more text, or use "
                f"a seq_len of at most {split.num_tokens - 1}"
            )
        self.split = split
        self.seq_len = seq_len
        self.objective = objective

    def __len__(self) -> int:
        return (self.split.num_tokens - 1) // self.seq_len

    def num_targets(self, max_sequences: int | None = None) -> int:
        """Number of tokens that `valid_batches` predicts.

        It is all but the first, or those of a few windows. A masked model predicts only some of
        them.
        """
        every = self.split.num_tokens - 1
        return every if max_sequences is None else min(every, max_sequences * self.seq_len)


def sample_order(index: npt.ArrayLike, num_samples: int, seed: int) -> IntArray:
    """The window of each global sample; every epoch has an order of its own.

    A keyed permutation (a Feistel network over the smallest power of four that holds n, walked
    until it lands below n), so memory is O(1) in n.

    Args:
        index: (...) global sample indices g, at least 0; g // n is the epoch.
        num_samples: n, windows in the split.
        seed: any integer.

    Returns:
        (...) int64 windows in [0, n).
    """
    flat = np.asarray(index, dtype=np.int64).reshape(-1)
    assert num_samples >= 1
    assert flat.size == 0 or flat.min() >= 0
    epoch, position = np.divmod(flat, num_samples)
    key = mixed(epoch.astype(np.uint64) + mixed(np.array([seed % 2**64], dtype=np.uint64)))
    # Two halves of equal width, so the network permutes a power of four, less than 4n on the whole.
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    word = position.astype(np.uint64)
    pending = np.ones(flat.shape, dtype=bool)
    while pending.any():
        # A word beyond n is permuted again. The cycle that it lies on leads back below n, and each
        # word below n is reached from one start only, so the result is a permutation of n.
        word[pending] = _feistel(word[pending], key[pending], half_bits)
        pending = word >= num_samples
    return word.astype(np.int64).reshape(np.shape(index))


def _feistel(word: WordArray, key: WordArray, half_bits: int) -> WordArray:
    """A bijection of the words of 2 * half_bits bits, another one for each key; all are (M,)."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = word >> shift, word & mask
    for round_index in range(NUM_FEISTEL_ROUNDS):
        round_key = mixed(key + np.uint64(round_index))
        # Invertible, whatever `mixed` is.
        left, right = right, left ^ (mixed(right + round_key) & mask)
    return (left << shift) | right


def mixed(x: WordArray) -> WordArray:
    """The finaliser of SplitMix64 (Steele et al., 2014): every input bit moves every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def train_micro_batch(
    dataset: PackedLM,
    first_sample: int,
    micro_step: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
) -> Batch:
    """One rank's part of one micro-step.

    Args:
        dataset: the training windows.
        first_sample: global index of the first sample of this optimizer step, which is the number
            of samples consumed before it.
        micro_step: index of the gradient accumulation step within the optimizer step, from 0.
        micro_batch_size: B, samples per rank.
        rank: this rank among the `world_size` ranks that read different data.
        world_size: number of such ranks.
        seed: seed of the order of the data and of the objective's draws.
    """
    start = first_sample + (micro_step * world_size + rank) * micro_batch_size
    index = np.arange(start, start + micro_batch_size)
    windows = sample_order(index, len(dataset), seed)
    return dataset.objective(_rows(dataset, windows, index), seed)


def window_batch(dataset: PackedLM, windows: Sequence[int]) -> Batch:
    """The validation batch of these windows."""
    index = np.array(windows, dtype=np.int64)
    return dataset.objective(_rows(dataset, index, index), 0)


def _rows(dataset: PackedLM, windows: IntArray, keys: IntArray) -> Rows:
    """Windows side by side; the last may be short, and those beyond the split are empty."""
    seq_len, num_tokens = dataset.seq_len, dataset.split.num_tokens
    tokens = np.zeros((len(windows), seq_len + 1), dtype=np.int64)
    lengths = np.zeros(len(windows), dtype=np.int64)
    for row, start in enumerate((windows * seq_len).tolist()):
        if start < num_tokens - 1:
            found = dataset.split.read(start, min(start + seq_len + 1, num_tokens))
            tokens[row, : len(found)], lengths[row] = found, len(found) - 1
    return Rows(tokens, lengths, keys)


def valid_batches(
    dataset: PackedLM,
    batch_size: int,
    rank: int,
    world_size: int,
    max_sequences: int | None = None,
) -> Iterator[Batch]:
    """One rank's batches of a validation pass; over all ranks each window counts exactly once.

    Every rank gets the same number of batches, because ranks that share experts must step
    together. The filling of the last window and of the last rows has the target IGNORE_INDEX. The
    draws of an objective are a function of (0, window), so every pass is the same.

    Args:
        dataset: the validation windows. Every token but the split's first is in one of them.
        batch_size: B, samples per rank.
        rank: this rank among the `world_size` ranks that read different data.
        world_size: number of such ranks.
        max_sequences: number of windows to read, from the first; None: the whole split.
    """
    # Rounded up: the last window may be short.
    num_windows = -(-(dataset.split.num_tokens - 1) // dataset.seq_len)
    if max_sequences is not None:
        num_windows = min(num_windows, max_sequences)
    for first in range(0, num_windows, batch_size * world_size):
        index = first + rank * batch_size + np.arange(batch_size)
        windows = np.where(index < num_windows, index, len(dataset) + 1)  # which is beyond
        yield dataset.objective(_rows(dataset, windows, index), 0)
