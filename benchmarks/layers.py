"""The parts of the layer benchmark: a shape, a layer ready to run, and inputs that balance it.

Letters: N tokens, D d_model, E experts, K top_k, R width of the router's space.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnetar.models.layers.feed_forward import FeedForward
from magnetar.models.layers.init import RandomSource
from magnetar.models.moe.config import MoELayerConfig
from magnetar.models.moe.layer import MoE

AUX_LOSS_WEIGHT = 0.01
MAX_SEQUENCE = 512  # tokens; only how the N tokens are laid out as (sequences, tokens, D)


@dataclass(frozen=True)
class Shape:
    """Sizes, device and type of a measurement."""

    tokens: int
    d_model: int
    d_ff: int
    top_k: int
    num_experts: int
    device: torch.device
    dtype: torch.dtype

    @property
    def useful_flops(self) -> int:
        """FLOPs of the two matrices of K experts a token: once forward, twice that backward."""
        return 12 * self.tokens * self.top_k * self.d_model * self.d_ff

    @property
    def sequences(self) -> int:
        """Number of sequences of equal length that the tokens are divided into."""
        return self.tokens // math.gcd(self.tokens, MAX_SEQUENCE)


@dataclass(frozen=True)
class Scorer:
    """The weights by which a router scores: W x, or e_i . (P x) / ||e_i|| in a narrow space.

    Attributes:
        experts: (E, D), or (E, R) with a projection.
        projection: (R, D), or None: the experts' rows meet the tokens themselves.
    """

    experts: Tensor
    projection: Tensor | None = None

    def load(self, x: Tensor, top_k: int) -> Tensor:
        """(N, D) -> (E,) int64, tokens that choose each expert, nothing dropped."""
        h, experts = x.detach().float(), self.experts.detach().float()
        if self.projection is not None:
            h, experts = h @ self.projection.detach().float().t(), F.normalize(experts, dim=-1)
        chosen = (h @ experts.t()).topk(top_k, dim=-1).indices
        return F.one_hot(chosen.flatten(), experts.size(0)).sum(0)

    @torch.no_grad()
    def balance(self, shape: Shape, generator: torch.Generator) -> Tensor:
        """Overwrite the weights, and return the (N, D) tokens whose routing they make even.

        Token t goes to the experts of group t mod (E / K): K experts whose rows are nearly equal,
        in an order that is random. The layer's code is left as it is and pays what it always pays:
        only the numbers are chosen. A token is Gaussian noise but for its part in the router's
        space.
        """
        num_groups = shape.num_experts // shape.top_k
        width = min(shape.d_model, num_groups)
        if self.projection is not None:
            width = self.projection.size(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=shape.device)

        projection = torch.linalg.qr(normal(shape.d_model, width)).Q.t()  # (R, D), orthonormal
        if num_groups <= width:
            groups = torch.linalg.qr(normal(width, num_groups)).Q.t()  # (E / K, R)
        else:
            groups = F.normalize(normal(num_groups, width), dim=-1)
        rows = groups.repeat_interleave(shape.top_k, dim=0)  # (E, R)
        others = normal(*rows.shape)
        others = others - (others * rows).sum(-1, keepdim=True) * rows
        experts = rows + 0.1 * F.normalize(others, dim=-1)

        x = normal(shape.tokens, shape.d_model)
        group_of = torch.arange(shape.tokens, device=shape.device) % num_groups
        position = groups[group_of] + 0.05 * normal(shape.tokens, width) / math.sqrt(width)
        length = 2 * math.sqrt(width)
        x += (length * position - x @ projection.t()) @ projection
        if self.projection is None:
            # Scores of 10: far enough above the others' 0 in bf16.
            self.experts.copy_(10 / length * experts @ projection)
        else:
            self.projection.copy_(projection)
            self.experts.copy_(experts)
        return x.to(shape.dtype)


@dataclass(frozen=True)
class Layer:
    """A layer ready to be measured.

    Attributes:
        module: holds the parameters.
        apply: (sequences, tokens, D) -> the output and the weighted balance loss; None without one,
            or if the layer adds it to the gradient itself.
        scorer: weights of the router; None for a dense layer.
        flops: FLOPs of one forward and backward pass, as Shape.useful_flops counts them.
        note: remark for a reader about this layer, or "".
    """

    module: nn.Module
    apply: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    scorer: Scorer | None
    flops: int
    note: str = ""


@dataclass(frozen=True)
class Contender:
    """Something to measure.

    Attributes:
        label: name in tables and pictures.
        build: function that makes the layer; it raises NotInstalled if a package is missing.
        yardstick: name of the dense layer that its time is divided by.
        is_dense: whether the number of experts does not matter to it.
        is_ours: whether it is Magnetar's sparse layer.
    """

    label: str
    build: Callable[[Shape], Layer]
    yardstick: str = "dense"
    is_dense: bool = False
    is_ours: bool = False


class NotInstalled(Exception):
    """A peer's package is not there."""


def build_dense(shape: Shape, *, inner_norm: bool = False, compiled: bool = False) -> Layer:
    """Our dense network with the useful FLOPs of the sparse layers: width K * d_ff."""
    with torch.device(shape.device):
        ffn = FeedForward(shape.d_model, shape.top_k * shape.d_ff, "gelu", inner_norm, 1.0)
    ffn.init_weights(RandomSource(1, "ffn"))
    ffn.to(shape.dtype)
    forward = torch.compile(ffn) if compiled else ffn

    def apply(x: Tensor) -> tuple[Tensor, None]:
        return forward(x), None

    return Layer(ffn, apply, None, shape.useful_flops)


def build_ours(shape: Shape, *, router: str = "xmoe", inner_norm: bool = False) -> Layer:
    """Our sparse layer as the model builds it: dropless, GELU."""
    moe = MoELayerConfig.model_validate(
        {"num_experts": shape.num_experts, "top_k": shape.top_k, "router": router}
    )
    with torch.device(shape.device):
        layer = MoE(shape.d_model, shape.d_ff, moe, "gelu", inner_norm, 1.0)
    gate: Any = layer.deepspeed_moe.gate
    gate.init_weights(RandomSource(1, "gate"))
    layer.init_weights(RandomSource(1, "experts"))
    layer.to(shape.dtype)

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        out, stats = layer(x)
        return out, AUX_LOSS_WEIGHT * stats.aux_loss

    if router == "xmoe":
        scorer = Scorer(gate.centroids, gate.projection.weight)
    else:
        scorer = Scorer(gate.wg.weight)
    return Layer(layer, apply, scorer, shape.useful_flops)
