"""The objectives of a masked language model and of a denoising encoder-decoder.

Letters: B rows, T seq_len, L tokens of one window.

A window has L tokens after its first one. EXACTLY max(1, round(p * L)) of them are masked, never
more or fewer by chance, so every batch of whole windows has the same number of targets. The
positions are a function of (seed, key) alone. In training the key is the global sample, so each
epoch masks anew. In validation it is the window, so every pass is the same.
"""

import math
from typing import Literal, NamedTuple

import numpy as np

from magnetar.data.text.packed_lm import (
    IGNORE_INDEX,
    Batch,
    BoolArray,
    IntArray,
    Rows,
    WordArray,
    mixed,
)

# Streams of random words; another constant than any that keys the order of the samples.
_SPANS, _STARTS, _REPLACEMENTS, _RANDOM_TOKENS = np.arange(1, 5, dtype=np.uint64) << np.uint64(48)


class Masking(NamedTuple):
    """How windows are masked.

    Attributes:
        probability: p, share of a window's tokens that is masked.
        mean_span_length: mean of the geometric distribution of a span's length (SpanBERT, arXiv
            1907.10529, which also cuts spans at 10); None: single tokens.
        replace: "bert" or "mask". With "bert" each masked token becomes the mask token (80 %), a
            random token (10 %) or stays (10 %). With "mask" all become the mask token.
    """

    probability: float
    mean_span_length: float | None
    replace: Literal["bert", "mask"]


def masked_lm(rows: Rows, seed: int, masking: Masking, vocab_size: int) -> Batch:
    """The objective of an encoder: predict the masked tokens of a window, and only those.

    Args:
        rows: the windows.
        seed: seed of the masks.
        masking: settings of the masks.
        vocab_size: size of the data's vocabulary; the mask token is the next id.
    """
    tokens, is_masked = _masked_windows(rows, seed, masking, vocab_size)
    targets = np.where(is_masked, rows.tokens[:, 1:], IGNORE_INDEX)
    return Batch((tokens, rows.padding) if rows.padding.any() else (tokens,), targets)


def denoising(rows: Rows, seed: int, masking: Masking, vocab_size: int) -> Batch:
    """The objective of an encoder-decoder: predict the whole window from the masked one."""
    source, _ = _masked_windows(rows, seed, masking, vocab_size)
    padding = rows.padding
    targets = np.where(padding, IGNORE_INDEX, rows.tokens[:, 1:])
    inputs = (source, np.where(padding, 0, rows.tokens[:, :-1]))
    return Batch((*inputs, padding, padding) if padding.any() else inputs, targets)


def _masked_windows(
    rows: Rows, seed: int, masking: Masking, vocab_size: int
) -> tuple[IntArray, BoolArray]:
    """Windows without their first token, masked, and the mask: (B, T) int64 and bool."""
    tokens = rows.tokens[:, 1:].copy()
    is_masked = np.zeros(tokens.shape, dtype=np.bool_)
    keys = mixed(rows.keys.astype(np.uint64) + mixed(np.array([seed % 2**64], dtype=np.uint64)))
    for row, (length, key) in enumerate(zip(rows.lengths, keys, strict=True)):
        if length:
            positions = masked_positions(int(length), masking, key)
            is_masked[row, positions] = True
            masked = tokens[row, positions]
            tokens[row, positions] = _replacements(masked, masking.replace, vocab_size, key)
    return tokens, is_masked


def num_masked(length: int, probability: float) -> int:
    """Number of masked tokens of a window of `length` tokens, from 1 to all."""
    return max(1, round(probability * length))


def masked_positions(length: int, masking: Masking, key: np.uint64) -> IntArray:
    """The masked positions among `length`: (num_masked,) int64, ascending.

    Single tokens are drawn without replacement. Spans begin at a position that is still free,
    each as likely as another, and are drawn until enough positions are covered; the last one is
    cut short, and so is one that meets the window's end.
    """
    left = num_masked(length, masking.probability)
    if masking.mean_span_length is None:
        # The positions of the smallest of `length` random words: a draw without replacement.
        return np.sort(np.argsort(_words(key, _STARTS, length), kind="stable")[:left])
    is_masked = np.zeros(length, dtype=np.bool_)
    # `left` spans are always enough, since each covers one position at least.
    sizes = _geometric(_words(key, _SPANS, left), masking.mean_span_length)
    for size, word in zip(sizes, _words(key, _STARTS, left), strict=True):
        free = np.flatnonzero(~is_masked)
        start = int(free[int(word) % len(free)])
        covered = start + np.flatnonzero(~is_masked[start : start + size])[:left]
        is_masked[covered] = True
        left -= len(covered)
        if not left:
            break
    return np.flatnonzero(is_masked)


def _geometric(words: WordArray, mean: float) -> IntArray:
    """Numbers from 1, P(n) = (1 - q)^(n - 1) q with q = 1 / mean, from uniform words."""
    if mean == 1:
        return np.ones(words.shape, dtype=np.int64)
    uniform = (words.astype(np.float64) + 0.5) / 2**64  # in (0, 1]
    exponents = np.log(uniform) / math.log1p(-1 / mean)
    return 1 + np.minimum(exponents, 2.0**40).astype(np.int64)  # no window is that long


def _replacements(
    tokens: IntArray, replace: Literal["bert", "mask"], vocab_size: int, key: np.uint64
) -> IntArray:
    """The tokens that replace the masked ones: (M,) int64."""
    masks = np.full_like(tokens, vocab_size)
    if replace == "mask":
        return masks
    choice = _words(key, _REPLACEMENTS, len(tokens)) % np.uint64(10)
    random = _words(key, _RANDOM_TOKENS, len(tokens)) % np.uint64(vocab_size)
    return np.select([choice < 8, choice < 9], [masks, random.astype(np.int64)], tokens)


def _words(key: np.uint64, stream: np.uint64, count: int) -> WordArray:
    """Random words, a function of key, stream and position: (count,) uint64."""
    positions: WordArray = np.arange(count, dtype=np.uint64)
    return mixed(mixed(np.array([key ^ stream])) + positions)
