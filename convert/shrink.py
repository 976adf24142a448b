"""Some layers of a model as a shallower one, to be fine-tuned (arXiv 2010.13002)."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

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
from magnetar.models.weights.files import LazyTensors, Spec
from magnetar.models.weights.load_save import tensor_shapes

_LAYER_NAME = re.compile(r"((?:encoder\.|decoder\.)?)blocks\.(\d+)\.(.+)")


def shrink(
    path: Path, out: Path, layers: dict[str, str | None], shard_bytes: int | None
) -> list[str]:
    """A report in lines, after writing the shallower model to a new folder.

    Args:
        path: the deeper model, see `open_run`.
        out: new folder; it must not exist, or be empty.
        layers: value of each option ("--layers", "--encoder-layers", "--decoder-layers").
        shard_bytes: largest size of a file, see `write_files`.

    Raises:
        UserError: if the source cannot be read, a layer does not exist or does not fit the pattern
            of the MoE layers, or the folder holds something.
    """
    source = open_whole(path, out)
    chosen = chosen_layers(source.config, layers)
    config = shrunk_config(source.config, chosen)
    tensors = shrunk_tensors(source.tensors, config, chosen)
    write_folder(out, config, tensors, shard_bytes, other_files=vocabulary_file(source))
    keys: dict[str, Any] = {"num_layers": config.num_layers}
    if config.num_decoder_layers is not None:
        keys["num_decoder_layers"] = config.num_decoder_layers
    if config.moe is not None and config.moe != source.config.moe:
        keys["moe.num_experts"] = config.moe.num_experts
    return [
        f"shrunk  {source.path}",
        *(
            f"layers  {prefix.rstrip('.') or config.architecture}: "
            f"{', '.join(map(str, indices))} of {_depths(source.config)[prefix]}"
            for prefix, indices in chosen.items()
        ),
        f"train   {how_to_start(out, keys)}",
        "",
        *how_to_load(out, config.architecture),
    ]


def _depths(config: ModelConfig) -> dict[str, int]:
    """Number of layers of each stack, by the prefix of its tensors' names."""
    if config.architecture == "encoder_decoder":
        return {"encoder.": config.encoder_depth, "decoder.": config.decoder_depth}
    return {"": config.num_layers}


def chosen_layers(config: ModelConfig, layers: dict[str, str | None]) -> dict[str, list[int]]:
    """The layers of each stack that remain, by the prefix of its tensors' names.

    Args:
        config: the deeper model's config.
        layers: value of each option, see `shrink`.

    Raises:
        UserError: if an option belongs to another architecture, or a layer does not exist.
    """
    depths = _depths(config)
    options = {"--layers": ""} if "" in depths else {f"--{p[:-1]}-layers": p for p in depths}
    given = {option: text for option, text in layers.items() if text is not None}
    for option in given:
        if option not in options:
            raise UserError(
                f"{option}: the model is of architecture {config.architecture!r}: use "
                f"{' and '.join(options)}"
            )
    if not given:
        raise UserError(f"no layers are named: use {' and '.join(options)}, such as 0,2,4")
    chosen = {prefix: list(range(depth)) for prefix, depth in depths.items()}
    for option, text in given.items():
        chosen[options[option]] = _indices(option, text, depths[options[option]])
    return chosen


def _indices(option: str, text: str, depth: int) -> list[int]:
    parts = text.split(",")
    rule = f"give indices from 0 to {depth - 1}, rising, with commas between them, such as 0,2,4"
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"{option} {text} is no list of layers: {rule}")
    indices = [int(part) for part in parts]
    for index in indices:
        if index >= depth:
            raise UserError(f"{option} {text}: there is no layer {index}: {rule}")
    if any(later <= earlier for earlier, later in pairwise(indices)):
        raise UserError(f"{option} {text} does not rise: {rule}")
    return indices


def shrunk_config(config: ModelConfig, chosen: Mapping[str, Sequence[int]]) -> ModelConfig:
    """The shallower model's config.

    Raises:
        UserError: if `moe.every` wants a MoE layer in place of a dense one, or the reverse, or if
            no MoE layer would remain.
    """
    moe = config.moe
    changes: dict[str, Any] = {"num_layers": len(next(iter(chosen.values())))}
    if "decoder." in chosen:
        changes["num_decoder_layers"] = len(chosen["decoder."])
    for prefix, indices in chosen.items():
        for place, index in enumerate(indices):
            if moe is not None and config.is_moe_layer(index) != config.is_moe_layer(place):
                kinds = ("a dense", "a MoE")
                student = f"the student's {prefix[:-1]}" if prefix else "the student"
                raise UserError(
                    f"layer {index}, {kinds[config.is_moe_layer(index)]} layer, would become layer "
                    f"{place} of {student}, where "
                    f"moe.every={moe.every} wants {kinds[config.is_moe_layer(place)]} layer: "
                    "choose layers that fit, or make the model dense first with `python -m "
                    "magnetar convert densify`"
                )
    if moe is not None and not any(
        config.is_moe_layer(index) for indices in chosen.values() for index in indices
    ):
        there = [str(index) for index in range(config.num_layers) if config.is_moe_layer(index)]
        raise UserError(
            f"none of the layers that are named is a MoE layer, as {', '.join(there)} are: name "
            "one of these too, or make the model dense first with `magnetar convert "
            "densify`"
        )
    if moe is not None and isinstance(moe.num_experts, list):
        # One number for each MoE layer, the encoder's before the decoder's.
        counts = iter(moe.num_experts)
        of_layer = {
            (prefix, index): next(counts)
            for prefix, depth in _depths(config).items()
            for index in range(depth)
            if config.is_moe_layer(index)
        }
        kept = [
            of_layer[prefix, index]
            for prefix, indices in chosen.items()
            for index in indices
            if config.is_moe_layer(index)
        ]
        changes["moe"] = moe.model_dump(mode="json") | {"num_experts": kept}
    return checked_model(config, changes, "no such shallower model")


def shrunk_tensors(
    deep: LazyTensors, config: ModelConfig, chosen: Mapping[str, Sequence[int]]
) -> LazyTensors:
    """The shallower model's tensors.

    Args:
        deep: the deeper model's tensors.
        config: result of `shrunk_config`.
        chosen: result of `chosen_layers`.
    """

    def source_of(name: str) -> str:
        layer = _LAYER_NAME.fullmatch(name)
        if layer is None:
            return name
        prefix, place, rest = layer.groups()
        return f"{prefix}blocks.{chosen[prefix][int(place)]}.{rest}"

    specs = {
        name: Spec(deep.specs[source_of(name)].dtype, tuple(shape))
        for name, shape in tensor_shapes(config).items()
    }
    return LazyTensors(specs, lambda name: deep.read(source_of(name)))
