"""The recipe of each of Magnetar's tensors out of TorchScale's.

The mapping runs backwards, from Magnetar's names to TorchScale's, so that every message can name
the tensors as the user's file does.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from magnetar.convert.experts import DENSE, place_of

# Learned positions start at this row in TorchScale, as in fairseq with its padding index of 1.
FIRST_POSITION = 2
# What a state dict may hold beside weights: fairseq's version numbers and its device marker, the
# table that XPOS computes from its width, and the count of torch.optim.swa_utils.
XPOS = "xpos.scale"
NOT_WEIGHTS = re.compile(r"(.*\.)?(version|_float_tensor|xpos\.scale|n_averaged)")

_RENAMED_IN_BOTH = (
    (r"\bpools\.0\b", "A"),
    (r"\bpools\.1\b", "B"),
    (r"^blocks\b", "layers"),
    (r"^embedding\b", "embed_tokens"),
    (r"^embedding_norm\b", "layernorm_embedding"),
    (r"^positions\b", "embed_positions"),
    (r"^final_norm\b", "layer_norm"),
    (r"^output\b", "output_projection"),
    (r"\battention_residual\.norm\b", "self_attn_layer_norm"),
    (r"\bcross_attention_residual\.norm\b", "encoder_attn_layer_norm"),
    (r"\bffn_residual\.norm\b", "final_layer_norm"),
    (r"\bcross_attention\b", "encoder_attn"),
    (r"\battention\.inner_norm\b", "self_attn.inner_attn_ln"),
    (r"\battention\b", "self_attn"),
    (r"\binner_norm\b", "ffn_layernorm"),
    (r"\bw1\b", "fc1"),
    (r"\bw2\b", "fc2"),
    (r"\bffn\.deepspeed_moe\b", "moe_layer"),
    (r"\bexperts\.deepspeed_experts\b", "experts"),
    (r"\bgate\.projection\.weight$", "gate.wg_reduction.weight"),
    (r"\bgate\.centroids$", "gate.wg"),
)
_TABLE = "relative_attention_bias.weight"
_RENAMED = {
    "encoder": (*_RENAMED_IN_BOTH, (r"^relative_bias\.weight$", f"relative_position.{_TABLE}")),
    "decoder": (
        *_RENAMED_IN_BOTH,
        (r"^relative_bias\.weight$", f"self_attn_relative_position.{_TABLE}"),
        (r"^cross_relative_bias\.weight$", f"cross_attn_relative_position.{_TABLE}"),
    ),
}
_STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "kv_proj": ("k_proj", "v_proj")}


class Stack(NamedTuple):
    """One of a model's stacks of layers.

    Attributes:
        side: "encoder" or "decoder".
        theirs: prefix of its tensors' names in TorchScale's state dict.
        ours: prefix of its tensors' names in Magnetar's state dict.
    """

    side: str
    theirs: str
    ours: str


@dataclass(frozen=True)
class Recipe:
    """The recipe of one of Magnetar's tensors.

    Attributes:
        sources: TorchScale's name -> shape of each source, in the order in which they are stacked
            along the first dimension.
        transposed: whether the single source is transposed.
        first_row: index of the first row that is taken from the single source.
    """

    sources: dict[str, tuple[int, ...]]
    transposed: bool = False
    first_row: int = 0

    def make(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor as a float32 copy."""
        parts = [tensors[name].float()[self.first_row :] for name in self.sources]
        if self.transposed:
            return parts[0].t().clone(memory_format=torch.contiguous_format)
        return torch.cat(parts)


def recipe(name: str, shape: tuple[int, ...], stack: Stack) -> Recipe:
    """The recipe of one of Magnetar's tensors.

    Args:
        name: name such as "blocks.0.attention.qkv_proj.weight", or the same after "encoder.".
        shape: shape of the tensor.
        stack: stack that the tensor belongs to.
    """
    name = name.removeprefix(stack.ours)
    place = place_of(name)
    is_expert = place is not None and place.expert is not None
    if place is not None and is_expert:  # TorchScale's experts are networks like the dense one
        name = name.removesuffix(place.parameter) + DENSE[place.parameter]
    source = stack.theirs + _renamed(name, stack.side)
    if is_expert and len(shape) == 2:
        return Recipe({source: shape[::-1]}, transposed=True)
    if name == "positions.weight":
        rows, width = shape
        return Recipe({source: (rows + FIRST_POSITION, width)}, first_row=FIRST_POSITION)
    for stacked, parts in _STACKED.items():
        if f".{stacked}." in source:
            part_shape = (shape[0] // len(parts), *shape[1:])
            return Recipe({source.replace(stacked, part): part_shape for part in parts})
    return Recipe({source: shape})


def _renamed(name: str, side: str) -> str:
    for pattern, replacement in _RENAMED[side]:
        name = re.sub(pattern, replacement, name)
    return name
