"""A reader of TorchScale's model files, single or one per expert rank.

Three kinds are known: tensors alone (`torch.save(model.state_dict())`, or safetensors), tensors
beside their options ({"config" | "args": ..., "model" | "state_dict": ...}), and fairseq's
checkpoints. fairseq writes a MoE model as NAME-shared.pt and NAME-rank-0.pt, NAME-rank-1.pt, ...,
each rank file with the experts of one rank, counted from 0 in each of them.
"""

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from magnetar.convert.torchscale.names import NOT_WEIGHTS
from magnetar.data.errors import UserError

# Keys that only fairseq writes beside "args" and "model".
_FAIRSEQ_KEYS = ("cfg", "extra_state", "optimizer_history")
_PART = re.compile(r"(?P<stem>.+)-(?P<part>shared|rank-(?P<rank>\d+))(?P<shard>-shard\d+)?\.pt")
_EXPERT = re.compile(r"(?P<layer>.+\.experts)\.(?P<index>\d+)\.(?P<rest>.+)")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


@dataclass(frozen=True)
class Checkpoint:
    """One model as its files hold it.

    Attributes:
        path: the file, or the shared one of several; start of every message about them.
        tensors: TorchScale's name -> tensor.
        options: options that the file holds; None: it holds only tensors.
        kind: "tensors": no options. "options": options of TorchScale's config class. "namespace":
            the same among a program's other arguments. "fairseq": fairseq's arguments.
    """

    path: Path
    tensors: dict[str, Tensor]
    options: dict[str, Any] | None = None
    kind: Literal["tensors", "options", "namespace", "fairseq"] = "tensors"


@dataclass
class _Parts:
    """A checkpoint's files by role."""

    shared: list[Path] = field(default_factory=list)
    ranks: dict[int, Path] = field(default_factory=dict)
    whole: list[Path] = field(default_factory=list)


class _Expert(NamedTuple):
    """The origin of one expert's tensors."""

    rank: int
    path: Path
    tensors: dict[str, Tensor]


def read_checkpoint(
    paths: Sequence[Path], num_experts: int | None = None, trust: bool = False
) -> Checkpoint:
    """Read one model from its file, or from its shared file and those of its expert ranks.

    Args:
        paths: one file, or a shared file and its rank files, which are also found beside it.
        num_experts: number of experts of each MoE layer; None: the number in the shared file, or
            else all experts of the rank files.
        trust: whether the files may run code, as any pickle can.
    """
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file: give the checkpoint's path")
    parts = _parts(paths)
    if parts.whole:
        return _read_file(parts.whole[0], trust)
    return _read_parts(parts.shared[0], parts.ranks, num_experts, trust)


def _parts(paths: Sequence[Path]) -> _Parts:
    parts = _Parts()
    for path in paths:
        match = _PART.fullmatch(path.name)
        if match is None:
            parts.whole.append(path)
            continue
        if match["shard"]:
            raise UserError(
                f"{path}: one of the shards that fairseq's FSDP writes, and these are not read: "
                "consolidate them with fairseq first"
            )
        if match["rank"] is None:
            parts.shared.append(path)
        elif int(match["rank"]) in parts.ranks:
            raise UserError(f"{path}: rank {match['rank']} is given twice: give each file once")
        else:
            parts.ranks[int(match["rank"])] = path
    if (parts.whole and len(paths) > 1) or len(parts.shared) > 1:
        extra = parts.whole[0] if parts.whole else parts.shared[1]
        raise UserError(
            f"{extra}: {len(paths)} files are given that are not the parts of one model: give one "
            "file, or NAME-shared.pt and every NAME-rank-N.pt"
        )
    if parts.ranks and not parts.shared:
        first = parts.ranks[min(parts.ranks)]
        shared = first.with_name(re.sub(r"-rank-\d+\.pt$", "-shared.pt", first.name))
        if not shared.is_file():
            raise UserError(
                f"{shared}: no such file: {first.name} holds one rank's experts only, and the rest "
                "of the model lies in this file"
            )
        parts.shared.append(shared)
    if parts.shared:
        parts.ranks = _ranks_beside(parts.shared[0]) | parts.ranks
    return parts


def _ranks_beside(shared: Path) -> dict[int, Path]:
    stem = shared.name.removesuffix("-shared.pt")
    found = {}
    for path in shared.parent.iterdir():
        match = _PART.fullmatch(path.name)
        if match and match["stem"] == stem and match["rank"] and not match["shard"]:
            found[int(match["rank"])] = path
    return found


