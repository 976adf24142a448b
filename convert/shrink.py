"""Some layers of a model as a shallower one, to be fine-tuned (arXiv 2010.13002)."""

import re
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

from magnetar.convert.folders import (
    checked_model,
    how_to_start,
    open_whole,
    vocabulary_file,
    write_folder,
)
from magnetar.data.errors import UserError
from magnetar.models.config import ModelConfig
from magnetar.models.weights.files import LazyTensors, Spec
from magnetar.models.weights.load_save import tensor_shapes

_MOST_DIGITS = 10  # of an index, since Python reads no number of thousands of digits
_LAYER_NAME = re.compile(r"((?:encoder\.|decoder\.)?)blocks\.(\d+)\.(.+)")


def shrink(
    path: Path, out: Path, layers: dict[str, str | None], shard_bytes: int | None
) -> list[str]:
    """A report in lines, after writing the shallower model to a new folder.

    Args:
        path: the deeper model.
        out: new folder.
        layers: value of each option ("--layers", "--encoder-layers", "--decoder-layers").
        shard_bytes: largest size of a file, see `write_files`.
    """
    source = open_whole(path, out)
    chosen = _chosen_layers(source.config, layers)
    config = _shrunk_config(source.config, chosen)

    def source_of(name: str) -> str:
        layer = _LAYER_NAME.fullmatch(name)
        if layer is None:
            return name
        prefix, place, rest = layer.groups()
        return f"{prefix}blocks.{chosen[prefix][int(place)]}.{rest}"

    deep = source.tensors
    specs = {
        name: Spec(deep.specs[source_of(name)].dtype, tuple(shape))
        for name, shape in tensor_shapes(config).items()
    }
    tensors = LazyTensors(specs, lambda name: deep.read(source_of(name)))
    keys: dict[str, Any] = {"num_layers": config.num_layers}
    if config.num_decoder_layers is not None:
        keys["num_decoder_layers"] = config.num_decoder_layers
    if config.moe is not None and config.moe != source.config.moe:
        keys["moe.num_experts"] = config.moe.num_experts
    rows = [("shrunk", str(source.path))]
    for prefix, indices in chosen.items():
        which = f"{', '.join(map(str, indices))} of {_depths(source.config)[prefix]}"
        rows.append(("layers", f"{prefix.rstrip('.') or config.architecture}: {which}"))
    rows.append(("train", how_to_start(out, keys)))
    return write_folder(
        out, config, tensors, rows, shard_bytes=shard_bytes, other_files=vocabulary_file(source)
    )


def _depths(config: ModelConfig) -> dict[str, int]:
    """Number of layers of each stack, by the prefix of its tensors' names."""
    if config.architecture == "encoder_decoder":
        return {"encoder.": config.encoder_depth, "decoder.": config.decoder_depth}
    return {"": config.num_layers}


def _chosen_layers(config: ModelConfig, layers: dict[str, str | None]) -> dict[str, list[int]]:
    """The layers of each stack that remain, by the prefix of its tensors' names."""
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
    if not all(part.strip().isdecimal() and len(part) < _MOST_DIGITS for part in parts):
        raise UserError(f"{option} {text} is no list of layers: {rule}")
    indices = [int(part) for part in parts]
    for index in indices:
        if index >= depth:
            raise UserError(f"{option} {text}: there is no layer {index}: {rule}")
    if any(later <= earlier for earlier, later in pairwise(indices)):
        raise UserError(f"{option} {text} does not rise: {rule}")
    return indices


def _shrunk_config(config: ModelConfig, chosen: Mapping[str, Sequence[int]]) -> ModelConfig:
    """The shallower model's config; its layers must fit the pattern of the MoE layers."""
    moe = config.moe
    changes: dict[str, Any] = {"num_layers": len(next(iter(chosen.values())))}
    if "decoder." in chosen:
        changes["num_decoder_layers"] = len(chosen["decoder."])
    if moe is not None:
        kept = []  # numbers of experts
        # One number for each MoE layer, the encoder's before the decoder's.
        counts = cycle(moe.expert_counts)
        for prefix, depth in _depths(config).items():
            of_layer = {i: next(counts) for i in range(depth) if config.is_moe_layer(i)}
            for place, index in enumerate(chosen[prefix]):
                _require_the_same_kind(config, prefix, index, place)
            kept += [of_layer[index] for index in chosen[prefix] if index in of_layer]
        if not kept:
            there = [str(index) for index in range(config.num_layers) if config.is_moe_layer(index)]
            raise UserError(
                f"none of the layers that are named is a MoE layer, as {', '.join(there)} are: "
                "name one of these too, or make the model dense first with `magnetar convert "
                "densify`"
            )
        if isinstance(moe.num_experts, list):
            changes["moe"] = moe.model_dump(mode="json") | {"num_experts": kept}
    return checked_model(config.model_dump(mode="json") | changes, "no such shallower model")


def _require_the_same_kind(config: ModelConfig, prefix: str, index: int, place: int) -> None:
    """Refuse a MoE layer that would take a dense one's place, and the reverse."""
    was, wanted = (("a dense", "a MoE")[config.is_moe_layer(i)] for i in (index, place))
    if was != wanted:
        assert config.moe is not None
        student = f"the student's {prefix[:-1]}" if prefix else "the student"
        raise UserError(
            f"layer {index}, {was} layer, would become layer {place} of {student}, where "
            f"moe.every={config.moe.every} wants {wanted} layer: choose layers that fit, or make "
            "the model dense first with `python -m magnetar convert densify`"
        )
