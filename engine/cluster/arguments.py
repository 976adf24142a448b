"""What other machines get: the ranks' command line in a form that no shell reads, and variables.

For other machines DeepSpeed's launcher joins its command with blanks. Their shells then read
quotes, braces, dollars and blanks anew, and pdsh itself replaces %h, %n and %u.
"""

import base64
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from magnetar.data.errors import UserError

_OPTION = "--words"
_PLAIN = re.compile(r"(?!=)[A-Za-z0-9_@+=:,./-]+")  # zsh reads =WORD as the path of a program
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_EATEN = re.compile(r'%[nu%]|["`\\\x00-\x1f\x7f]|\$(?![A-Za-z_]|\{[A-Za-z_]\w*\})')
_SET_FOR_EACH_RANK = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "PYTHON_MAGNETAR_RUN"),
)
# Variables that DeepSpeed hands on begin so. It puts their values between double quotes.
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")


def sealed(words: Sequence[str]) -> list[str]:
    """The words; or one option that holds them, if a shell would change any of them."""
    if _OPTION not in words and all(map(_PLAIN.fullmatch, words)):
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


def require_plain_surroundings(
    options: Mapping[str, str | None] = MappingProxyType({}),
) -> None:
    """Refuse folders, options and variables that shells of other machines would change.

    Args:
        options: options of the launcher that it hands on -> their values.

    Raises:
        UserError: naming it, and what it may hold; also if a line of .deepspeed_env is wrong.
    """
    places = {"the current folder": os.path.abspath("."), "the path of Python": sys.executable}
    for name, path in {**places, **options}.items():
        if path is not None and not _PLAIN.fullmatch(path):
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
    deepspeed_env()


def deepspeed_env() -> tuple[dict[str, str], list[Path]]:
    """The variables that every machine gets from .deepspeed_env, and the files that name them.

    A value may use variables of the other machine, such as $HOME.

    Raises:
        UserError: a line is not NAME=value, or would not arrive as it stands.
    """
    variables: dict[str, str] = {}
    files: list[Path] = []
    for folder in (os.path.expanduser("~"), "."):
        file = Path(folder) / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        if file.is_file() and file not in files:
            files.append(file)
            variables |= _variables_of(file)
    return variables, files


def _variables_of(file: Path) -> dict[str, str]:
    try:
        lines = file.open().readlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text"
        raise UserError(
            f"{file} has variables for all machines and cannot be read ({reason}): mend it, or "
            "name another file in DS_ENV_FILE"
        ) from None
    variables = {}
    for number, line in enumerate(lines, start=1):
        name, equals, value = (part.strip() for part in line.partition("="))
        problem = ""
        if not equals or not _NAME.fullmatch(name):
            problem = (
                "is not NAME=value, and DeepSpeed's launcher takes neither empty lines nor "
                "comments: mend or remove the line"
            )
        elif name in _SET_FOR_EACH_RANK:
            problem = f"sets {name}, which each rank gets from its launcher: remove the line"
        elif _EATEN.search(value):
            problem = (
                'has a value that pdsh or shells of other machines would change: leave out ", `, '
                "\\, %n, %u, %%, control characters and each $ that does not begin $NAME or ${NAME}"
            )
        if problem:
            raise UserError(f"{file}, line {number}: {line.rstrip(chr(10))!r} {problem}")
        variables[name] = value
    return variables


def exported(variables: Mapping[str, str]) -> str:
    """The shell's commands that set variables on another machine, as DeepSpeed's launcher has it.

    It puts double quotes around a value of more than plain characters, so shells expand $NAME.
    """
    quoted = {
        name: f'"{value}"' if re.search(r"[^\w@%+=:,./-]", value) else value
        for name, value in variables.items()
    }
    return "".join(f"export {name}={value}; " for name, value in quoted.items())