def _read_parts(
    shared_path: Path, ranks: dict[int, Path], num_experts: int | None, trust: bool
) -> Checkpoint:
    """The shared file with every rank's experts, numbered through over the ranks."""
    shared = _read_file(shared_path, trust)
    if not ranks:
        missing = shared_path.name.replace("-shared.pt", "-rank-0.pt")
        raise UserError(
            f"{shared_path}: {missing} and the files of the other ranks, which hold the experts, "
            "are not beside it: put them there, or give their paths as well"
        )
    tensors = dict(shared.tensors)
    local: dict[int, dict[int, _Expert]] = {}
    for rank, path in sorted(ranks.items()):
        local[rank] = {}
        for name, tensor in _read_file(path, trust).tensors.items():
            match = _EXPERT.fullmatch(name)
            if match is None:
                if name in tensors and not are_equal(tensors[name], tensor):
                    raise UserError(
                        f"{path}: {name} differs from the one in {shared_path.name}: these files "
                        "are not parts of the same checkpoint"
                    )
                tensors[name] = tensor
                continue
            expert = local[rank].setdefault(int(match["index"]), _Expert(rank, path, {}))
            expert.tensors[f"{match['layer']}\n{match['rest']}"] = tensor
    told = num_experts or (shared.options or {}).get("moe_expert_count")
    for index, expert in _numbered(local, ranks, told if isinstance(told, int) else None).items():
        for place, tensor in expert.tensors.items():
            layer, rest = place.split("\n")
            tensors[f"{layer}.{index}.{rest}"] = tensor
    return replace(shared, tensors=tensors)


def _numbered(
    local: dict[int, dict[int, _Expert]], ranks: dict[int, Path], num_experts: int | None
) -> dict[int, _Expert]:
    """Every expert under its number in the whole model.

    In TorchScale rank r holds the experts r * n to r * n + n - 1. With more ranks than experts it
    holds expert r modulo their number, which is a copy of another rank's.
    """
    num_local = max(len(experts) for experts in local.values())
    for rank, experts in local.items():
        if set(experts) != set(range(num_local)):
            raise UserError(
                f"{ranks[rank]}: holds the experts {sorted(experts)} of its rank, and other files "
                f"{num_local}: these files are not parts of the same checkpoint"
            )
    total = num_experts or num_local * (max(ranks) + 1)
    numbered: dict[int, _Expert] = {}
    for experts in local.values():
        for index, expert in experts.items():
            number = (expert.rank * num_local + index) % total
            first = numbered.setdefault(number, expert)
            if first is not expert:
                _check_copies(first, expert, number)
    for number in range(total):
        if number not in numbered:
            some = ranks[min(ranks)]
            missing = re.sub(r"-rank-\d+\.pt$", f"-rank-{number // num_local}.pt", some.name)
            raise UserError(
                f"{some.with_name(missing)}: no such file, and no other one holds expert {number} "
                f"of {total}: give the files of every rank"
            )
    return numbered


def _check_copies(first: _Expert, second: _Expert, number: int) -> None:
    same = first.tensors.keys() == second.tensors.keys() and all(
        are_equal(tensor, second.tensors[place]) for place, tensor in first.tensors.items()
    )
    if not same:
        raise UserError(
            f"{second.path}: its copy of expert {number} differs from the one in "
            f"{first.path.name}: copies must be equal, so these files are not of one checkpoint, "
            "or of a run whose copies were not kept equal"
        )


def _read_file(path: Path, trust: bool) -> Checkpoint:
    if path.suffix == ".safetensors":
        return Checkpoint(path, _named_tensors(path, _read_safetensors(path)))
    held = _read_torch(path, trust)
    if not isinstance(held, Mapping):
        raise UserError(
            f"{path}: holds a {type(held).__name__}, not tensors by name: save the model's "
            "state_dict()"
        )
    states = [key for key in ("model", "state_dict") if isinstance(held.get(key), Mapping)]
    if not states:
        return Checkpoint(path, _named_tensors(path, held))
    tensors = _named_tensors(path, held[states[0]])
    options, kind = _options(held)
    return Checkpoint(path, tensors, options, kind)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            names = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}): copy it anew") from None
    # Of tensors that share their memory safetensors writes one, and notes the others' names.
    return tensors | {
        name: tensors[same]
        for name, same in names.items()
        if name not in tensors and same in tensors
    }


