"""Sentence pairs as the config's run sees them: the bins of a step, and those of validation."""

from collections.abc import Iterator

import numpy as np

from magnetar.data.pairs.batches import PairBatches, ValidBins
from magnetar.data.pairs.folder import PreparedPairs
from magnetar.data.text.packed_lm import IGNORE_INDEX, Batch
from magnetar.engine.config.schema import RunConfig

# More rows than a bin has: row r of bin b has place b * MAX_BIN_ROWS + r in its step.
MAX_BIN_ROWS = 1 << 20


def training_bins(prepared: PreparedPairs, config: RunConfig) -> PairBatches:
    """The bins that training reads.

    Raises:
        UserError: a direction that the data does not have, or no pair that fits.
    """
    pairs = config.data.pairs
    assert pairs is not None
    return PairBatches(
        prepared,
        bin_tokens=pairs.bin_tokens,
        bins=config.deepspeed["train_batch_size"],
        temperature=pairs.temperature,
        directions=pairs.directions,
        seed=config.training.seed,
        max_len=config.data.seq_len,
        max_target_len=_max_target_len(config),
        too_long=pairs.too_long,
    )


def validation_bins(prepared: PreparedPairs, config: RunConfig) -> ValidBins:
    """The bins that validation asks about.

    Raises:
        UserError: see `training_bins`.
    """
    pairs = config.data.pairs
    assert pairs is not None
    return ValidBins(
        prepared,
        bin_tokens=pairs.bin_tokens,
        directions=pairs.directions,
        max_len=config.data.seq_len,
        max_target_len=_max_target_len(config),
        max_pairs=config.training.eval_sequences,
    )


def _max_target_len(config: RunConfig) -> int:
    return config.model.max_target_len or config.model.max_seq_len


def rank_bins(bins: ValidBins, rank: int, world_size: int) -> Iterator[Batch]:
    """A rank's validation bins. Every rank gets as many: those that share experts step together."""
    return (bins.bin(first + rank) for first in range(0, len(bins), world_size))


def target_perplexity(bins: ValidBins) -> float:
    """exp(entropy) of the frequencies of the bins' targets: what a model without order reaches."""
    counts = np.zeros(0, dtype=np.int64)
    for index in range(len(bins)):
        targets = bins.bin(index).targets
        found = np.bincount(targets[targets != IGNORE_INDEX], minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    frequencies = counts[counts > 0] / counts.sum()
    return float(np.exp(-(frequencies * np.log(frequencies)).sum()))
