"""A reader of TorchScale's model files, single or one per expert rank.

Three kinds are known: tensors alone (`torch.save(model.state_dict())`, or safetensors), tensors
beside their options ({"config" | "args": ..., "model" | "state_dict": ...}), and fairseq's
checkpoints. fairseq writes a MoE model as NAME-shared.pt and NAME-rank-0.pt, NAME-rank-1.pt, ...,
each rank file with the experts of one rank, counted from 0 in each of them.
"""

import argparse
import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from magnetar.convert.torchscale.names import NOT_WEIGHTS, XPOS
from magnetar.data.errors import UserError, read_json_object

# Keys that only fairseq writes beside "args" and "model".
_FAIRSEQ_KEYS = ("cfg", "extra_state", "optimizer_history")
_PART = re.compile(r"(?P<stem>.+)-(?P<part>shared|rank-(?P<rank>\d+))(?P<shard>-shard\d+)?\.pt")
_EXPERT = re.compile(r"(?P<layer>.+\.experts)\.(?P<index>\d+)\.(?P<rest>.+)")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
# Parts that wrappers add to names: DistributedDataParallel and torch.optim.swa_utils.AveragedModel,
# torch.compile, FSDP of torch and of fairscale, activation checkpointing now and in torch 1.12,
# Lightning Fabric. No module of TorchScale's has such a name.
_WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_checkpoint_wrapped_module",
    "mod",
    "_forward_module",
}
# Keys under which programs store the tensors: fairseq and others, Lightning, DeepSpeed.
_STATES = ("model", "state_dict", "module", "model_state_dict")


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


# An expert's tensors by (layer, name in the expert), as "decoder.layers.0.moe_layer.experts".
_Expert = dict[tuple[str, str], Tensor]


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
    path, ranks = _parts(paths)
    if ranks is None:
        return _read_file(path, trust)
    return _read_parts(path, ranks, num_experts, trust)


def _parts(paths: Sequence[Path]) -> tuple[Path, dict[int, Path] | None]:
    """The shared file and the file of each rank, or the one file and None."""
    ranks: dict[int, Path] = {}
    others = []
    for path in paths:
        match = _PART.fullmatch(path.name)
        if match is not None and match["shard"]:
            raise UserError(
                f"{path}: one of the shards that fairseq's FSDP writes, and these are not read: "
                "consolidate them with fairseq first"
            )
        if match is None or match["part"] == "shared":
            others.append(path)
        elif int(match["rank"]) in ranks:
            raise UserError(f"{path}: rank {match['rank']} is given twice: give each file once")
        else:
            ranks[int(match["rank"])] = path
    wholes = [path for path in others if not _PART.fullmatch(path.name)]
    if len(others) > 1 or (wholes and ranks):
        raise UserError(
            f"{(wholes or others)[-1]}: {len(paths)} files are given that are not the parts of one "
            "model: give one file, or NAME-shared.pt and every NAME-rank-N.pt"
        )
    if wholes:
        return wholes[0], None
    if not others:
        first = ranks[min(ranks)]
        shared = first.with_name(re.sub(r"-rank-\d+\.pt$", "-shared.pt", first.name))
        if not shared.is_file():
            raise UserError(
                f"{shared}: no such file: {first.name} holds one rank's experts only, and the rest "
                "of the model lies in this file"
            )
        others.append(shared)
    stem = others[0].name.removesuffix("-shared.pt")
    for path in others[0].parent.iterdir():
        match = _PART.fullmatch(path.name)
        if match and match["stem"] == stem and match["rank"] and not match["shard"]:
            ranks.setdefault(int(match["rank"]), path)
    return others[0], ranks


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
        local[rank] = defaultdict(dict)
        for name, tensor in _read_file(path, trust).tensors.items():
            if match := _EXPERT.fullmatch(name):
                local[rank][int(match["index"])][match["layer"], match["rest"]] = tensor
            elif NOT_WEIGHTS.fullmatch(name):
                continue
            elif name in tensors and not are_equal(tensors[name], tensor):
                raise UserError(
                    f"{path}: {name} differs from the one in {shared_path.name}: these files "
                    "are not parts of the same checkpoint"
                )
            else:
                tensors[name] = tensor
    told = num_experts or (shared.options or {}).get("moe_expert_count")
    for index, expert in _numbered(local, ranks, told if isinstance(told, int) else None).items():
        tensors |= {f"{layer}.{index}.{rest}": expert[layer, rest] for layer, rest in expert}
    return replace(shared, tensors=tensors)


