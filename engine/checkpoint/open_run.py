"""A run that training has saved: its model and its data, opened again in one process."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from magnetar.data.errors import UserError
from magnetar.data.text.token_files import Prepared, open_prepared, read_manifest
from magnetar.data.text.tokenizer import Tokenizer, TokenizerFile, load_tokenizer
from magnetar.engine.checkpoint.exported_run import RUN_KEY, exported_run
from magnetar.engine.checkpoint.format import Checkpoint, complete_checkpoints, newest_checkpoint
from magnetar.engine.checkpoint.save_load import load_model
from magnetar.engine.config.schema import RunConfig, check_config
from magnetar.models.config import ModelConfig
from magnetar.models.transformer import EncoderDecoder, Transformer
from magnetar.models.weights import load_save as weights
from magnetar.models.weights.files import has_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHOWN_SIBLINGS = 5


def _device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class TrainedRun:
    """A checkpoint of a run, or what was exported of it, and the data it goes with.

    Attributes:
        name: the checkpoint's, or the exported folder's.
        step: optimizer steps done.
        config: the config that it was trained with.
        prepared: data of the vocabulary that it was trained with.
        load: reads the model.
    """

    name: str
    step: int
    config: RunConfig
    prepared: Prepared
    load: Callable[[], Transformer | EncoderDecoder]

    @cached_property
    def device(self) -> torch.device:
        """The GPU if there is one."""
        return _device()

    @cached_property
    def model(self) -> Transformer | EncoderDecoder:
        """The model, in the type that it was trained in."""
        return self.load().to(self.device, DTYPES[self.config.dtype])


def open_run(run_dir: Path, checkpoint: str | None = None, data: Path | None = None) -> TrainedRun:
    """A checkpoint of a run, and data for it.

    Args:
        run_dir: the run's folder, or one that `magnetar convert export` has made of it.
        checkpoint: name of the checkpoint; None: the newest complete one.
        data: a prepared folder; None: the one that the run read.

    Raises:
        UserError: for a folder that is no run, a checkpoint that is not there, or data that is
            missing or of another vocabulary.
    """
    if has_weights(run_dir) and checkpoint is None:
        return _open_exported(run_dir, data)
    chosen = choose_checkpoint(run_dir, checkpoint)
    config, problems = check_config(chosen.manifest["config"])
    if config is None:
        listed = "\n  ".join(problem.text for problem in problems)
        raise UserError(
            f"{chosen.path}: its config is not one that this version can read:\n  {listed}"
        )
    if config.data.pairs is not None:
        raise UserError(
            f"{run_dir} has learnt sentence pairs: use `magnetar translate {run_dir} "
            f"--from A --to B`, or `magnetar evaluate {run_dir}`"
        )
    trained_with = chosen.manifest["tokenizer_fingerprint"]
    prepared = _open_data(run_dir, config, trained_with, data)
    return TrainedRun(chosen.path.name, chosen.step, config, prepared, lambda: load_model(chosen))


def _open_exported(folder: Path, data: Path | None) -> TrainedRun:
    model, about = read_folder_config(folder)
    if RUN_KEY not in about:
        raise UserError(
            f"{folder} holds weights that no run has trained as they are: name a run, or what "
            "`magnetar convert export` has made of one"
        )
    run, config = exported_run(folder, model, about)
    prepared = _open_data(folder, config, run.tokenizer_fingerprint, data)
    return TrainedRun(folder.name, run.step, config, prepared, lambda: load_folder(folder))


def read_folder_config(folder: Path) -> tuple[ModelConfig, dict]:
    """The model of a folder of weights, and the further keys of its config.json."""
    try:
        return weights.read_config(folder)
    except ValueError as error:
        raise UserError(str(error)) from None


def load_folder(folder: Path) -> Transformer | EncoderDecoder:
    """The model of a folder of weights."""
    try:
        return weights.load_model(folder)
    except ValueError as error:
        raise UserError(str(error)) from None


def _open_data(run_dir: Path, config: RunConfig, trained_with: str, data: Path | None) -> Prepared:
    """Data of the vocabulary, given by its fingerprint, that a run was trained with."""
    path = data or Path(config.data.path)
    if data is None and not path.is_dir():
        raise UserError(
            f"prepared folder {path}, which {run_dir} was trained on and which holds its "
            "tokenizer, is not there: start the command where training was started, or copy the "
            "folder back"
        )
    prepared = open_prepared(path)
    if trained_with != prepared.manifest.tokenizer_fingerprint:
        raise UserError(
            f"{path} was made with another vocabulary (sha256 "
            f"{prepared.manifest.tokenizer_fingerprint[:12]}) than {run_dir} was trained with "
            f"({trained_with[:12]}): prepare it again with --tokenizer and "
            f"{_vocabulary_of(Path(config.data.path), trained_with)}"
        )
    return prepared


class TextModel(NamedTuple):
    """A model and the vocabulary of its tokens.

    Attributes:
        model: on the GPU if there is one.
        tokenizer: its vocabulary.
        device: where the model is.
    """

    model: Transformer | EncoderDecoder
    tokenizer: Tokenizer
    device: torch.device


def open_text_model(
    path: Path, checkpoint: str | None = None, data: Path | None = None
) -> TextModel:
    """A run's model, or that of a folder of weights, and its tokenizer.

    Args:
        path: a run's folder, or a folder of weights.
        checkpoint: name of the run's checkpoint; None: the newest complete one.
        data: a prepared folder, for its tokenizer; None: the one that the run read, or the
            tokenizer that lies beside the weights.

    Raises:
        UserError: see `open_run`; or for a folder of weights without a tokenizer, or with one
            that has more entries than the model.
    """
    if not has_weights(path) or checkpoint is not None:
        run = open_run(path, checkpoint, data)
        return TextModel(run.model, run.prepared.tokenizer, run.device)
    config, about = read_folder_config(path)
    files = [path / name for name in get_args(TokenizerFile) if (path / name).is_file()]
    if data is not None:
        tokenizer = open_prepared(data).tokenizer
    elif files:
        tokenizer = load_tokenizer(files[0])
    else:
        raise UserError(
            f"{path} holds no {' or '.join(get_args(TokenizerFile))}: give the prepared folder of "
            "its vocabulary with --data"
        )
    assert config.vocab_size is not None
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the vocabulary of {data or files[0]} has {tokenizer.vocab_size} entries, and the "
            f"model of {path} {config.vocab_size}: give the one that it was trained with"
        )
    model = load_folder(path)
    if RUN_KEY in about:  # as the run itself would answer
        model = model.to(DTYPES[exported_run(path, config, about)[1].dtype])
    return TextModel(model.to(_device()), tokenizer, _device())


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
    if name is not None and has_weights(run_dir):
        raise UserError(
            f"--checkpoint {name}: {run_dir} is a folder of weights, which holds one model: leave "
            "it out, or name a run"
        )
    if name is None:
        return newest_checkpoint(run_dir)
    found = {checkpoint.path.name: checkpoint for checkpoint in complete_checkpoints(run_dir)}
    if name not in found:
        raise UserError(
            f"--checkpoint {name}: {run_dir} has no such complete checkpoint: "
            + (f"use {' or '.join(found)}" if found else "it has none")
        )
    return found[name]
