"""Folders of weights as conversions read and write them: checked before and after."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from convert.out_folder import require_new
from convert.progress import watched
from convert.sources import Source, open_source, source_of
from data.errors import UserError
from data.token_files import read_manifest
from data.tokenizer import Tokenizer, TokenizerFile, load_tokenizer
from engine.checkpoint_files import require_whole
from engine.trained_run import choose_checkpoint
from engine.translation_run import VOCABULARY
from models.config import ModelConfig
from models.weight_files import LazyTensors
from models.weights import write_weights

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def open_whole(path: Path, out: Path, checkpoint: str | None = None) -> Source:
    """A source whose files are what was saved, for a folder that is still to be made.

    Args:
        path: see `open_source`.
        out: see `require_new`.
        checkpoint: name of a checkpoint of the run; None: the newest complete one.

    Raises:
        UserError: see `open_source`; or if a file is damaged, or the folder holds something.
    """
    require_new(out, path)
    source = (
        open_source(path) if checkpoint is None else source_of(choose_checkpoint(path, checkpoint))
    )
    if source.checkpoint is not None:
        require_whole(source.checkpoint)
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
        UserError: if the folder holds something, or what was written is not what stands there.
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
    """Bytes of a size such as 5GB, 500MB, 2GiB or 1000000.

    Raises:
        UserError: if it is none, or nothing.
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
    """A model's config with other keys.

    Args:
        config: as it is.
        changes: keys in a JSON's types.
        what: the message begins with this.

    Raises:
        UserError: if they contradict each other, or what the model is.
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


def vocabulary(source: Source, given: Path | None = None) -> Tokenizer | None:
    """The tokenizer of a model, None if it is not where it was.

    Args:
        source: a folder that holds it, or the checkpoint of a run that says which data it read.
        given: where it is instead; see `load_tokenizer`.

    Raises:
        UserError: if it is another one than the run was trained with, or cannot be read.
    """
    place = given or _its_place(source)
    if place is None:
        return None
    tokenizer = load_tokenizer(place)
    if source.checkpoint is not None:
        trained_with = source.checkpoint.manifest["tokenizer_fingerprint"]
        if tokenizer.fingerprint != trained_with:
            raise UserError(
                f"{place} is another vocabulary (sha256 {tokenizer.fingerprint[:12]}) than "
                f"{source.path} was trained with ({trained_with[:12]}): give that one with "
                "--tokenizer"
            )
    return tokenizer


def _its_place(source: Source) -> Path | None:
    if source.checkpoint is None:
        files = [source.path / name for name in get_args(TokenizerFile)]
    else:
        data = source.checkpoint.manifest["config"]["magnetar"]["data"]
        prepared = Path(data["path"])
        if data.get("pairs"):  # the run's folder has the vocabulary, too
            run_dir = source.checkpoint.path.parents[1]
            files = [folder / VOCABULARY for folder in (run_dir, prepared)]
        elif (prepared / "manifest.json").is_file():
            files = [prepared / read_manifest(prepared).tokenizer_file]
        else:
            return None
    return next((file for file in files if file.is_file()), None)


def vocabulary_file(source: Source) -> dict[str, bytes]:
    """Name and content of a model's tokenizer file; nothing if it is not where it was."""
    tokenizer = vocabulary(source)
    return {} if tokenizer is None else {tokenizer.file_name: tokenizer.file_content}