def _numbered(
    local: dict[int, dict[int, _Expert]], ranks: dict[int, Path], num_experts: int | None
) -> dict[int, _Expert]:
    """Every expert under its number in the whole model.

    In TorchScale rank r holds the experts r * n to r * n + n - 1. With more ranks than experts it
    holds expert r modulo their number, which is a copy of another rank's.
    """
    num_local = max(len(experts) for experts in local.values())
    total = num_experts or num_local * (max(ranks) + 1)
    numbered: dict[int, _Expert] = {}
    holder: dict[int, Path] = {}
    for rank, experts in local.items():
        if set(experts) != set(range(num_local)):
            raise UserError(
                f"{ranks[rank]}: holds the experts {sorted(experts)} of its rank, and other files "
                f"{num_local}: these files are not parts of the same checkpoint"
            )
        for index, expert in experts.items():
            number = (rank * num_local + index) % total
            first = numbered.setdefault(number, expert)
            holder.setdefault(number, ranks[rank])
            if first.keys() != expert.keys() or not all(
                are_equal(tensor, expert[place]) for place, tensor in first.items()
            ):
                raise UserError(
                    f"{ranks[rank]}: its copy of expert {number} differs from the one in "
                    f"{holder[number].name}: copies must be equal, so these files are not of one "
                    "checkpoint, or of a run whose copies were not kept equal"
                )
    for number in range(total):
        if number not in numbered:
            some = ranks[min(ranks)]
            missing = re.sub(r"-rank-\d+\.pt$", f"-rank-{number // num_local}.pt", some.name)
            raise UserError(
                f"{some.with_name(missing)}: no such file, and no other one holds expert {number} "
                f"of {total}: give the files of every rank"
            )
    return numbered


def _read_file(path: Path, trust: bool) -> Checkpoint:
    if path.suffix == ".safetensors":
        return Checkpoint(path, _named_tensors(path, _read_safetensors(path)))
    held = _read_torch(path, trust)
    if not isinstance(held, Mapping):
        raise UserError(
            f"{path}: holds a {type(held).__name__}, not tensors by name: save the model's "
            "state_dict()"
        )
    states = [key for key in _STATES if isinstance(held.get(key), Mapping)]
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
    """The tensors, without the parts that wrappers add to their names, in any order and depth."""
    for name, value in held.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{path}: {name!r} is of type {type(value).__name__}, not a tensor: give "
                'a state dict, or a file of the form {"config": ..., "model": state dict}'
            )
    if not held:
        raise UserError(f"{path}: holds no tensors: give the file with the model's state dict")
    tensors: dict[str, Tensor] = {}
    for whole_name, tensor in held.items():
        name = ".".join(part for part in str(whole_name).split(".") if part not in _WRAPPERS)
        kind = _strange_kind(tensor)
        if kind is not None and (name.endswith(XPOS) or not NOT_WEIGHTS.fullmatch(name)):
            raise UserError(
                f"{path}: {name} is {kind}, and every tensor of a model must be a dense one of a "
                "floating type of 16 bits or more: convert it, or take it out if it is no weight"
            )
        if name in tensors and kind is None and not are_equal(tensors[name], tensor):
            raise UserError(
                f"{path}: {whole_name} and another tensor are both {name} without the names of "
                "wrappers such as module and _orig_mod, and they differ: take one of them out"
            )
        tensors[name] = tensor
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
    """Whether two tensors are of one type and shape and hold the same numbers, NaN included."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)


def read_options(path: Path) -> dict[str, Any]:
    """The options that a JSON file holds."""
    try:
        return read_json_object(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: give the JSON with the model's options") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder: give the JSON with the model's options") from None
    except ValueError as error:
        raise UserError(
            f"{path}: is no JSON of options ({error}): write them by name as UTF-8, such as "
            '{"decoder_layers": 6}'
        ) from None
