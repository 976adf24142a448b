"""Reading a config's JSON, and the messages about it: key path, value, rule, way out."""

import difflib
import json
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from magnetar.data.errors import UserError, parse_json
from magnetar.engine.config.refused_keys import REFUSED, VALUE_REASONS

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


class _Object(dict[str, Any]):
    """A JSON object that keeps its members as written, repetitions included."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


def shown(value: Any) -> str:
    """The value as JSON, shortened for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def joined(path: str, key: str) -> str:
    """`path.key`, or the key alone at the top level."""
    return f"{path}.{key}" if path else key


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON: write a number")


def _repeated(value: Any, path: str = "") -> Iterator[str]:
    """A line for each key that an object gives more than once."""
    if isinstance(value, _Object):
        given: dict[str, list[str]] = {}
        for key, member in value.pairs:
            yield from _repeated(member, joined(path, key))
            given.setdefault(key, []).append(shown(member))
        for key, values in given.items():
            if len(values) > 1:
                words = f"is given {len(values)} times ({', then '.join(values)})"
                yield f"{joined(path, key)} {words}: keep one of them"
    elif isinstance(value, list):
        for index, member in enumerate(value):
            yield from _repeated(member, f"{path}[{index}]")


def _parse(text: str) -> Any:
    return parse_json(text, object_pairs_hook=_Object, parse_constant=_refuse_constant)


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


def read_config_file(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The JSON object in the file, and a line for each key given more than once."""
    text = _read_text(path)
    try:
        value = _parse(text)
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
    return value, list(_repeated(value))


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The path of each `path=value`, which is set in `raw`, and a line for each that is wrong."""
    paths: list[str] = []
    complaints: list[str] = []
    for text in overrides:
        path, equals, written = text.partition("=")
        path = path.strip()
        try:
            if not equals or not all(path.split(".")):
                example = "--set magnetar.model.num_layers=4"
                raise UserError(f"--set {text!r} is not path=value: write it like {example}")
            if path in paths:
                raise UserError(f"--set {path} is given twice: keep one of them")
            _set(raw, path, _override_value(path, written), text)
        except UserError as error:
            complaints += str(error).split("\n")
        paths.append(path)
    return paths, complaints


def _override_value(path: str, written: str) -> Any:
    try:
        value = _parse(written)
    except json.JSONDecodeError:  # a text without quotes
        return written
    except ValueError as error:
        raise UserError(f"--set {path}: {error}") from None
    if repeated := list(_repeated(value, path)):
        raise UserError("\n".join(repeated))
    return value


def _set(raw: dict[str, Any], path: str, value: Any, text: str) -> None:
    *parents, last = path.split(".")
    here = raw
    for depth, key in enumerate(parents, start=1):
        if here.get(key) is None:
            here[key] = {}
        if not isinstance(here[key], dict):
            so_far = ".".join(parents[:depth])
            raise UserError(
                f"--set {text}: {so_far}={shown(here[key])} is not an object: set {so_far} as a "
                "whole"
            )
        here = here[key]
    here[last] = value


class Problem(NamedTuple):
    """One message for the user.

    Attributes:
        path: the key that the message is about; it tells which `--set` gave the value.
        text: the whole message.
    """

    path: str
    text: str


def problem(path: str, value: Any, words: str) -> Problem:
    """A message that begins with a key and its value."""
    return Problem(path, f"{path}={shown(value)} {words}")


def strange_texts(value: Any, path: str = "") -> list[Problem]:
    """Texts that cannot be written to a file or be the name of one."""
    if isinstance(value, str):
        is_strange = "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)
        words = "has a NUL or half a character in it: write it anew"
        return [Problem(path, f"{path}={json.dumps(value)[:60]} {words}")] if is_strange else []
    inner: list[tuple[Any, str]] = []
    if isinstance(value, dict):
        inner = [(key, path) for key in value]
        inner += [(member, joined(path, key)) for key, member in value.items()]
    elif isinstance(value, list):
        inner = [(member, f"{path}[{i}]") for i, member in enumerate(value)]
    return [found for member, where in inner for found in strange_texts(member, where)]


def without_none(annotation: Any) -> Any:
    """X of `X | None`; other annotations as they are."""
    if get_origin(annotation) in (types.UnionType, Union):
        kept = [a for a in get_args(annotation) if a is not type(None)]
        return kept[0]
    return annotation


def section_model(annotation: Any) -> type[BaseModel] | None:
    """The model of a key that holds an object."""
    kind = without_none(annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def key_paths(model: type[BaseModel], path: str = "") -> list[str]:
    """The path of every key below a model, sections included."""
    paths = []
    for name, field in model.model_fields.items():
        paths.append(joined(path, name))
        if below := section_model(field.annotation):
            paths += key_paths(below, joined(path, name))
    return paths


_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "a text",
}
_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
    "multipleOf": "a multiple of",
}


