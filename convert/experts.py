"""Dense feed-forward networks become experts, and experts dense networks.

Upcycling (arXiv 2212.05055) keeps the function: every expert is a copy of the network that it
replaces, so the choice of the router does not matter as long as the weights of the chosen experts
sum to 1. The experts drift apart in training, because they see other tokens. Densifying keeps one
expert of each MoE layer, or the mean of all.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from magnetar.convert.folders import (
    checked_model,
    how_to_start,
    open_whole,
    vocabulary_file,
    write_folder,
)
from magnetar.data.errors import UserError
from magnetar.models.config import ModelConfig
from magnetar.models.layers.init import RandomSource
from magnetar.models.moe.router import LinearRouter, XMoERouter, build_router
from magnetar.models.weights.files import LazyTensors, Spec
from magnetar.models.weights.load_save import tensor_shapes

# An expert's parameter -> the dense network's. Matrices of experts are transposed: (d_model, d_ff)
# there, (d_ff, d_model) in a Linear.
DENSE = {
    "w1": "w1.weight",
    "b1": "w1.bias",
    "w3": "w3.weight",
    "b3": "w3.bias",
    "norm_weight": "inner_norm.weight",
    "norm_bias": "inner_norm.bias",
    "w2": "w2.weight",
    "b2": "w2.bias",
}
_EXPERT = {dense: expert for expert, dense in DENSE.items()}
_EXPERT_NAME = re.compile(r"(.*\.ffn)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(\w+)")
_DENSE_NAME = re.compile(r"(.*\.ffn)\.(" + "|".join(map(re.escape, _EXPERT)) + ")")
_GATE_NAME = re.compile(r"(.*\.ffn\.deepspeed_moe\.gate)\.(.+)")


class Place(NamedTuple):
    """The place of a tensor in a feed-forward network.

    Attributes:
        ffn: name of the network, such as "blocks.1.ffn".
        parameter: name of the tensor in an expert, such as "w1".
        expert: index of the expert; None in a dense network.
    """

    ffn: str
    parameter: str
    expert: int | None = None

    def name(self, expert: int | None) -> str:
        """The name of the tensor with the same role in an expert, or in the dense network."""
        if expert is None:
            return f"{self.ffn}.{DENSE[self.parameter]}"
        return f"{self.ffn}.deepspeed_moe.experts.deepspeed_experts.{expert}.{self.parameter}"


def place_of(name: str) -> Place | None:
    """The place of a tensor; None if it belongs to no feed-forward network."""
    if found := _EXPERT_NAME.fullmatch(name):
        return Place(found[1], found[3], int(found[2]))
    if found := _DENSE_NAME.fullmatch(name):
        return Place(found[1], _EXPERT[found[2]])
    return None


def experts_of_layers(names: Iterable[str]) -> dict[str, int]:
    """The number of experts of each MoE layer, by its network's name, from the tensors' names."""
    counts: dict[str, int] = {}
    for place in map(place_of, names):
        if place is not None and place.expert is not None:
            counts[place.ffn] = max(counts.get(place.ffn, 0), place.expert + 1)
    return counts


def _turned(tensor: Tensor) -> Tensor:
    """A copy of a dense network's tensor as an expert's, or the other way round."""
    return tensor.t().contiguous() if tensor.dim() == 2 else tensor


def upcycle(
    path: Path, out: Path, moe: dict[str, Any], seed: int, shard_bytes: int | None
) -> list[str]:
    """A report in lines, after writing the upcycled model to a new folder.

    The keys of `model.moe` are refused if they would change the function. The routers' weights are
    those that `build_model` draws with the seed.
    """
    source = open_whole(path, out)
    if source.config.moe is not None:
        raise UserError(
            f"{path} has {source.config.moe.num_experts} experts in its MoE layers already: name a "
            "dense model, or make it one with `magnetar convert densify`"
        )
    if seed < 0:
        raise UserError(f"--seed {seed} must be at least 0")
    for key in ("num_experts", "every", "top_k"):
        if moe[key] < 1:
            raise UserError(f"--{key.replace('_', '-')} {moe[key]} must be at least 1")
    if moe["top_k"] == 1 and moe["num_experts"] > 1:
        raise UserError(
            "--top-k 1 multiplies an expert's output by its probability, which is less than 1, so "
            "the model would start with another function: use --top-k 2 or more, whose weights "
            "sum to 1"
        )
    keys = source.config.model_dump(mode="json") | {"moe": moe}
    config = checked_model(keys, "no such MoE model")
    tensors = _upcycled(source.tensors, config, seed)
    rows = [
        ("upcycled", str(source.path)),
        (
            "experts",
            f"{moe['num_experts']} in each of {len(experts_of_layers(tensors.specs))} MoE layers",
        ),
        ("train", how_to_start(out, {"moe": moe})),
    ]
    return write_folder(
        out, config, tensors, rows, shard_bytes=shard_bytes, other_files=vocabulary_file(source)
    )


def _upcycled(dense: LazyTensors, config: ModelConfig, seed: int) -> LazyTensors:
    """The MoE model's tensors."""

    def source_of(name: str) -> str:
        place = place_of(name)
        return name if place is None else place.name(expert=None)

    def read(name: str) -> Tensor:
        if gate := _GATE_NAME.fullmatch(name):
            return _drawn(config, seed, gate[1])[gate[2]].to(specs[name].dtype)
        source = source_of(name)
        return dense.read(source) if source == name else _turned(dense.read(source))

    dtypes = {spec.dtype for spec in dense.specs.values()}
    drawn = Spec(dtypes.pop() if len(dtypes) == 1 else torch.float32, ())
    specs = {
        name: Spec(dense.specs.get(source_of(name), drawn).dtype, tuple(shape))
        for name, shape in tensor_shapes(config).items()
    }
    return LazyTensors(specs, read)


