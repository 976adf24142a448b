"""The frame of every conversion: a free place, a whole source, an atomic write, a report.

A conversion is a function of a source (see `open_run`), a new folder that must not exist or be
empty, and its own options. It returns its report in lines. What cannot be converted is a UserError:
a source that cannot be read or is damaged, a place that is taken, options that do not fit.
"""

import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.progress import track
from torch import Tensor

from magnetar.data.errors import UserError, all_problems
from magnetar.engine.checkpoint.format import MANIFEST, checkpoint_folders
from magnetar.engine.checkpoint.open_run import SavedModel, open_run
from magnetar.models.config import ModelConfig
from magnetar.models.weights.files import LazyTensors
from magnetar.models.weights.load_save import CONFIG_FILE, require_free, write_weights

_SHOWN_WARNINGS = 3


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


def open_whole(
    path: Path, out: Path, checkpoint: str | None = None, ema: bool = False
) -> SavedModel:
    """A model to convert whose files are what was saved, and a free place for the result.

    Args:
        path: Folder of a run, of a checkpoint, or of weights.
        out: Folder to make; see `require_new`.
        checkpoint: Name of the run's checkpoint. None for the newest one.
        ema: True for the average of the weights.

    Raises:
        UserError: See `open_run`; or a file is damaged, or the folder holds something.
    """
    require_new(out, path)
    source = open_run(path, checkpoint, ema=ema)
    source.require_whole()
    return source


def checked_model(keys: Mapping[str, Any], what: str) -> ModelConfig:
    """The config of a model.

    Args:
        keys: keys of `magnetar.model`.
        what: start of the message.

    Raises:
        UserError: if the keys contradict each other or the rest of the model.
    """
    try:
        return ModelConfig.model_validate(keys)
    except ValidationError as error:
        raise UserError(f"{what}: " + "\n  ".join(all_problems(error))) from None


def vocabulary_file(source: SavedModel) -> dict[str, bytes]:
    """Name and content of a model's tokenizer file. Empty if it is not where it was."""
    tokenizer = source.find_tokenizer(None, "--tokenizer")
    return {} if tokenizer is None else {tokenizer.file_name: tokenizer.file_content}


def write_folder(
    out: Path,
    config: ModelConfig,
    tensors: LazyTensors,
    rows: Sequence[tuple[str, str]],
    **further: Any,
) -> list[str]:
    """A report in lines, after `write_weights` with progress on a terminal.

    Args:
        out: new folder.
        config: config of the model.
        tensors: tensors of the model.
        rows: what the report says before the Python that loads the folder: labels and texts.
        further: shard_bytes, about and other_files of `write_weights`.
    """
    tensors, warnings = checked_numbers(tensors)
    write_weights(out, config, tensors, watch=watched, **further)
    inputs = "source, target" if config.architecture == "encoder_decoder" else "tokens"
    return [
        *aligned([*rows, *warning_rows(warnings)]),
        "",
        "from magnetar.models.weights.load_save import load_model",
        f"model = load_model({str(out)!r})",
        f"logits = model({inputs}).logits  # tokens: (batch, length) int64",
    ]


def checked_numbers(tensors: LazyTensors) -> tuple[LazyTensors, dict[str, str]]:
    """The same tensors, and a warning about each that has been read and is not finite."""
    warnings: dict[str, str] = {}

    def read(name: str) -> Tensor:
        tensor = tensors.read(name)
        if text := not_finite(tensor):
            warnings[name] = f"{name}: {text}"
        return tensor

    return LazyTensors(tensors.specs, read), warnings


def not_finite(values: Tensor) -> str:
    """How many numbers are NaN or infinite, in words; nothing if none is."""
    bad = values.numel() - int(values.isfinite().sum())
    return f"{bad:,} of {values.numel():,} values are not finite" if bad else ""


def warning_rows(warnings: Mapping[str, str]) -> list[tuple[str, str]]:
    """The first warnings as rows of a report, and the number of the others."""
    rows = [("warning", text) for text in list(warnings.values())[:_SHOWN_WARNINGS]]
    if more := len(warnings) - len(rows):
        rows.append(("warning", f"{more} more tensors have values that are not finite"))
    return rows


def aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each label and its text."""
    width = max(len(label) for label, _ in rows)
    return [f"{label:<{width}}  {text}" for label, text in rows]


def watched(doing: str, names: Sequence[str]) -> Iterable[str]:
    """The names, with a progress bar if stderr is a terminal."""
    console = Console(stderr=True)
    return track(
        names, description=doing, console=console, transient=True, disable=not console.is_terminal
    )


def how_to_start(weights: Path, model_keys: Mapping[str, Any]) -> str:
    """The shell arguments with which a run starts from a folder of weights.

    Args:
        weights: the folder.
        model_keys: keys of `magnetar.model` that the run must change, by dotted path.
    """
    values = [f"magnetar.model.{key}={json.dumps(value)}" for key, value in model_keys.items()]
    values.append(f"magnetar.training.init_from={weights}")
    return " ".join(f"--set {shlex.quote(value)}" for value in values)


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Number of bytes of a size such as 5GB, 500MB, 2GiB or 1000000.

    Raises:
        UserError: if the text is not a size, or the size is 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = found[2].upper() if found else ""
    size = float(found[1]) * _UNITS.get(unit, 1) if found else 0
    if not 1 <= size < 2**63 or (unit and unit not in _UNITS):
        raise UserError(
            f"--shard-size {text} is no size of a file: give bytes, or a number with KB, MB, GB, "
            "KiB, MiB or GiB, such as 5GB"
        )
    return int(size)
