"""Atomic writing of files, and of a folder that is made only once.

A folder is written as `OUT.partial` and renamed to `OUT` when it is complete. The settings that
determine its content are stored in it from the start: the same command resumes, and a command with
other settings starts over. A mistake of the user leaves no folder. A lock keeps a second process
out.
"""

import errno
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from magnetar.data.errors import UserError


def write_atomically(file: Path, text: str) -> None:
    """Write a text file, which appears only when it is complete."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text + "\n")
    temporary.replace(file)


HASHED_WHOLE_BYTES = 256 << 20  # larger sources are recognised by size and time of change


class Reporter(NamedTuple):
    """Two callbacks for a long task: a line to print, and progress in bytes."""

    message: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int, int], None] = lambda stage, done_bytes, all_bytes: None


SILENT = Reporter()


@contextmanager
def made_whole(
    out: Path, settings: dict[str, Any], workers: int, reporter: Reporter
) -> Iterator[Path]:
    """The unfinished folder, which becomes `out` at the end of the `with` block.

    Raises:
        UserError: the disk is full, another run writes there, a worker was killed, or a folder of
            that name is not ours.
    """
    partial = out.with_name(out.name + ".partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with (partial / "lock").open("w") as lock:
            _lock(lock, partial)
            _keep_or_clear(partial, settings, reporter)
            try:
                yield partial
            except UserError:  # the user will change the input, so nothing here can be resumed
                shutil.rmtree(partial)
                raise
            partial.rename(out)
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
    """Number of files, their bytes, and a checksum of names and contents."""
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
    """Raise unless `out` was made from the same settings."""
    key = _first_difference(made_from, settings)
    if key is not None:
        raise UserError(
            f"{out} was made with {key}={_short(made_from.get(key))}, not {_short(settings[key])}: "
            "choose another --out, or delete it first"
        )


def _first_difference(made_from: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """The first setting that differs; the same files may be named by other globs."""
    keys = [key for key in settings if key not in ("train", "valid")]
    return next((key for key in keys if made_from.get(key) != settings[key]), None)


def _short(value: Any) -> str:
    """A setting for a message."""
    if isinstance(value, dict):
        files, size, digest = value["num_files"], value["num_bytes"], value["sha256"]
        return f"({files} files, {size} bytes, sha256 {digest[:12]})"
    return repr(value)


def remove_scaffolding(out: Path) -> None:
    """Remove what only an unfinished folder needs; a kill in between leaves some files behind."""
    shutil.rmtree(out / "shards", ignore_errors=True)
    for name in ("settings.json", "lock"):
        (out / name).unlink(missing_ok=True)


def _lock(lock: IO[str], partial: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"another run is writing {partial}: wait for it, or choose another --out"
        ) from error


def _keep_or_clear(partial: Path, settings: dict[str, Any], reporter: Reporter) -> None:
    """Keep the work in `partial` if it has the same settings; clear it otherwise."""
    file = partial / "settings.json"
    others = [path for path in partial.iterdir() if path.name not in ("lock", "settings.json.tmp")]
    if file.is_file() and _first_difference(json.loads(file.read_text()), settings) is None:
        reporter.message(f"resuming {partial}")
        (partial / "shards").mkdir(exist_ok=True)
        return
    if others and not file.is_file():
        raise UserError(f"{partial} is not ours to clear: move it away, or choose another --out")
    if others:
        reporter.message(f"{partial} was begun with other settings: starting over")
    # The settings go last, so that a kill in here leaves a folder that is known to be ours.
    for path in sorted(others, key=lambda path: path == file):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    write_atomically(file, json.dumps(settings, indent=2))
    (partial / "shards").mkdir()
