"""Reading and writing of folders of weights, with checks before and after."""

import copy
import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track
from torch import Tensor

from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.format import MANIFEST, checkpoint_folders
from magnetar.engine.checkpoint.open_run import SavedModel, open_run
from magnetar.models.config import ModelConfig
from magnetar.models.weights.files import LazyTensors
from magnetar.models.weights.load_save import CONFIG_FILE, require_free, write_weights


def require_new(out: Path, source: Path | None = None) -> None:
    """Refuse an --out that cannot become a folder of its own.

    Args:
        out: new folder; it must not exist, or be empty, and not lie in the source or among a run's
            checkpoints.
        source: the folder that is converted.

    Raises:
        UserError: if something is in the way; it says what.
    """
    if out == Path():
        raise UserError(
            "--out is empty, or the folder that the command was started in: name a folder to make, "
            "such as converted/lm"
        )
    try:
        require_free(out)
    except ValueError as error:
        raise UserError(f"{error} with --out") from None
    place = Path(os.path.realpath(out))
    for folder in (place, *place.parents):
        if what := _taken_by(folder, source):
            raise UserError(f"{out}: {folder} is {what}: name a folder outside it with --out")
    nearest = next(folder for folder in place.parents if folder.exists())
    if not nearest.is_dir():
        raise UserError(f"{out}: {nearest} is a file: name a folder outside it with --out")
    try:
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        raise UserError(
            f"{out}: no folder can be made in {nearest} ({error.strerror}): name a place that you "
            "may write to with --out"
        ) from None


def _taken_by(folder: Path, source: Path | None) -> str | None:
    """A name for a folder that must not take other files, such as a run's; None for any other."""
    if source is not None and folder == Path(os.path.realpath(source)):
        return "what is converted"
    run = folder.parent
    if folder.name == "checkpoints" and (checkpoint_folders(run) or (run / CONFIG_FILE).is_file()):
        return "where a run keeps its checkpoints and removes old ones"
    if (folder / MANIFEST).is_file() and any(folder.glob("*.safetensors")):
        return "a checkpoint"
    return None


def watched(doing: str, names: Sequence[str]) -> Iterable[str]:
    """The names, with a progress bar if stderr is a terminal."""
    console = Console(stderr=True)
    return track(
        names, description=doing, console=console, transient=True, disable=not console.is_terminal
    )


def how_to_load(out: Path, architecture: str) -> list[str]:
    """Lines of Python that load a folder of weights."""
    tokens = "source, target" if architecture == "encoder_decoder" else "tokens"
    return [
        "from magnetar.models.weights.load_save import load_model",
        f"model = load_model({str(out)!r})",
        f"logits = model({tokens}).logits  # tokens: (batch, length) int64",
    ]


def how_to_train_on(config_file: Path, num_ranks: int) -> str:
    """The shell command that continues a run."""
    return shlex.join(["magnetar", "train", str(config_file), "--num_gpus", str(num_ranks)])


def how_to_start(weights: Path, model_keys: Mapping[str, Any]) -> str:
    """The shell arguments with which a run starts from a folder of weights.

    Args:
        weights: the folder.
        model_keys: keys of `magnetar.model` that the run must change, by dotted path.
    """
    values = [f"magnetar.model.{key}={json.dumps(value)}" for key, value in model_keys.items()]
    values.append(f"magnetar.training.init_from={weights}")
    return " ".join(f"--set {shlex.quote(value)}" for value in values)


def config_in(config: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """A run's config with its outputs in another folder."""
    moved, old = copy.deepcopy(dict(config)), config["magnetar"]["training"]["run_dir"]
    moved["magnetar"]["training"]["run_dir"] = str(run_dir)
    for monitor in ("tensorboard", "csv_monitor"):
        if (moved.get(monitor) or {}).get("output_path") == old:
            moved[monitor]["output_path"] = str(run_dir)
    return moved


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Whether float32 tensors are equal to the last bit, NaN included."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def open_whole(path: Path, out: Path, checkpoint: str | None = None) -> SavedModel:
    """A model to convert whose files are what was saved, and a free place for the result.

    Args:
        path: Folder of a run, of a checkpoint, or of weights.
        out: Folder to make; see `require_new`.
        checkpoint: Name of the run's checkpoint. None for the newest one.

    Raises:
        UserError: See `open_run`; or a file is damaged, or the folder holds something.
    """
    require_new(out, path)
    source = open_run(path, checkpoint)
    source.require_whole()
    return source


def write_folder(
    out: Path,
    config: ModelConfig,
    tensors: LazyTensors,
    shard_bytes: int | None,
    about: Mapping[str, Any] | None = None,
    other_files: Mapping[str, bytes] | None = None,
) -> None:
    """`write_weights`, with progress on a terminal.

    Raises:
        UserError: if the folder holds something, or the disk does not hold what was written.
    """
    try:
        write_weights(
            out,
            config,
            tensors,
            shard_bytes=shard_bytes,
            about=about,
            other_files=other_files,
            watch=watched,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def parse_size(text: str) -> int:
    """Number of bytes of a size such as 5GB, 500MB, 2GiB or 1000000.

    Raises:
        UserError: if the text is not a size, or the size is 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = found[2].upper() if found else ""
    size = float(found[1]) * _UNITS.get(unit, 1) if found else 0
    if size < 1 or (unit and unit not in _UNITS):
        raise UserError(
            f"--shard-size {text} is no size of a file: give bytes, or a number with KB, MB, GB, "
            "KiB, MiB or GiB, such as 5GB"
        )
    return int(size)


def checked_model(config: ModelConfig, changes: Mapping[str, Any], what: str) -> ModelConfig:
    """A model's config with changed keys.

    Args:
        config: the config to change.
        changes: new values of keys, in a JSON's types.
        what: start of the message.

    Raises:
        UserError: if the keys contradict each other or the rest of the model.
    """
    try:
        return ModelConfig.model_validate(config.model_dump(mode="json") | dict(changes))
    except ValidationError as error:
        problems = [
            ".".join(map(str, one["loc"])) + ": " * bool(one["loc"]) + one["msg"]
            for one in error.errors()
        ]
        listed = "\n  ".join(problem.replace("Value error, ", "") for problem in problems)
        raise UserError(f"{what}: {listed}") from None


def vocabulary_file(source: SavedModel) -> dict[str, bytes]:
    """Name and content of a model's tokenizer file. Empty if it is not where it was."""
    tokenizer = source.find_tokenizer(None, "--tokenizer")
    return {} if tokenizer is None else {tokenizer.file_name: tokenizer.file_content}
