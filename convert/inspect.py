"""The content of a checkpoint or a folder of weights, and warnings about it.

Memory holds one tensor at a time.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text
from safetensors import safe_open
from torch import Tensor

from magnetar.convert.expert_tensors import place_of
from magnetar.convert.folders import watched
from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.format import (
    WEIGHT,
    Checkpoint,
    checkpoint_folders,
    damaged_files,
    instead_of,
    read_checkpoint,
    sha256,
)
from magnetar.engine.checkpoint.open_run import SavedModel, is_run, of_checkpoint, open_run
from magnetar.engine.config.schema import Layout
from magnetar.engine.optim.adam import MOMENTS
from magnetar.engine.report.progress import table
from magnetar.models.cost import in_words, num_parameters

_GATE = ".deepspeed_moe.gate."
# The first of these words in a tensor's name decides its group.
_GROUPS = (
    ("experts", (".deepspeed_experts.",)),
    ("router", (_GATE,)),
    ("norms", ("norm", "omega", "head_scale")),
    ("attention", ("attention", "relative_bias")),
    ("feed-forward", ("ffn",)),
    ("embedding", ("embedding", "positions")),
    ("output", ("output",)),
)
_SHOWN_EXPERTS = 8
_SHOWN_FILES = 3


@dataclass(frozen=True)
class File:
    """A file.

    Attributes:
        name: name in its folder.
        bytes: size when it was saved.
        sha256: hash of its content when it was saved.
        problem: damage that it has now; None: it is whole.
    """

    name: str
    bytes: int
    sha256: str
    problem: str | None = None


@dataclass(frozen=True)
class TensorFound:
    """A tensor.

    Attributes:
        name: name in the state dict of the whole model.
        shape: shape in the whole model.
        states: names of its states: weight, and the optimizer's moments.
        files: names of the files that hold it.
        sha256: hash of the values of its weights.
        rms: sqrt(mean(weight^2)).
    """

    name: str
    shape: list[int]
    states: list[str]
    files: list[str]
    sha256: str
    rms: float


@dataclass(frozen=True)
class Group:
    """Parameters of one purpose: how many, and sqrt(mean(value^2)) over all of them."""

    name: str
    num_parameters: int
    rms: float


@dataclass(frozen=True)
class MoELayer:
    """A MoE layer.

    Attributes:
        name: name of its network in the model.
        num_experts: number of its experts.
        temperature: temperature of the router; None if it learns none.
        expert_norms: L2 norm over all parameters of an expert: smallest, mean and largest.
    """

    name: str
    num_experts: int
    temperature: float | None
    expert_norms: tuple[float, float, float]


@dataclass(frozen=True)
class Contents:
    """The result of `inspect`.

    Attributes:
        path: path of the checkpoint or the folder of weights.
        about: facts for a person, by their label.
        step: optimizer steps done; None for weights alone.
        layout: ranks, ep_size and ZeRO stage that it was written for; None for weights alone.
        num_tensors: number of tensors; tied ones count once.
        num_parameters: number of parameters of the whole model.
        num_parameters_a_token: number of parameters that a token passes through, see models.cost.
        files: all files of tensors.
        groups, layers, tensors: statistics of the numbers; empty if a file is damaged.
        warnings: suspicious findings, in words.
    """

    path: str
    about: dict[str, str]
    step: int | None
    layout: dict[str, int] | None
    num_tensors: int
    num_parameters: int
    num_parameters_a_token: int
    files: list[File]
    groups: list[Group] = field(default_factory=list)
    layers: list[MoELayer] = field(default_factory=list)
    tensors: list[TensorFound] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def damaged(self) -> list[str]:
        """The damage of each damaged file, one line each."""
        return [file.problem for file in self.files if file.problem is not None]

    def to_dict(self, with_tensors: bool) -> dict[str, Any]:
        """The contents for JSON; values that are not finite become null."""
        found = asdict(self) | {"damaged": self.damaged}
        if not with_tensors:
            del found["tensors"]
        return _finite(found)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def inspect(path: Path) -> Contents:
    """Read everything in a run's newest checkpoint, in a checkpoint, or in a folder of weights.

    Damaged files are reported, not raised, and then no tensor is read.

    Raises:
        UserError: if the folder is none of these, or its manifest, config or file of tensors cannot
            be read at all.
    """
    source = _source(path)
    checkpoint = source.checkpoint
    files = _files(source)
    total, active = num_parameters(source.config)
    contents = Contents(
        path=str(source.path),
        about=_about(source),
        step=checkpoint.step if checkpoint else None,
        layout=checkpoint.manifest["layout"] if checkpoint else None,
        num_tensors=len(source.tensors.specs),
        num_parameters=total,
        num_parameters_a_token=active,
        files=files,
    )
    if not contents.damaged:
        _read_tensors(source, contents)
    return contents


def require_undamaged(contents: Contents) -> None:
    """Refuse damaged files, after the rest has been shown.

    Raises:
        UserError: if a file is damaged; it names each.
    """
    if contents.damaged:
        raise UserError("\n  ".join([*contents.damaged, instead_of(Path(contents.path))]))


def _source(path: Path) -> SavedModel:
    """The source like `open_run`, but also a newest checkpoint with missing files."""
    if not is_run(path):
        source = open_run(path)
        if source.checkpoint is None:
            source.require_whole()
        return source
    folders = checkpoint_folders(path)
    if not folders:
        raise UserError(f"{path} holds no checkpoint yet: train first")
    return of_checkpoint(read_checkpoint(folders[-1]))


def _about(source: SavedModel) -> dict[str, str]:
    words = in_words(source.config)
    checkpoint = source.checkpoint
    if checkpoint is None:
        return {"holds": "weights", **words}
    manifest = checkpoint.manifest
    return {
        "holds": f"step {checkpoint.step} of a run, in format {manifest['format']}",
        **words,
        "layout": Layout.stored(manifest).in_words(),
    }


def _files(source: SavedModel) -> list[File]:
    """The files with their hashes, each compared with what was saved."""
    if source.checkpoint is None:
        paths = sorted(source.path.glob("*.safetensors"))
        return [File(path.name, path.stat().st_size, sha256(path)) for path in paths]
    saved = source.checkpoint.manifest["files"]
    files = []
    for index, name in enumerate(watched("reading files", list(saved))):
        problems = damaged_files(source.checkpoint, index, len(saved))
        size, digest = saved[name]["bytes"], saved[name]["sha256"]
        files.append(File(name, size, digest, problems[0] if problems else None))
    return files


def _read_tensors(source: SavedModel, contents: Contents) -> None:
    """Fill in the statistics of the numbers."""
    squares: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    experts: dict[str, dict[int, _Expert]] = defaultdict(lambda: defaultdict(_Expert))
    temperatures: dict[str, float] = {}
    places = _places(source)
    for name in watched("reading tensors", list(source.tensors.specs)):
        weight = source.tensors.read(name)
        square = float(weight.double().square().sum())
        found = _found(source, name, places[name], weight, square)
        contents.tensors.append(found)
        contents.warnings.extend(_suspicious(source, name, weight))
        total = squares[group_of(name)]
        total[0] += weight.numel()
        total[1] += square
        place = place_of(name)
        if place is not None and place.expert is not None:
            experts[place.ffn][place.expert].add(place.parameter, found.sha256, square)
        elif name.endswith(f"{_GATE}temperature"):
            temperatures[name.partition(_GATE)[0]] = float(weight)
    for group, (count, square) in squares.items():
        contents.groups.append(Group(group, int(count), math.sqrt(square / count)))
    for layer, of_layer in experts.items():
        norms = [math.sqrt(expert.square) for expert in of_layer.values()]
        spread = (min(norms), sum(norms) / len(norms), max(norms))
        contents.layers.append(MoELayer(layer, len(norms), temperatures.get(layer), spread))
    contents.warnings.extend(_twins(experts))


class _Expert:
    """Sums over the tensors of one expert."""

    def __init__(self) -> None:
        self.square = 0.0
        self.digests: dict[str, str] = {}

    def add(self, parameter: str, digest: str, square: float) -> None:
        """Add one tensor of the expert."""
        self.digests[parameter] = digest
        self.square += square


def group_of(name: str) -> str:
    """The purpose of a tensor by its name: `experts`, `router`, `norms`, ..."""
    return next((group for group, words in _GROUPS if any(word in name for word in words)), "other")


def _places(source: SavedModel) -> dict[str, list[str]]:
    """The files in which each tensor lies."""
    if source.checkpoint is not None:
        return {name: source.checkpoint.files_of(name) for name in source.tensors.specs}
    return {
        name: [path.name]
        for path in source.path.glob("*.safetensors")
        for name in safe_open(path, framework="pt").keys()  # noqa: SIM118
    }


def _found(
    source: SavedModel, name: str, files: list[str], weight: Tensor, square: float
) -> TensorFound:
    checkpoint = source.checkpoint
    return TensorFound(
        name=name,
        shape=list(weight.shape),
        states=list(checkpoint.states(name)) if checkpoint else [WEIGHT],
        files=files,
        sha256=digest(weight),
        rms=math.sqrt(square / weight.numel()),
    )


def digest(tensor: Tensor) -> str:
    """Hex sha256 of a tensor's values, in the type that it has."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _suspicious(source: SavedModel, name: str, weight: Tensor) -> Iterator[str]:
    """Warnings about a tensor: matrices of zeros, and values that are not finite."""
    if weight.dim() > 1 and not weight.any():
        yield f"{name} is all zeros"
    for state, values in _states(source.checkpoint, name, weight):
        bad = values.numel() - int(values.isfinite().sum())
        if bad:
            of = "" if state == WEIGHT else f" ({state})"
            yield f"{name}{of}: {bad:,} of {values.numel():,} values are not finite"


