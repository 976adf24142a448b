"""The two errors that are not defects of ours, and sentences for JSON that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

_SHOWN_CHARACTERS = 60  # of a wrong value
MAX_DEPTH = 50  # levels of objects and lists in JSON; a config needs 5
_TOO_DEEP = (
    f"objects and lists are nested more than {MAX_DEPTH} deep: is a bracket repeated by mistake?"
)


class _Told(Exception):
    def __init__(self, message: str, on_every_rank: bool = False) -> None:
        super().__init__(message)
        self.on_every_rank = on_every_rank


class UserError(_Told, ValueError):
    """Bad input: a key, a value or a file that a user can change.

    Its message names the key or file, the value, the rule and a way out. The launchers print it
    without a traceback and exit with status 2. Anything else is a defect of ours: its traceback is
    written into a file, and the status is 1.

    Attributes:
        on_every_rank: True if every rank raises it together, so that one of them prints it.
            Before the ranks have joined, all of them see the same input and this does not matter.
    """


class MachineError(_Told, RuntimeError):
    """A fault of a machine, such as weights that have changed by themselves.

    Its message says what was found and what to do. The launchers print it without a traceback and
    exit with status 3: a new start goes on from the last checkpoint.

    Attributes:
        on_every_rank: True if every rank raises it, so that one rank prints it.
    """


def missing_package(what: str, package: str, extra: str, otherwise: str = "") -> UserError:
    """The refusal of what needs a package that not everybody installs.

    Args:
        what: what needs it: a file, an option, a key.
        package: its name, with a version if only one will do.
        extra: the extra of magnetar that installs it.
        otherwise: a way out without the package, "use type \"AdamW\"" say.
    """
    name = package.partition("==")[0]
    way_out = f", or {otherwise}" if otherwise else ""
    return UserError(
        f"{what} needs the package {name}, which is not installed: run pip install "
        f"'magnetar[{extra}]' or pip install {package}{way_out}"
    )


def parse_json(text: str | bytes, **options: Any) -> Any:
    """The value of a JSON text, from whatever program.

    Args:
        text: the text; bytes are read as UTF-8, with or without a byte order mark.
        options: `json.loads`'s options, such as `parse_constant`.

    Raises:
        ValueError: if it holds no value, or one that Python's recursion does not walk through. The
            message is a clause without the name of the file; a json.JSONDecodeError has the place.
    """
    try:
        value = json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"), **options)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        words = "a number in it has thousands of digits: is one repeated by mistake?"
        raise ValueError(words) from None
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        pairs = [list(v.values()) if isinstance(v, dict) else v for v in level]
        level = [inner for members in pairs if isinstance(members, list) for inner in members]
        if not level:
            return value
    raise ValueError(_TOO_DEEP)


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, from whatever program.

    Raises:
        ValueError: what `parse_json` raises, or the file holds another value.
        OSError: if the file cannot be read.
    """
    value = parse_json(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError("it holds no object, { ... }")
    return value


def all_problems(error: ValidationError, section: str = "") -> list[str]:
    """A sentence for each key that pydantic refuses in a file: key, value and rule.

    The JSON of a run has `magnetar.engine.config.errors.problems_of`, which says more.

    Args:
        error: pydantic's error.
        section: dotted path of the part of the file that was validated, "" for a whole file.
    """
    sentences = []
    for each in error.errors(include_url=False):
        key = ".".join(map(str, (section, *each["loc"]))).removeprefix(".")
        value = "" if isinstance(each["input"], bytes) else json.dumps(each["input"], default=str)
        if len(value) > _SHOWN_CHARACTERS:
            value = f"{value[:_SHOWN_CHARACTERS]}..."
        shown = f"{key}={value}" if key else "the whole file"
        if each["type"] == "missing":
            sentences.append(f"{key} is missing")
        elif each["type"] == "extra_forbidden":
            sentences.append(f"{key} is not a key that this version knows")
        elif each["type"] == "value_error":  # our own rule names key and value
            sentences.append(f"{key}: {each['ctx']['error']}".removeprefix(": "))
        elif each["type"] in ("model_type", "model_attributes_type", "dict_type"):
            sentences.append(f"{shown}: it should be an object")
        else:
            sentences.append(f"{shown}: {each['msg'].replace('Input', 'it', 1)}")
    return sentences


def first_problem(error: ValidationError, section: str = "") -> str:
    """The first sentence of `all_problems`."""
    return all_problems(error, section)[0]
