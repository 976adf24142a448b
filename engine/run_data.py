"""The data of a run: windows of running text, or sentence pairs, as its config says."""

import json
from pathlib import Path
from typing import Any

from magnetar.data.errors import UserError
from magnetar.data.pairs.batches import PairBatches, ValidBins
from magnetar.data.pairs.folder import PreparedPairs, open_pairs
from magnetar.data.text.packed_lm import Batch, PackedLM, train_micro_batch
from magnetar.data.text.token_files import Prepared, open_prepared
from magnetar.engine.config.schema import RunConfig
from magnetar.engine.pair_data import target_perplexity, training_bins, validation_bins
from magnetar.engine.windows import unigram_perplexity, windows

RunData = Prepared | PreparedPairs
TrainingSet = PackedLM | PairBatches
ValidationSet = PackedLM | ValidBins


def open_run_data(config: RunConfig, path: Path | None = None) -> RunData:
    """The data of the kind that a config asks for.

    Args:
        config: the run's.
        path: in place of the config's.

    Raises:
        UserError: it is missing, damaged, or of the other kind.
    """
    path = path or Path(config.data.path)
    if _holds_pairs(path) != (config.data.pairs is not None) and (path / "manifest.json").is_file():
        if config.data.pairs is None:
            raise UserError(
                f"{path} holds sentence pairs, and magnetar.data.pairs is null, which is for "
                "running text: set magnetar.data.pairs ({} for its defaults), or name a folder of "
                "text"
            )
        raise UserError(
            f"{path} holds running text, and magnetar.data.pairs asks for sentence pairs: remove "
            "magnetar.data.pairs, or name a folder that magnetar prepare-pairs has made"
        )
    return open_prepared(path) if config.data.pairs is None else open_pairs(path)


def _holds_pairs(path: Path) -> bool:
    try:
        manifest: Any = json.loads((path / "manifest.json").read_bytes())
    except (OSError, ValueError):  # whoever opens the folder says what is wrong with it
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == "pairs"


def training_set(prepared: RunData, config: RunConfig) -> TrainingSet:
    """What training reads.

    Raises:
        UserError: there is too little, or what the config names is not there.
    """
    if isinstance(prepared, Prepared):
        return windows(prepared.train, config)
    return training_bins(prepared, config)


def validation_set(prepared: RunData, config: RunConfig) -> ValidationSet:
    """What validation asks about.

    Raises:
        UserError: see `training_set`.
    """
    if isinstance(prepared, Prepared):
        return windows(prepared.valid, config)
    return validation_bins(prepared, config)


def micro_batch(
    config: RunConfig,
    dataset: TrainingSet,
    step: int,
    micro_step: int,
    rank: int,
    world_size: int,
) -> Batch:
    """One rank's part of one micro-step of an optimizer step (from 1)."""
    if isinstance(dataset, PairBatches):
        return dataset.bin(step - 1, micro_step * world_size + rank)
    sizes = config.deepspeed
    return train_micro_batch(
        dataset,
        first_sample=(step - 1) * sizes["train_batch_size"],
        micro_step=micro_step,
        micro_batch_size=sizes["train_micro_batch_size_per_gpu"],
        rank=rank,
        world_size=world_size,
        seed=config.training.seed,
    )


def unigram_perplexity_of(
    prepared: RunData, valid: ValidationSet, config: RunConfig, num_tokens: int
) -> float:
    """That of the frequencies of the tokens that validation asks about.

    Args:
        prepared: the data.
        valid: its validation set.
        config: the run's.
        num_tokens: that validation asked about.
    """
    if isinstance(valid, ValidBins):
        return target_perplexity(valid)
    assert isinstance(prepared, Prepared)
    return unigram_perplexity(prepared, config, num_tokens)
