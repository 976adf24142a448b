"""Lines of UTF-8 text, from files, from a pipe, or from the command line."""

import select
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from magnetar.data.errors import UserError

BYTE_ORDER_MARK = "\ufeff"
PAUSE = 0.2  # seconds without a line after which a pipe's lines are handed on


def sentences_of(text: str | None, files: Sequence[Path]) -> list[str] | None:
    """Every line of a text or of files; None if standard input is to be translated.

    Raises:
        UserError: a line is not UTF-8.
    """
    if text is not None:
        require_utf8(text, "--text", "give it in UTF-8")
        return text.removeprefix(BYTE_ORDER_MARK).split("\n")
    if not files:
        return None
    found: list[str] = []
    for file in files:
        with file.open("rb") as lines:
            found += lines_of(str(file), lines)
    return found


def require_utf8(text: str, name: str, way_out: str) -> None:
    """Refuse the surrogates with which Python replaces bytes that are not UTF-8.

    Raises:
        UserError: naming the character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not UTF-8 at character {error.start + 1}: {way_out}") from None


def lines_of(name: str, lines: Iterable[bytes]) -> Iterator[str]:
    """Lines of a file, without their ends.

    Raises:
        UserError: one of them is not UTF-8.
    """
    for number, line in enumerate(lines, start=1):
        yield decoded(name, number, line)


def decoded(name: str, number: int, line: bytes) -> str:
    """Line `number`, from 1, of a file, without its end; see `lines_of`."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}, line {number}, is not UTF-8 at byte {error.start + 1}: save it as UTF-8"
        ) from None
    if number == 1:
        text = text.removeprefix(BYTE_ORDER_MARK)
    return text.rstrip("\r\n")


def arriving(stream: IO[bytes]) -> Iterator[list[bytes]]:
    """The lines that a pipe brings; an empty list once at each pause."""
    rest = b""
    while True:
        if not select.select([stream], [], [], PAUSE)[0]:
            yield []
        chunk = stream.read1(1 << 16)  # type: ignore[attr-defined]
        if not chunk:
            break
        *lines, rest = (rest + chunk).split(b"\n")
        yield lines
    if rest:
        yield [rest]


def windows_of_input(stream: IO[bytes], size: int) -> Iterator[list[str]]:
    """Lines of standard input, at most `size` at a time, and fewer when it pauses or ends.

    Raises:
        UserError: one of them is not UTF-8; those before it may have come.
    """
    number, window = 0, list[str]()
    try:
        stream.fileno()
        groups = arriving(stream)
    except OSError:  # nothing that can pause
        groups = iter([list(stream)])
    for lines in groups:
        for line in lines:
            number += 1
            window.append(decoded("standard input", number, line))
            if len(window) == size:
                yield window
                window = []
        if not lines and window:
            yield window
            window = []
    if window:
        yield window