def _read_torch(path: Path, trust: bool) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                path, map_location="cpu", weights_only=not trust, mmap=zipfile.is_zipfile(path)
            )
    except PermissionError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}): ask its owner for the right to read it"
        ) from None
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{path}: holds an object whose class is not here ({error}): install its package, or "
            "save the tensors alone"
        ) from None
    except Exception as error:
        # Wrong bytes can end a pickle, a zip and a map of the file in almost any exception.
        found = _GLOBAL.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if found is None:
            raise UserError(
                f"{path}: is not a whole file that torch.save wrote: copy it anew, or give the "
                "checkpoint itself"
            ) from None
        raise UserError(
            f"{path}: holds a {found[1]}, and reading such an object can run any code: if the file "
            "is your own, add --trust; else ask for one with plain tensors"
        ) from None


def _named_tensors(path: Path, held: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors, without the prefix that DistributedDataParallel adds."""
    for name, value in held.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{path}: {name!r} is of type {type(value).__name__}, not a tensor: give "
                'a state dict, or a file of the form {"config": ..., "model": state dict}'
            )
    if not held:
        raise UserError(f"{path}: holds no tensors: give the file with the model's state dict")
    tensors = {str(name): tensor for name, tensor in held.items()}
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        kind = _strange_kind(tensor)
        if kind is not None and not NOT_WEIGHTS.fullmatch(name):
            raise UserError(
                f"{path}: {name} is {kind}, and every tensor of a model must be a dense one of a "
                "floating type of 16 bits or more: convert it, or take it out if it is no weight"
            )
    return tensors


def _strange_kind(tensor: Tensor) -> str | None:
    """A name for a tensor that cannot be a weight; None if it can be one."""
    if tensor.is_meta:
        return "a meta tensor, a shape without numbers"
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        return f"a {layout} tensor"
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return f"of type {str(tensor.dtype).removeprefix('torch.')}"
    return None


def _options(
    held: Mapping[str, Any],
) -> tuple[dict[str, Any] | None, Literal["tensors", "options", "namespace", "fairseq"]]:
    """The options beside the tensors, and the program that wrote them."""
    cfg = _as_dict(held.get("cfg"))
    if cfg is not None and _as_dict(cfg.get("model")) is not None:
        task = _as_dict(cfg.get("task")) or {}
        model = _as_dict(cfg["model"]) or {}
        lengths = {key: task[key] for key in ("tokens_per_sample",) if key in task}
        return lengths | _resolved(model), "fairseq"
    args, config = _as_dict(held.get("args")), _as_dict(held.get("config"))
    if any(key in held for key in _FAIRSEQ_KEYS):
        return (None, "tensors") if args is None else (_resolved(args), "fairseq")
    if config is not None:
        return config, "options" if isinstance(held["config"], Mapping) else "namespace"
    return (None, "tensors") if args is None else (args, "namespace")


def _resolved(values: dict[str, Any]) -> dict[str, Any]:
    """The options without omegaconf's references to other sections, which are not resolved."""
    return {
        key: value
        for key, value in values.items()
        if not (isinstance(value, str) and value.startswith("${"))
    }


def _as_dict(value: Any) -> dict[str, Any] | None:
    """A mapping, or an object's attributes, as a dict; else None."""
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if value is None or isinstance(value, str | int | float | list | tuple | Tensor):
        return None
    return dict(vars(value)) if hasattr(value, "__dict__") else None


def are_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are of one type and shape and hold the same numbers."""
    return first.dtype == second.dtype and torch.equal(first, second)


def read_options(path: Path) -> dict[str, Any]:
    """The options that a JSON file holds."""
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: give the JSON with the model's options") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder: give the JSON with the model's options") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no JSON: {error}") from None
    except RecursionError:
        raise UserError(
            f"{path}: nests its lists and objects too deeply, and options are names with values: "
            'write them as {"decoder_layers": 6}'
        ) from None
    except ValueError:  # of an integer
        raise UserError(
            f"{path}: holds a number of thousands of digits, which is no option's: correct it"
        ) from None
    if not isinstance(options, dict):
        raise UserError(
            f"{path}: holds a {type(options).__name__}, not options by name, such as "
            '{"decoder_layers": 6}'
        )
    return options
