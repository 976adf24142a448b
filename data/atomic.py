"""Atomic writes and locks: the one place that knows how a file or a folder becomes durable.

An atomic write leaves the old content or the new one, and never half of either, whether the process
is killed or the power fails. It takes four steps: write a partial file in the same folder, fsync
it, rename it, and fsync the folder, which holds the name.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

PARTIAL_SUFFIX = ".partial"


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which has the name `path` from the end of the block on.

    Raises:
        OSError: if it cannot be written. The error names `path`. The old content stays, and nothing
            else is left.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename_durably(partial, path)
    except OSError as error:
        # An error of an open file has no name; another file's has its own.
        if error.errno is None or error.filename not in (None, str(partial)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the content of a file, which need not exist; see `atomic_file`. Text is UTF-8."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def rename_durably(old: Path, new: Path) -> None:
    """Rename a file or a folder whose content is on the disk; a file that is there is replaced."""
    os.replace(old, new)
    sync(new.parent)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, which is renamed at the end; an error leaves nothing behind.

    Args:
        folder: The folder to make. It must not exist, or be empty.

    Raises:
        OSError: if the folder cannot be written. The error names it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    parent = ""
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as parent:
            partial = Path(parent, "whole")
            partial.mkdir()
            yield partial
            sync_tree(partial)
            rename_durably(partial, folder)
    except OSError as error:
        # An error of an open file has no name, and others name the temporary folder.
        name = str(error.filename or "")
        if error.errno is None or (name and parent and not name.startswith(parent)):
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until everything in a folder is on the disk."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def lock(path: Path) -> IO[str]:
    """Lock a file for this process, without waiting.

    Args:
        path: The file, which is made if it does not exist.

    Returns:
        The open file. The lock ends when the file is closed or the process ends.

    Raises:
        BlockingIOError: if another process holds the lock.
    """
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def append(path: Path, content: str | bytes) -> None:
    """Append to a file, which is made if there is none.

    Raises:
        OSError: if it cannot be written. The error names the file, whose content is as it was.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.lseek(descriptor, 0, os.SEEK_END)
        rest = content.encode() if isinstance(content, str) else content
        try:
            # Several processes write a logbook, so this is one write, if the disk takes it whole.
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(descriptor, size)
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
