"""Whether a conversion can write the folder that --out names, asked before anything is read."""

import os
import tempfile
from pathlib import Path

from data.errors import UserError
from engine.checkpoint_files import MANIFEST, checkpoint_folders
from models.weights import CONFIG_FILE, require_free


def require_new(out: Path, source: Path | None = None) -> None:
    """Refuse an --out that cannot become a folder of its own.

    Args:
        out: must not exist, or be empty; not in the source, nor among a run's checkpoints.
        source: the folder that is converted.

    Raises:
        UserError: naming it, and what is in the way.
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
    """What a folder is that takes nothing else; None: it may."""
    if source is not None and folder == Path(os.path.realpath(source)):
        return "what is converted"
    run = folder.parent
    if folder.name == "checkpoints" and (checkpoint_folders(run) or (run / CONFIG_FILE).is_file()):
        return "where a run keeps its checkpoints and removes old ones"
    if (folder / MANIFEST).is_file() and any(folder.glob("*.safetensors")):
        return "a checkpoint"
    return None
