"""Weights to convert, in any place, read one tensor at a time."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.exported_run import RUN_KEY, exported_run
from magnetar.engine.checkpoint.format import (
    MANIFEST,
    Checkpoint,
    newest_checkpoint,
    read_checkpoint,
)
from magnetar.models.config import ModelConfig
from magnetar.models.weights.files import LazyTensors, Spec, has_weights
from magnetar.models.weights.load_save import (
    CONFIG_FILE,
    check_tensors,
    on_one_rank,
    open_weights,
    tensor_shapes,
)


@dataclass(frozen=True)
class Source:
    """A model's weights on disk.

    Attributes:
        path: a checkpoint's folder, or a folder of weights.
        config: the model's config, with all its experts on one rank.
        tensors: all tensors as they were saved, in the model's order; tied ones occur once.
        checkpoint: the checkpoint; None for a folder of weights.
    """

    path: Path
    config: ModelConfig
    tensors: LazyTensors
    checkpoint: Checkpoint | None = None


def open_source(path: Path) -> Source:
    """A run's newest checkpoint, a checkpoint's folder, or a folder of weights.

        Only names and shapes are checked here. `engine.checkpoint.format.require_whole` reads a
        checkpoint's files and compares their hashes.

    Raises:
        UserError: if the folder is none of these, or of another version; see also `exported_run`.
    """
    if (path / CONFIG_FILE).is_file() and not is_run(path):
        return _folder_of_weights(path)
    return source_of(find_checkpoint(path))


def _folder_of_weights(path: Path) -> Source:
    config, tensors, about = read_folder(path)
    if RUN_KEY in about:
        exported_run(path, config, about)  # refuses a config that contradicts itself
    return Source(path, on_one_rank(config), tensors)


def read_folder(path: Path) -> tuple[ModelConfig, LazyTensors, dict[str, Any]]:
    """The weights of a folder that the user named; `open_weights` with messages for the user.

    Raises:
        UserError: if `open_weights` raises ValueError, or a tensor that is read was altered.
    """
    try:
        config, tensors, about = open_weights(path)
    except ValueError as error:
        raise UserError(str(error)) from None

    def read(name: str) -> torch.Tensor:
        try:
            return tensors.read(name)
        except ValueError as error:
            raise UserError(str(error)) from None

    return config, LazyTensors(tensors.specs, read), about


def is_run(path: Path) -> bool:
    """Whether a folder is a run's."""
    return (path / "checkpoints").is_dir()


def find_checkpoint(path: Path) -> Checkpoint:
    """A run's newest checkpoint, or the checkpoint of a folder step_...

    Raises:
        UserError: if the folder is neither, or the run's newest checkpoint is damaged or missing.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no folder: name a run, a checkpoint step_..., or weights")
    if not is_run(path):
        if has_weights(path):
            raise UserError(
                f"{path} is a folder of weights, which are of no step and no layout: name a run, "
                "or a checkpoint step_..."
            )
        if not (path / MANIFEST).is_file():
            raise UserError(
                f"{path} holds neither checkpoints/ (a run) nor {MANIFEST} (a checkpoint) nor "
                f"{CONFIG_FILE} (weights): name a folder of one of these"
            )
        return read_checkpoint(path)
    return newest_checkpoint(path)


def source_of(checkpoint: Checkpoint) -> Source:
    """The weights of a checkpoint.

    Raises:
        UserError: if this version cannot read the model.
    """
    config = model_of(checkpoint)
    try:
        check_tensors(tensor_shapes(config), checkpoint.shapes)
    except ValueError as error:
        raise UserError(
            f"{checkpoint.path} was saved by a version with another model inside ({error}): use "
            "that version of Magnetar"
        ) from None
    specs = {name: Spec(torch.float32, shape) for name, shape in checkpoint.shapes.items()}
    tensors = LazyTensors(specs, checkpoint.tensor)
    return Source(checkpoint.path, config, tensors, checkpoint)


def model_of(checkpoint: Checkpoint) -> ModelConfig:
    """A checkpoint's model, all its experts on one rank; keys added since have their defaults.

    Raises:
        UserError: if this version does not know the model.
    """
    section = checkpoint.manifest["config"]["magnetar"]["model"]
    try:
        config = ModelConfig.model_validate_json(json.dumps(section))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("magnetar", "model", *first["loc"])))
        raise UserError(
            f"{checkpoint.path}: its model is not one that this version can read ({key}: "
            f"{first['msg']}): use the version of Magnetar that wrote it"
        ) from None
    return on_one_rank(config)