def _drawn(config: ModelConfig, seed: int, gate: str) -> dict[str, Tensor]:
    """The tensors of a newly drawn router."""
    assert config.moe is not None
    router = build_router(config.d_model, config.moe.of_layer(0))  # all are alike
    assert isinstance(router, LinearRouter | XMoERouter)
    router.init_weights(RandomSource(seed, gate))
    return router.state_dict()


def densify(path: Path, out: Path, expert: int | None, shard_bytes: int | None) -> list[str]:
    """A report in lines, after writing the dense model to a new folder.

    Each MoE layer keeps the expert of this index, or the mean of all if it is None.
    """
    source = open_whole(path, out)
    moe = source.config.moe
    if moe is None:
        raise UserError(f"{path} is dense already: name a model with MoE layers")
    if moe.shared_d_ff is not None or moe.expert_d_ff not in (None, source.config.d_ff):
        raise UserError(
            f"{path} has moe.shared_d_ff={moe.shared_d_ff} and moe.expert_d_ff={moe.expert_d_ff}, "
            f"and one dense network has d_ff={source.config.d_ff} alone: name a model without "
            "shared experts whose experts are as wide as its dense layers"
        )
    fewest = min(moe.expert_counts)
    if expert is not None and not 0 <= expert < fewest:
        raise UserError(
            f"--expert {expert}: the experts of {path} are 0 to {fewest - 1}: use one of "
            "these, or --mean"
        )
    config = source.config.model_copy(update={"moe": None})
    remains = "the mean of" if expert is None else f"expert {expert} of"
    counts = ", ".join(map(str, moe.expert_counts))
    rows = [
        ("densified", str(source.path)),
        ("remains", f"{remains} {counts} in each MoE layer"),
        ("train", how_to_start(out, {"moe": None})),
    ]
    return write_folder(
        out,
        config,
        _densified(source.tensors, config, expert),
        rows,
        shard_bytes=shard_bytes,
        other_files=vocabulary_file(source),
    )


def _densified(sparse: LazyTensors, config: ModelConfig, expert: int | None) -> LazyTensors:
    """The dense model's tensors; `expert` None is the mean of all experts."""
    num_experts = experts_of_layers(sparse.specs)

    def sources_of(name: str) -> list[str]:
        place = place_of(name)
        if place is None or name in sparse.specs:
            return [name]
        kept = range(num_experts[place.ffn]) if expert is None else [expert]
        return [place.name(index) for index in kept]

    def read(name: str) -> Tensor:
        sources = sources_of(name)
        if sources == [name]:
            return sparse.read(name)
        # Summed in float64: equal experts give the expert itself, to the last bit.
        total = sparse.read(sources[0]).to(torch.float64, copy=True)
        for source in sources[1:]:
            total += sparse.read(source)
        return _turned(total.div_(len(sources)).to(specs[name].dtype))

    specs = {
        name: Spec(sparse.specs[sources_of(name)[0]].dtype, tuple(shape))
        for name, shape in tensor_shapes(config).items()
    }
    return LazyTensors(specs, read)
