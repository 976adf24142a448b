"""What is wrong with a section, in words: key path, value, rule, way out."""

import difflib
import functools
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from magnetar.data.errors import UserError
from magnetar.engine.config.refused_keys import REFUSED, VALUE_REASONS
from magnetar.models.moe.config import MAX_EXPERTS

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


class Problem(NamedTuple):
    """One line for the user, and the key path it is about (for the `--set` it came from)."""

    path: str
    text: str


def joined(path: str, key: str) -> str:
    """`path.key`, or the key alone at the top level."""
    return f"{path}.{key}" if path else key


def strange_texts(value: Any, path: str = "") -> list[Problem]:
    """Texts with what neither a file's name nor a file can hold."""
    if isinstance(value, str):
        is_strange = "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)
        words = "has a NUL or half a character in it: write it anew"
        return [Problem(path, f"{path}={json.dumps(value)[:60]} {words}")] if is_strange else []
    if isinstance(value, dict):
        keys = [
            Problem(path, problem.text) for key in value for problem in strange_texts(key, path)
        ]
        inner = [strange_texts(each, joined(path, str(key))) for key, each in value.items()]
        return keys + [problem for found in inner for problem in found]
    if isinstance(value, list):
        inner = [strange_texts(each, f"{path}[{i}]") for i, each in enumerate(value)]
        return [problem for found in inner for problem in found]
    return []


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


def expected(field: FieldInfo) -> str:
    """The values that a key takes: `a whole number, at least 1`."""
    annotation = without_none(field.annotation)
    others = [a for a in get_args(field.annotation) if get_origin(a) is list]
    if others and get_origin(annotation) is not list:  # `moe.num_experts`
        return f"a whole number, at least 1, at most {MAX_EXPERTS}, or a list of such numbers"
    limits = list(field.metadata)
    if get_origin(annotation) is Annotated:
        annotation, *about = get_args(annotation)
        limits += [limit for a in about if isinstance(a, FieldInfo) for limit in a.metadata]
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if annotation in words:
        text = words[annotation]
    elif get_origin(annotation) is Literal:
        choices = get_args(annotation)
        text = "one of " * (len(choices) > 1) + ", ".join(shown(v) for v in choices)
    elif get_origin(annotation) is tuple:
        text = f"a list of {len(get_args(annotation))} numbers, each at least 0 and less than 1"
    elif get_origin(annotation) is list:
        text = "a list of texts"
    else:
        text = "an object, { ... }"
    for limit in limits:
        for kind, attribute, phrase in (
            (Ge, "ge", "at least"),
            (Gt, "gt", "more than"),
            (Le, "le", "at most"),
            (Lt, "lt", "less than"),
        ):
            if isinstance(limit, kind):
                text += f", {phrase} {getattr(limit, attribute)}"
        if isinstance(limit, MinLen):
            text += ", not empty"
        if isinstance(limit, MultipleOf):
            text += f", a multiple of {limit.multiple_of}"
    for other in get_args(field.annotation)[1:]:
        if get_origin(other) is Literal:  # `training.save_every`
            text += "".join(f", or {shown(v)}" for v in get_args(other))
    return text + (" (or null)" if annotation is not field.annotation else "")


def key_paths(model: type[BaseModel], path: str = "") -> list[str]:
    """The path of every key below a model, sections included."""
    paths = []
    for name, field in model.model_fields.items():
        paths.append(joined(path, name))
        if below := section_model(field.annotation):
            paths += key_paths(below, joined(path, name))
    return paths


def unknown_key(path: str, value: Any, names: list[str], elsewhere: list[str]) -> Problem:
    """Refuses a key, with the reason where DeepSpeed knows it, else with the nearest name."""
    parent, _, name = path.rpartition(".")
    if path in REFUSED:
        return Problem(path, f"{path}={shown(value)} is refused: {REFUSED[path]}")
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    moved = [p for p in elsewhere if p.rpartition(".")[2] == name]
    if len(moved) == 1:
        hint = f"did you mean {moved[0]}?"
    elif near:
        hint = f"did you mean {joined(parent, near[0])}?"
    else:
        hint = f"the keys there are {', '.join(names)}"
    return Problem(path, f"{path}={shown(value)} is not a known key: {hint}")


