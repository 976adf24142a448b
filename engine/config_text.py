"""From a file and `--set` to a plain dict: JSON with exact complaints, overrides by dotted path."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import UserError

_HINTS = {
    "}": "is the comma before it one too many?",
    "]": "is the comma before it one too many?",
    "/": "JSON has no comments",
    "#": "JSON has no comments",
    "'": "JSON wants double quotes",
    "T": "JSON writes true",
    "F": "JSON writes false",
    "N": "JSON writes null, and has no NaN",
    "I": "JSON has no Infinity",
    '"': "is a comma missing before it?",
}


MAX_DEPTH = 50  # of objects and lists in each other; a config needs 5


class _TooDeepError(ValueError):
    """JSON nested deeper than MAX_DEPTH."""

    def __init__(self) -> None:
        super().__init__(
            f"objects and lists are nested more than {MAX_DEPTH} deep: is a bracket repeated by "
            "mistake?"
        )


class _Pairs(list[tuple[str, Any]]):
    """The members of a JSON object as written, repetitions included."""


def shown(value: Any) -> str:
    """The value as JSON, shortened for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON: write a number")


def _plain(value: Any, path: str, repeated: list[str], depth: int = 0) -> Any:
    """The value with dicts for objects; keys given twice are added to `repeated`."""
    if depth > MAX_DEPTH:
        raise _TooDeepError
    if isinstance(value, _Pairs):
        members: dict[str, list[Any]] = {}
        for key, member in value:
            members.setdefault(key, []).append(
                _plain(member, f"{path}.{key}" if path else key, repeated, depth + 1)
            )
        for key, given in members.items():
            if len(given) > 1:
                full = f"{path}.{key}" if path else key
                values = ", then ".join(shown(v) for v in given)
                repeated.append(f"{full} is given {len(given)} times ({values}): keep one of them")
        return {key: given[-1] for key, given in members.items()}
    if isinstance(value, list):
        return [_plain(v, f"{path}[{i}]", repeated, depth + 1) for i, v in enumerate(value)]
    return value


def parse_json(text: str, path: str = "") -> tuple[Any, list[str]]:
    """The value that the text holds, and a line for each key that it gives more than once."""
    repeated: list[str] = []
    try:
        value = json.loads(text, object_pairs_hook=_Pairs, parse_constant=_refuse_constant)
    except RecursionError:
        raise _TooDeepError from None
    return _plain(value, path, repeated), repeated


def _read_text(path: Path) -> str:
    if not path.parent.is_dir():
        raise UserError(f"{path} does not exist: there is no folder {path.parent}")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name one of the JSON files in it")
    if not path.is_file():
        names = sorted(p.name for p in path.parent.glob("*.json"))
        stems = [name.removesuffix(".json") for name in names]
        near = difflib.get_close_matches(path.name.removesuffix(".json"), stems, n=1, cutoff=0.5)
        hint = f"did you mean {path.parent / near[0]}.json?" if near else "check the path"
        if names and not near:
            hint = f"{path.parent} holds {', '.join(names[:8])}"
        raise UserError(f"{path} does not exist: {hint}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}: check its permissions") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from None


def read_json_object(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The JSON object in the file, and a line for each key given more than once."""
    text = _read_text(path)
    try:
        value, repeated = parse_json(text)
    except json.JSONDecodeError as error:
        found = text[error.pos : error.pos + 1]
        what = f"found {found!r}" if found else "found the end of the file"
        hint = _HINTS.get(found, "is a quote, bracket or comma missing?")
        expected = error.msg[0].lower() + error.msg[1:]
        raise UserError(
            f"{path} is not JSON: line {error.lineno}, column {error.colno}: "
            f"{expected}, {what}: {hint}"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {shown(value)}: a config is an object, {{ ... }}")
    return value, repeated


def _parse_override(text: str) -> tuple[str, Any, list[str]]:
    """The path, the value, and complaints of one `path=value`."""
    path, equals, value_text = text.partition("=")
    path = path.strip()
    if not equals or not path or not all(path.split(".")):
        example = "--set magnetar.model.num_layers=4"
        return path, None, [f"--set {text!r} is not path=value: write it like {example}"]
    try:
        value, repeated = parse_json(value_text, path)
    except _TooDeepError as error:
        return path, None, [f"--set {path}: {error}"]
    except ValueError:
        return path, value_text, []
    return path, value, repeated


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sets each `path=value` in `raw`; returns their paths, and a line for each that is wrong."""
    paths: list[str] = []
    complaints: list[str] = []
    for text in overrides:
        path, value, wrong = _parse_override(text)
        if not wrong and path in paths:
            wrong = [f"--set {path} is given twice: keep one of them"]
        if not wrong:
            wrong = _set(raw, path, value, text)
        complaints += wrong
        paths.append(path)
    return paths, complaints


def _set(raw: dict[str, Any], path: str, value: Any, text: str) -> list[str]:
    """Sets one value, creating objects on the way; a line when something else is in the way."""
    *parents, last = path.split(".")
    here = raw
    for depth, key in enumerate(parents):
        if here.get(key) is None:
            here[key] = {}
        if not isinstance(here[key], dict):
            so_far = ".".join(parents[: depth + 1])
            return [
                f"--set {text}: {so_far}={shown(here[key])} is not an object: "
                f"set {so_far} as a whole"
            ]
        here = here[key]
    here[last] = value
    return []
