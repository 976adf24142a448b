"""A run that training has saved: its model and its data, opened again in one process."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from data.errors import UserError
from data.token_files import Prepared, open_prepared, read_manifest
from engine.checkpoint import load_model, newest_checkpoint
from engine.checkpoint_files import Checkpoint, complete_checkpoints
from engine.config import RunConfig, check_config
from models.transformer import EncoderDecoder, Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHOWN_SIBLINGS = 5


@dataclass(frozen=True)
class TrainedRun:
    """A checkpoint of a run and the data it goes with.

    Attributes:
        checkpoint: the checkpoint.
        config: the config that it was trained with.
        prepared: data of the vocabulary that it was trained with.
    """

    checkpoint: Checkpoint
    config: RunConfig
    prepared: Prepared

    @cached_property
    def device(self) -> torch.device:
        """The GPU if there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def model(self) -> Transformer | EncoderDecoder:
        """The model, in the type that it was trained in."""
        return load_model(self.checkpoint).to(self.device, DTYPES[self.config.dtype])


def open_run(run_dir: Path, checkpoint: str | None = None, data: Path | None = None) -> TrainedRun:
    """A checkpoint of a run, and data for it.

    Args:
        run_dir: the run's folder.
        checkpoint: name of the checkpoint; None: the newest complete one.
        data: a prepared folder; None: the one that the run read.

    Raises:
        UserError: for a folder that is no run, a checkpoint that is not there, or data that is
            missing or of another vocabulary.
    """
    chosen = choose_checkpoint(run_dir, checkpoint)
    config, problems = check_config(chosen.manifest["config"])
    if config is None:
        listed = "\n  ".join(problem.text for problem in problems)
        raise UserError(
            f"{chosen.path}: its config is not one that this version can read:\n  {listed}"
        )
    path = data or Path(config.data.path)
    if data is None and not path.is_dir():
        raise UserError(
            f"prepared folder {path}, which {run_dir} was trained on and which holds its "
            "tokenizer, is not there: start the command where training was started, or copy the "
            "folder back"
        )
    prepared = open_prepared(path)
    trained_with = chosen.manifest["tokenizer_fingerprint"]
    if trained_with != prepared.manifest.tokenizer_fingerprint:
        raise UserError(
            f"{path} was made with another vocabulary (sha256 "
            f"{prepared.manifest.tokenizer_fingerprint[:12]}) than {run_dir} was trained with "
            f"({trained_with[:12]}): prepare it again with --tokenizer and "
            f"{_vocabulary_of(Path(config.data.path), trained_with)}"
        )
    return TrainedRun(chosen, config, prepared)


def _vocabulary_of(folder: Path, fingerprint: str) -> str:
    """What to call the vocabulary that a run was trained with: its file, if that is still there."""
    try:
        manifest = read_manifest(folder)
    except UserError:
        manifest = None
    if manifest is None or manifest.tokenizer_fingerprint != fingerprint:
        return "the vocabulary that the run was trained with"
    return str(folder / manifest.tokenizer_file)


def choose_checkpoint(run_dir: Path, name: str | None) -> Checkpoint:
    """The checkpoint of a run by its name; None: the newest complete one.

    Raises:
        UserError: for a folder that is no run, or a checkpoint that is not there.
    """
    if not run_dir.is_dir():
        siblings = sorted(path.parent.name for path in run_dir.parent.glob("*/config.json"))
        shown = ", ".join(siblings[:SHOWN_SIBLINGS])
        if len(siblings) > SHOWN_SIBLINGS:
            shown += f", ... ({len(siblings)} runs)"
        there = f"{run_dir.parent} holds {shown}" if siblings else "train one first"
        raise UserError(f"run folder {run_dir} does not exist: {there}")
    if name is None:
        return newest_checkpoint(run_dir)
    found = {checkpoint.path.name: checkpoint for checkpoint in complete_checkpoints(run_dir)}
    if name not in found:
        raise UserError(
            f"--checkpoint {name}: {run_dir} has no such complete checkpoint: "
            + (f"use {' or '.join(found)}" if found else "it has none")
        )
    return found[name]
