"""A dense model as a MoE model with the same function: sparse upcycling (arXiv 2212.05055).

Every expert is a copy of the feed-forward network that it replaces. So the choice of the router
does not matter as long as the weights of the chosen experts sum to 1. The experts drift apart in
training, because they see other tokens.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magnetar.convert.expert_tensors import name_at, place_of, turned
from magnetar.convert.folders import (
    checked_model,
    how_to_load,
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

_GATE_NAME = re.compile(r"(.*\.ffn\.deepspeed_moe\.gate)\.(.+)")


def upcycle(
    path: Path, out: Path, moe: dict[str, Any], seed: int, shard_bytes: int | None
) -> list[str]:
    """A report in lines, after writing the upcycled model to a new folder.

    Args:
        path: the dense model, see `open_run`.
        out: new folder; it must not exist, or be empty.
        moe: keys of `model.moe`.
        seed: seed of the routers' weights.
        shard_bytes: largest size of a file, see `write_files`.

    Raises:
        UserError: if the source cannot be read or has experts already, the keys would change its
            function or contradict each other, the seed is below 0, or the folder holds something.
    """
    source = open_whole(path, out)
    if source.config.moe is not None:
        raise UserError(
            f"{path} has {source.config.moe.num_experts} experts in its MoE layers already: name a "
            "dense model, or make it one with `magnetar convert densify`"
        )
    if seed < 0:
        raise UserError(f"--seed {seed} must be at least 0")
    config = upcycled_config(source.config, moe)
    tensors = upcycled_tensors(source.tensors, config, seed)
    write_folder(out, config, tensors, shard_bytes, other_files=vocabulary_file(source))
    assert config.moe is not None
    count = sum(1 for name in tensors.specs if name.endswith(".experts.deepspeed_experts.0.w1"))
    return [
        f"upcycled  {source.path}",
        f"experts   {config.moe.num_experts} in each of {count} MoE layers",
        f"train     {how_to_start(out, {'moe': moe})}",
        "",
        *how_to_load(out, config.architecture),
    ]


def upcycled_config(config: ModelConfig, moe: dict[str, Any]) -> ModelConfig:
    """The MoE model's config.

    Args:
        config: config of a dense model.
        moe: keys of `model.moe`.

    Raises:
        UserError: if the weights of a token's experts would not sum to 1, or a key contradicts
            another.
    """
    for key in ("num_experts", "every", "top_k"):
        if moe[key] < 1:
            raise UserError(f"--{key.replace('_', '-')} {moe[key]} must be at least 1")
    if moe["top_k"] == 1 and moe["num_experts"] > 1:
        raise UserError(
            "--top-k 1 multiplies an expert's output by its probability, which is less than 1, so "
            "the model would start with another function: use --top-k 2 or more, whose weights "
            "sum to 1"
        )
    return checked_model(config, {"moe": moe}, "no such MoE model")


def upcycled_tensors(dense: LazyTensors, config: ModelConfig, seed: int) -> LazyTensors:
    """The MoE model's tensors.

    Args:
        dense: the dense model's tensors.
        config: result of `upcycled_config`.
        seed: seed of the routers' weights, which are those that `build_model` would draw.
    """

    def source_of(name: str) -> str:
        place = place_of(name)
        return name if place is None else name_at(place._replace(expert=None))

    def read(name: str) -> Tensor:
        if gate := _GATE_NAME.fullmatch(name):
            return _drawn(config, seed, gate[1])[gate[2]].to(specs[name].dtype)
        source = source_of(name)
        return dense.read(source) if source == name else turned(dense.read(source))

    dtypes = {spec.dtype for spec in dense.specs.values()}
    drawn_dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    specs = {}
    for name, shape in tensor_shapes(config).items():
        source = dense.specs.get(source_of(name))
        specs[name] = Spec(source.dtype if source else drawn_dtype, tuple(shape))
    return LazyTensors(specs, read)


def _drawn(config: ModelConfig, seed: int, gate: str) -> dict[str, Tensor]:
    """The tensors of a newly drawn router."""
    assert config.moe is not None
    router = build_router(config.d_model, config.moe.of_layer(0))  # all are alike
    assert isinstance(router, LinearRouter | XMoERouter)
    router.init_weights(RandomSource(seed, gate))
    return router.state_dict()
