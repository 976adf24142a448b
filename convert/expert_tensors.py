"""The tensors of a dense feed-forward network, and those of an expert of the same shape.

Letters: D d_model, F d_ff.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

# An expert's parameter -> the dense network's. Matrices of experts are transposed: (D, F) there,
# (F, D) in a Linear.
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
EXPERT = {dense: expert for expert, dense in DENSE.items()}
_EXPERT_NAME = re.compile(r"(.*\.ffn)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(\w+)")
_DENSE_NAME = re.compile(r"(.*\.ffn)\.(" + "|".join(map(re.escape, EXPERT)) + ")")


class Place(NamedTuple):
    """The place of a tensor in a feed-forward network.

    Attributes:
        ffn: name of the network, such as "blocks.1.ffn".
        parameter: name of the tensor in an expert, a key of DENSE.
        expert: index of the expert; None in a dense network.
    """

    ffn: str
    parameter: str
    expert: int | None = None


def place_of(name: str) -> Place | None:
    """The place of a tensor; None if it belongs to no feed-forward network."""
    if found := _EXPERT_NAME.fullmatch(name):
        return Place(found[1], found[3], int(found[2]))
    if found := _DENSE_NAME.fullmatch(name):
        return Place(found[1], EXPERT[found[2]])
    return None


def name_at(place: Place) -> str:
    """The name of the tensor at a place."""
    ffn, parameter, expert = place
    if expert is None:
        return f"{ffn}.{DENSE[parameter]}"
    return f"{ffn}.deepspeed_moe.experts.deepspeed_experts.{expert}.{parameter}"


def turned(tensor: Tensor) -> Tensor:
    """A copy of a dense network's tensor as an expert's, or the other way round."""
    return tensor.t().contiguous() if tensor.dim() == 2 else tensor


def experts_of_layers(names: Iterable[str]) -> dict[str, int]:
    """The number of experts of each MoE layer, by its network's name, from the tensors' names."""
    counts: dict[str, int] = {}
    for place in map(place_of, names):
        if place is not None and place.expert is not None:
            counts[place.ffn] = max(counts.get(place.ffn, 0), place.expert + 1)
    return counts