def _in_words(schema: dict[str, Any]) -> str:
    """The values that a JSON Schema allows."""
    if "anyOf" in schema:
        kinds = [kind for kind in schema["anyOf"] if kind != {"type": "null"}]
        has_null = len(kinds) < len(schema["anyOf"])
        words = [_in_words(kind) for kind in kinds]
        if {"type": "array", "items": kinds[0]} in kinds:
            words = [words[0], "a list of such numbers"]
        return ", or ".join(words) + " (or null)" * has_null
    if "enum" in schema:
        return "one of " + ", ".join(map(shown, schema["enum"]))
    if "const" in schema:
        return shown(schema["const"])
    if "prefixItems" in schema:
        each = _in_words(schema["prefixItems"][0]).removeprefix("a number, ").replace(",", " and")
        return f"a list of {len(schema['prefixItems'])} numbers, each {each}"
    if schema.get("type") == "array":
        return "a list of texts"
    if schema.get("type") not in _TYPES:
        return "an object, { ... }"
    limits = [f", {words} {schema[name]}" for name, words in _LIMITS.items() if name in schema]
    return _TYPES[schema["type"]] + "".join(limits) + ", not empty" * ("minLength" in schema)


def expected(field: FieldInfo) -> str:
    """The values that a key takes, such as `a whole number, at least 1`."""
    annotation: Any = Annotated[field.annotation, field]
    return _in_words(TypeAdapter(annotation).json_schema())


def meaning(field: FieldInfo) -> str:
    """The text below a key, on one line."""
    return " ".join((field.description or "").split())


def _unknown_key(path: str, value: Any, names: list[str], every_path: list[str]) -> Problem:
    """A key that no section has, with the reason for refusing it or the nearest name.

    Args:
        path: the key.
        value: its value.
        names: the known keys of the same section.
        every_path: the paths of all known keys.
    """
    if path in REFUSED:
        return problem(path, value, f"is refused: {REFUSED[path]}")
    parent, _, name = path.rpartition(".")
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    moved = [each for each in every_path if each.rpartition(".")[2] == name]
    if len(moved) == 1:
        hint = f"did you mean {moved[0]}?"
    elif near:
        hint = f"did you mean {joined(parent, near[0])}?"
    else:
        hint = f"the keys there are {', '.join(names)}"
    return problem(path, value, f"is not a known key: {hint}")


def _wrong_value(path: str, value: Any, field: FieldInfo) -> Problem:
    """A value that its key does not take, with the nearest one if it is a name."""
    hint = ""
    kind = without_none(field.annotation)
    if get_origin(kind) is Literal and isinstance(value, str):
        names = {str(choice).lower(): choice for choice in get_args(kind)}
        if near := difflib.get_close_matches(value.lower(), names, n=1, cutoff=0.6):
            hint = f"did you mean {shown(names[near[0]])}? "
    about = VALUE_REASONS.get(path) or meaning(field)
    return problem(path, value, f"must be {expected(field)}: {hint}{about}")


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """What pydantic refused, as messages for the user: the one place that translates its errors.

    Args:
        error: pydantic's error about a whole file.
        model: the model that refused the file.
    """
    problems: list[Problem] = []
    for each in error.errors(include_url=False):
        path, names, field = "", list[str](), None
        here: type[BaseModel] | None = model
        for step in each["loc"]:
            if isinstance(step, int):  # a place in a list
                path += f"[{step}]"
                continue
            path = joined(path, step)
            names = list(here.model_fields) if here else []
            field = here.model_fields.get(step) if here else None
            here = section_model(field.annotation) if field else None
        if field is None:
            problems.append(_unknown_key(path, each["input"], names, key_paths(model)))
        elif each["type"] == "missing":
            words = f"{path} is missing: add {expected(field)}. {meaning(field)}"
            problems.append(Problem(path, words))
        elif each["type"] == "value_error":  # rules of a section, a line each
            lines = [joined(path, line) for line in str(each["ctx"]["error"]).split("\n")]
            problems += [Problem(line.partition("=")[0], line) for line in lines]
        else:
            problems.append(_wrong_value(path, each["input"], field))
    return problems