def _field_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[str, FieldInfo | None]:
    """The dotted path below the model, and the field that it ends in."""
    path, field = "", None
    here: type[BaseModel] | None = model
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
            continue
        path = joined(path, step)
        field = here.model_fields.get(step) if here else None
        here = section_model(field.annotation) if field else None
    return path, field


def wrong_value(path: str, value: Any, field: FieldInfo) -> Problem:
    """Says what a key takes, and the nearest name where it takes names."""
    hint = ""
    annotation = without_none(field.annotation)
    if get_origin(annotation) is Literal and isinstance(value, str):
        names = {str(v).lower(): v for v in get_args(annotation)}
        if near := difflib.get_close_matches(value.lower(), names, n=1, cutoff=0.6):
            hint = f"did you mean {shown(names[near[0]])}? "
    about = VALUE_REASONS.get(path) or field.description or ""
    return Problem(path, f"{path}={shown(value)} must be {expected(field)}: {hint}{about}")


def missing_key(path: str, field: FieldInfo) -> Problem:
    """Says that a required key is absent, and what to write."""
    return Problem(path, f"{path} is missing: add {expected(field)}. {field.description}")


def _from_error(
    model: type[BaseModel], path: str, error: Any, elsewhere: list[str]
) -> list[Problem]:
    """The problems that one pydantic error stands for."""
    below, field = _field_at(model, error["loc"])
    full = joined(path, below) if below else path
    if error["type"] == "extra_forbidden":
        parent: type[BaseModel] | None = model
        for step in error["loc"][:-1]:
            found = parent.model_fields.get(str(step)) if parent else None
            parent = section_model(found.annotation) if found else None
        names = list(parent.model_fields) if parent else []
        return [unknown_key(full, error["input"], names, elsewhere)]
    if error["type"] == "missing" and field is not None:
        return [missing_key(full, field)]
    if error["type"] == "value_error":
        lines = [joined(full, line) for line in str(error["ctx"]["error"]).split("\n")]
        return [Problem(line.partition("=")[0], line) for line in lines]
    if field is None:
        return [Problem(full, f"{full}={shown(error['input'])} must be an object, {{ ... }}")]
    return [wrong_value(full, error["input"], field)]


@functools.cache
def _adapter(model: type[BaseModel], name: str) -> TypeAdapter[Any]:
    """The check of one key of a model."""
    field = model.model_fields[name]
    strict = None if section_model(field.annotation) else ConfigDict(**model.model_config)
    return TypeAdapter(Annotated[field.annotation, field], config=strict)  # type: ignore[arg-type]


def check_keys(
    model: type[BaseModel], raw: dict[str, Any], path: str, elsewhere: list[str]
) -> tuple[dict[str, Any], list[Problem]]:
    """Each key by itself: the values that are right, defaults included, and what is wrong."""
    right: dict[str, Any] = {}
    problems: list[Problem] = []
    for key in raw:
        if key not in model.model_fields:
            names = list(model.model_fields)
            problems.append(unknown_key(joined(path, key), raw[key], names, elsewhere))
    for key, field in model.model_fields.items():
        if key not in raw:
            if field.is_required():
                problems.append(missing_key(joined(path, key), field))
            else:
                right[key] = field.get_default(call_default_factory=True)
            continue
        try:
            right[key] = _adapter(model, key).validate_json(json.dumps(raw[key]))
        except ValidationError as error:
            below = section_model(field.annotation)
            for each in error.errors(include_url=False):
                if below is None or (not each["loc"] and each["type"] != "value_error"):
                    suffix = "".join(f"[{i}]" for i in each["loc"])
                    problems.append(wrong_value(joined(path, key) + suffix, each["input"], field))
                else:
                    problems += _from_error(below, joined(path, key), each, elsewhere)
    return right, problems
