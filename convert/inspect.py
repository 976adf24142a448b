"""The content of a checkpoint or a folder of weights, and warnings about it.

Memory holds one tensor at a time.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text
from safetensors import safe_open
from torch import Tensor

from magnetar.convert.experts import place_of
from magnetar.convert.folders import not_finite, watched
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
from magnetar.engine.optim.ema import EMA
from magnetar.engine.report.progress import table
from magnetar.models.cost import in_words, num_parameters
from magnetar.models.weights.files import digest

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
    """A file: its size and its hash when it was saved, and the damage that it has now, if any."""

    name: str
    bytes: int
    sha256: str
    problem: str | None = None


@dataclass(frozen=True)
class TensorFound:
    """A tensor of the whole model.

    Its states are its weight and the optimizer's moments. The hash is that of its weights, and the
    RMS is sqrt(mean(weight^2)).
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

    The router may learn no temperature. The norms are the smallest, mean and largest L2 norm over
    all parameters of an expert.
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
        return json.loads(json.dumps(found), parse_constant=lambda _: None)


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
    about = {"holds": "weights", **in_words(source.config)}
    if checkpoint is not None:
        about["holds"] = (
            f"step {checkpoint.step} of a run, in format {checkpoint.manifest['format']}"
        )
        about["layout"] = Layout.stored(checkpoint.manifest).in_words()
    contents = Contents(
        path=str(source.path),
        about=about,
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
    squares: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    # Network -> index of the expert -> parameter -> its hash and its sum of squares.
    experts: dict[str, dict[int, dict[str, tuple[str, float]]]]
    experts = defaultdict(lambda: defaultdict(dict))
    temperatures: dict[str, float] = {}
    places = _places(source)
    for name in watched("reading tensors", list(source.tensors.specs)):
        weight = source.tensors.read(name)
        states = list(source.checkpoint.states(name)) if source.checkpoint else [WEIGHT]
        square = float(weight.double().square().sum())
        hashed, rms = digest(weight), math.sqrt(square / weight.numel())
        contents.tensors.append(
            TensorFound(name, list(weight.shape), states, places[name], hashed, rms)
        )
        contents.warnings.extend(_suspicious(source.checkpoint, name, weight, states))
        counts[group_of(name)] += weight.numel()
        squares[group_of(name)].append(square)
        place = place_of(name)
        if place is not None and place.expert is not None:
            experts[place.ffn][place.expert][place.parameter] = hashed, square
        elif name.endswith(f"{_GATE}temperature"):
            temperatures[name.partition(_GATE)[0]] = float(weight)
    for group, count in counts.items():
        contents.groups.append(Group(group, count, math.sqrt(sum(squares[group]) / count)))
    owners: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for layer, of_layer in experts.items():
        norms = [math.sqrt(sum(one for _, one in of.values())) for of in of_layer.values()]
        spread = (min(norms), sum(norms) / len(norms), max(norms))
        contents.layers.append(MoELayer(layer, len(norms), temperatures.get(layer), spread))
        for index, parameters in sorted(of_layer.items()):
            hashes = tuple(sorted((name, one) for name, (one, _) in parameters.items()))
            owners[hashes].append(f"{layer} expert {index}")
    for names in owners.values():
        if len(names) > 1:
            more = len(names) - _SHOWN_EXPERTS
            twins = ", ".join(names[:_SHOWN_EXPERTS]) + (f" and {more} more" if more > 0 else "")
            contents.warnings.append(f"identical experts: {twins}")


def _suspicious(
    checkpoint: Checkpoint | None, name: str, weight: Tensor, states: list[str]
) -> Iterator[str]:
    """Warnings about a tensor: matrices of zeros, and values that are not finite."""
    if weight.dim() > 1 and not weight.any():
        yield f"{name} is all zeros"
    for state in states:
        if checkpoint is None or state == WEIGHT:
            values, of = weight, ""
        else:
            values, of = checkpoint.tensor(name, state), f" ({state})"
        if text := not_finite(values):
            yield f"{name}{of}: {text}"


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


def shown(contents: Contents, with_tensors: bool) -> list[RenderableType]:
    """The tables for a person, for a rich console."""
    about = {"path": contents.path, **contents.about, "tensors": f"{contents.num_tensors:,}"}
    found = {state for tensor in contents.tensors for state in tensor.states}
    if found:
        about["states"] = ", ".join(state for state in (WEIGHT, *MOMENTS, EMA) if state in found)
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
