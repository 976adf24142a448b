"""A prepared folder: it appears whole or not at all, and an interrupted preparation goes on.

Everything is written to `OUT.partial`, which is renamed to `OUT` when it is complete. The settings,
which determine the result, lie in it from the start: the same command resumes, and another one
starts over. After an error that a user has to mend the partial folder is removed. A lock lets only
one process at a time write there.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from magnetar.data.atomic import PARTIAL_SUFFIX, lock, rename_durably, sync_tree, write_atomically
from magnetar.data.errors import UserError

HASHED_WHOLE_BYTES = 256 << 20  # larger sources are recognised by size and time of change


class Reporter(NamedTuple):
    """Callbacks for what a person is told during the work.

    Attributes:
        message: Called with one line of text.
        progress: Called with the stage's name, the bytes done and the bytes in all.
    """

    message: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int, int], None] = lambda stage, done_bytes, all_bytes: None


SILENT = Reporter()


@contextmanager
def resumable_folder(
    out: Path, settings: dict[str, Any], workers: int, reporter: Reporter
) -> Iterator[Path]:
    """The partial folder, which is renamed to `out` at the end of the `with` block.

    Args:
        out: The folder to make.
        settings: All that determines the result, as JSON.
        workers: Number of processes that tokenise, for a message.
        reporter: Callbacks for what a person is told.

    Raises:
        UserError: The disk is full, another run writes there, a worker was killed, or the partial
            folder was made by something else.
    """
    partial = out.with_name(out.name + PARTIAL_SUFFIX)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            _keep_or_clear(partial, settings, reporter)
            try:
                yield partial
            except UserError:
                # The user will change the text or the settings, so no shard could be used again.
                shutil.rmtree(partial)
                raise
            sync_tree(partial)
            rename_durably(partial, out)
        remove_scaffolding(out)
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker was killed, probably for lack of memory, with workers={workers}: run "
            f"the same command with fewer --workers; {partial} keeps what was done"
        ) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"cannot write {error.filename or partial}: {error.strerror or error}: "
            f"{'free some space' if full else 'mend that'} and run the same command again; "
            f"{partial} keeps what was done"
        ) from error


def files_digest(files: Sequence[Path]) -> dict[str, Any]:
    """Number of files, their size in bytes, and a sha256 of their names and contents."""
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat()
        if stat.st_size <= HASHED_WHOLE_BYTES:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            content = str(stat.st_mtime_ns)
        digest.update(json.dumps([path.name, stat.st_size, content]).encode())
    num_bytes = sum(path.stat().st_size for path in files)
    return {"num_files": len(files), "num_bytes": num_bytes, "sha256": digest.hexdigest()}


def refuse_other(out: Path, made_from: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse a finished folder that other settings have made.

    Args:
        out: The finished folder.
        made_from: The settings it was made from.
        settings: The settings of this run.

    Raises:
        UserError: The settings differ. The message names the first that does.
    """
    key = _first_difference(made_from, settings)
    if key is not None:
        raise UserError(
            f"{out} was made with {key}={_short(made_from.get(key))}, not {_short(settings[key])}: "
            "choose another --out, or delete it first"
        )


def _first_difference(made_from: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """The first setting that differs.

    The globs are not compared: other globs may match the same files, whose digests are compared.
    """
    keys = [key for key in settings if key not in ("train", "valid")]
    return next((key for key in keys if made_from.get(key) != settings[key]), None)


def _short(value: Any) -> str:
    """A setting's value in a message."""
    if isinstance(value, dict):
        files, size, digest = value["num_files"], value["num_bytes"], value["sha256"]
        return f"({files} files, {size} bytes, sha256 {digest[:12]})"
    return repr(value)


def remove_scaffolding(out: Path) -> None:
    """Remove what only an unfinished folder needs. A kill in here costs nothing but disk space."""
    shutil.rmtree(out / "shards", ignore_errors=True)
    for name in ("settings.json", "lock"):
        (out / name).unlink(missing_ok=True)


def _locked(partial: Path) -> IO[str]:
    try:
        return lock(partial / "lock")
    except BlockingIOError as error:
        raise UserError(
            f"another run is writing {partial}: wait for it, or choose another --out"
        ) from error


def _is_of(settings: dict[str, Any], file: Path) -> bool:
    """Whether a settings.json holds these settings. One that cannot be read holds none."""
    try:
        return _first_difference(json.loads(file.read_text()), settings) is None
    except (FileNotFoundError, ValueError):
        return False


def _keep_or_clear(partial: Path, settings: dict[str, Any], reporter: Reporter) -> None:
    """Keep the finished shards of a run with the same settings; clear away those of another."""
    file = partial / "settings.json"
    own = ("lock", file.name + PARTIAL_SUFFIX)
    others = [path for path in partial.iterdir() if path.name not in own]
    if _is_of(settings, file):
        reporter.message(f"resuming {partial}")
        (partial / "shards").mkdir(exist_ok=True)
        return
    if others and not file.is_file():
        raise UserError(f"{partial} is not ours to clear: move it away, or choose another --out")
    if others:
        reporter.message(f"{partial} was begun with other settings: starting over")
    # The settings go last. After a kill in here they still say that the folder is ours.
    for path in sorted(others, key=lambda path: path == file):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    write_atomically(file, json.dumps(settings, indent=2) + "\n")
    (partial / "shards").mkdir()
