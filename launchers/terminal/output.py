"""No print ends what runs: a letter that the terminal lacks, a closed pipe, a full disk."""

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO, cast


def prepare_output() -> None:
    """Print what a terminal lacks as `?`, and to nowhere what has nowhere to go."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by the shell; the next file that is opened would take its place
            os.open(os.devnull, os.O_RDWR)
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            mode = "w" if descriptor else "r"
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))
        elif descriptor and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if name == "stdout" else "backslashreplace")


class _Unfailing:
    """A stream whose writes never fail: what cannot be written is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write; the length of the text, whatever became of it."""
        with suppress(OSError, ValueError):  # ValueError: somebody has closed it
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def let_no_print_fail() -> None:
    """Go on without output from now on, if its reader ends or its disk is full.

    For what must not end with its terminal: a training, and its supervisor.
    """
    prepare_output()
    for name in ("stdout", "stderr"):
        if not isinstance(stream := getattr(sys, name), _Unfailing):
            setattr(sys, name, cast(TextIO, _Unfailing(stream)))
