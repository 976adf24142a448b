"""The ranks' command line in a form that no shell reads.

For other machines DeepSpeed's launcher joins its command with blanks. Their shells then read
quotes, braces, dollars and blanks anew, and pdsh itself replaces %h, %n and %u.
"""

import base64
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence

from magnetar.data.errors import UserError

_OPTION = "--words"
_PLAIN = re.compile(r"(?!=)[A-Za-z0-9_@+=:,./-]+")  # zsh reads =WORD as the path of a program
# Variables that DeepSpeed hands on begin so. It puts their values between double quotes.
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")


def sealed(words: Sequence[str]) -> list[str]:
    """The words; or one option that holds them, if a shell would change any of them."""
    if all(map(_PLAIN.fullmatch, words)):
        return list(words)
    text = json.dumps(list(words)).encode()
    return [_OPTION, base64.urlsafe_b64encode(text).decode().rstrip("=")]


def opened(words: Sequence[str]) -> list[str]:
    """The words that `sealed` was given, and all others in their places.

    Raises:
        UserError: the option holds anything else.
    """
    return list(_opened(iter(words)))


def _opened(words: Iterator[str]) -> Iterator[str]:
    for word in words:
        if word != _OPTION:
            yield word
            continue
        code = next(words, "")
        try:
            found = json.loads(base64.urlsafe_b64decode(code + "=" * (-len(code) % 4)))
            if not (isinstance(found, list) and all(isinstance(word, str) for word in found)):
                raise ValueError
        except ValueError:
            raise UserError(
                f"{_OPTION} {code}: it is written by magnetar train alone: give JSON and --set"
            ) from None
        yield from found


def require_plain_surroundings() -> None:
    """Refuse a folder, a Python or a variable that shells of other machines would change.

    Raises:
        UserError: naming it, and what it may hold.
    """
    places = {"the current folder": os.path.abspath("."), "the path of Python": sys.executable}
    for name, path in places.items():
        if not _PLAIN.fullmatch(path):
            raise UserError(
                f"{name}, {path!r}, goes to shells of other machines, which would change it: use "
                "one of letters, digits and _@+=:,./- alone"
            )
    for name, value in os.environ.items():
        if name.startswith(_EXPORTED) and set(value) & set('"$`\\'):
            raise UserError(
                f"{name}={value!r} goes to shells of other machines, which would change it: leave "
                'out ", $, ` and \\, or unset it'
            )