def _states(
    checkpoint: Checkpoint | None, name: str, weight: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """The weight and, one after the other, the moments."""
    yield WEIGHT, weight
    for state in checkpoint.states(name) if checkpoint else ():
        if checkpoint is not None and state != WEIGHT:
            yield state, checkpoint.tensor(name, state)


def _twins(experts: Mapping[str, Mapping[int, _Expert]]) -> list[str]:
    """Experts with the same parameters, by layer and global index."""
    owners: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for layer, of_layer in experts.items():
        for index, expert in sorted(of_layer.items()):
            key = tuple(sorted(expert.digests.items()))
            owners[key].append(f"{layer} expert {index}")
    lines = []
    for names in owners.values():
        if len(names) > 1:
            more = len(names) - _SHOWN_EXPERTS
            shown = ", ".join(names[:_SHOWN_EXPERTS]) + (f" and {more} more" if more > 0 else "")
            lines.append(f"identical experts: {shown}")
    return lines


def shown(contents: Contents, with_tensors: bool) -> list[RenderableType]:
    """The tables for a person, for a rich console."""
    about = {"path": contents.path, **contents.about, "tensors": f"{contents.num_tensors:,}"}
    found = {state for tensor in contents.tensors for state in tensor.states}
    if found:
        about["states"] = ", ".join(state for state in (WEIGHT, *MOMENTS) if state in found)
    width = max(map(len, about))
    parts: list[RenderableType] = [
        Text("\n".join(f"{name:<{width}}  {text}" for name, text in about.items()) + "\n")
    ]
    rows = [
        [file.name, f"{file.bytes:,}", file.sha256[:12], "damaged" if file.problem else "whole"]
        for file in contents.files
    ]
    parts.append(table("Files", ["", "bytes", "sha256", ""], rows))
    if contents.groups:
        rows = [[g.name, f"{g.num_parameters:,}", f"{g.rms:.4g}"] for g in contents.groups]
        parts.append(table("Parameters", ["", "number", "RMS"], rows))
    if contents.layers:
        rows = [
            [
                layer.name,
                f"{layer.num_experts}",
                "" if layer.temperature is None else f"{layer.temperature:.4g}",
                *(f"{norm:.4g}" for norm in layer.expert_norms),
            ]
            for layer in contents.layers
        ]
        columns = ["", "experts", "temperature", "norm, smallest", "mean", "largest"]
        parts.append(table("MoE layers", columns, rows))
    if with_tensors and contents.tensors:
        parts.append(Text("Tensors\n", style="bold"))
        parts.append(Text("\n".join(_tensor_lines(contents.tensors)) + "\n", no_wrap=True))
    warnings = [Text(f"warning: {warning}") for warning in contents.warnings]
    return [*parts, *warnings]


def _tensor_lines(tensors: list[TensorFound]) -> list[str]:
    """Aligned columns, a line each: names are too long for a table of a terminal's width."""
    rows = [
        [
            tensor.name,
            " x ".join(map(str, tensor.shape)),
            tensor.sha256[:12],
            f"{tensor.rms:.4g}",
            ", ".join(tensor.states),
            _range([file.removesuffix(".safetensors") for file in tensor.files]),
        ]
        for tensor in tensors
    ]
    rows.insert(0, ["", "shape", "sha256", "RMS", "states", "files"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _range(files: list[str]) -> str:
    few = len(files) <= _SHOWN_FILES
    return ", ".join(files) if few else f"{files[0]} ... {files[-1]} ({len(files)} files)"
