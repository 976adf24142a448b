"""The page and the JSON Schema that describe a config, written from the models themselves."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from magnetar.engine.config.deepspeed import DeepSpeedKeys
from magnetar.engine.config.errors import expected, joined, meaning, section_model, shown
from magnetar.engine.config.refused_keys import REFUSED
from magnetar.engine.config.schema import ConfigFile, MagnetarConfig
from magnetar.models.config import TorchScaleModelKeys
from magnetar.models.moe.config import TorchScaleMoEKeys

# The keys of a section that stand in a table of their own, out of a newcomer's sight.
_IMPORTED: dict[str, type[BaseModel]] = {
    "magnetar.model": TorchScaleModelKeys,
    "magnetar.model.moe": TorchScaleMoEKeys,
}

PAGE = Path(__file__).resolve().parents[2] / "ds_configs" / "README.md"
MARK = "<!-- `magnetar config docs` writes what follows. -->\n"

_IMPORTED_INTRODUCTION = """\
## Keys for imported models

`magnetar convert import-torchscale` sets these keys, so that a model of TorchScale or fairseq keeps
its numbers: [docs/torchscale.md](../docs/torchscale.md). A new model needs none of them.
"""

_REFUSED_INTRODUCTION = """\
## Refused keys

A file with one of these keys does not start. DeepSpeed knows most of them. They would change the
numbers, do nothing, or have not been shown to work together with experts and SparseClip. A few are
keys of Magnetar's earlier versions; with their old defaults a saved file still starts.
"""


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)]
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    """What an absent key means."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "all its defaults"
    return f"`{shown(list(value) if isinstance(value, tuple) else value)}`"


def _keys(model: type[BaseModel], names: Iterable[str]) -> str:
    """The table of some keys of a section."""
    rows = []
    for name in names:
        field = model.model_fields[name]
        kind = expected(field).removeprefix("a ").replace("an object, { ... }", "section")
        rows.append((f"`{name}`", kind, _default(field), meaning(field)))
    return _table(("key", "type", "default", "meaning"), rows)


def _section(model: type[BaseModel], path: str) -> str:
    """The table of a section and the tables of those below it."""
    aside = _IMPORTED[path].model_fields if path in _IMPORTED else {}
    title = f"### `{path}`\n\n{model.__doc__}\n\n" if path else ""
    parts = [title + _keys(model, [name for name in model.model_fields if name not in aside])]
    for name, field in model.model_fields.items():
        if inner := section_model(field.annotation):
            parts.append(_section(inner, joined(path, name)))
    return "\n\n".join(parts)


def _refused_rows() -> list[tuple[str, str]]:
    """The refused keys that share a reason, and the reason."""
    keys: dict[str, list[str]] = {}
    for key, reason in REFUSED.items():
        keys.setdefault(reason, []).append(f"`{key}`")
    return [(", ".join(names), reason) for reason, names in keys.items()]


def readme() -> str:
    """The page of every key, in Markdown, with the part before MARK as it is."""
    by_hand = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    parts = [
        by_hand + MARK,
        "## Magnetar's keys\n\n" + _section(MagnetarConfig, "magnetar"),
        "## DeepSpeed's keys\n\n" + _section(DeepSpeedKeys, ""),
        _IMPORTED_INTRODUCTION,
        *(
            f"### `{path}`\n\n" + _keys(model, model.model_fields)
            for path, model in _IMPORTED.items()
        ),
        _REFUSED_INTRODUCTION + "\n" + _table(("keys", "why, and what to do"), _refused_rows()),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _without_titles(node: Any, in_properties: bool = False) -> Any:
    """The schema without the titles that pydantic makes up from the names; texts on one line."""
    if isinstance(node, dict):
        return {
            key: " ".join(value.split())
            if key == "description" and isinstance(value, str)
            else _without_titles(value, key == "properties" and not in_properties)
            for key, value in node.items()
            if key != "title" or in_properties
        }
    return [_without_titles(value) for value in node] if isinstance(node, list) else node


def schema() -> dict[str, Any]:
    """The JSON Schema of a whole file."""
    found = _without_titles(ConfigFile.model_json_schema())
    found["properties"] = {
        "$schema": {"type": "string", "description": "For editors; ignored."},
        **found["properties"],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def generated_files() -> dict[str, str]:
    """The text of each generated file of ds_configs/, by name."""
    return {"README.md": readme(), "schema.json": json.dumps(schema(), indent=2) + "\n"}
