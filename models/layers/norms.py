"""The norm styles: the places of the LayerNorms, the residual scales, the initial gains.

NORM_STYLES has one row for each style. The pictures show the residual stream of one sublayer f,
which is attention, cross-attention or a feed-forward network. f_out is its last matrix
(attention's output projection, the feed-forward network's w2), and f_in is all before it:

    pre         x --+--> LN --> f ------------------------------> + --> x
                    |                                             ^
                    +---------------------------------------------+

    post        x --+--> f --------------------> + --> LN --> x
                    |                            ^
                    +----------------------------+

    subln       x --+--> LN --> f_in --> LN --> f_out ----------> + --> x
                    |                                             ^
                    +---------------------------------------------+

    deepnorm    x --+--> f --------------------> + --> LN --> x
                    |                            ^
                    +--------- * alpha ----------+

    normformer  x --+--> LN --> heads * scale --> f_out --> LN -> + --> x      (self-attention)
                    |                                             ^
                    +---------------------------------------------+
                x --+--> LN --> f ------------------------------> + --> x      (cross-attention)
                    |                                             ^
                    +---------------------------------------------+
                x --+--> LN --> f_in --> LN --> f_out ----------> + --> x      (feed-forward)
                    |                                             ^
                    +---------------------------------------------+

    admin       x --+--> f --------------------> + --> LN --> x
                    |                            ^
                    +--------- * omega ----------+          omega: a vector of each sublayer

The styles whose sublayers start with a LayerNorm (pre, subln, normformer) end each stack with one
more. N is the number of encoder layers and M of decoder layers:

                             residual scale alpha                      gain of feed-forward,
                                                                       value and output matrices
    deepnorm  one stack      (2L)^(1/4)                                (8L)^(-1/4)
              encoder of two 0.81 (N^4 M)^(1/16)                       0.87 (N^4 M)^(-1/16)
              decoder of two (3M)^(1/4)                                (12M)^(-1/4)
    subln     one stack      1                                         sqrt(ln 2L)
              encoder of two 1                                         sqrt(ln 3M * ln 2N / 3)
              decoder of two 1                                         sqrt(ln 3M)
    others                   1                                         1

Matrices start Xavier-normal with that gain, query and key with gain 1.

LN is a LayerNorm, or with norm_type "rmsnorm" an RMSNorm, x / sqrt(mean(x^2) + eps) * weight (arXiv
1910.07467).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from magnetar.models.layers.multiway import Multiway, per_modality

Sublayer = Literal["attention", "cross_attention", "ffn"]


class Depths(NamedTuple):
    """The depths of a model's stacks, and which of them this is; alpha and gain follow from it.

    Attributes:
        encoder: N, layers of the encoder; 0 without one.
        decoder: M, layers of the decoder; 0 without one.
        in_encoder: whether the stack is the encoder.
    """

    encoder: int
    decoder: int
    in_encoder: bool

    @property
    def is_alone(self) -> bool:
        """Whether the model has one stack."""
        return not (self.encoder and self.decoder)

    @property
    def own(self) -> int:
        """Layers of the stack itself."""
        return self.encoder if self.in_encoder else self.decoder


def deepnorm_alpha(depths: Depths) -> float:
    """alpha of DeepNorm (arXiv 2203.00555, fig. 2)."""
    if depths.is_alone:
        return (2 * depths.own) ** 0.25
    if depths.in_encoder:
        return 0.81 * (depths.encoder**4 * depths.decoder) ** (1 / 16)
    return (3 * depths.decoder) ** 0.25


def deepnorm_beta(depths: Depths) -> float:
    """beta of DeepNorm (arXiv 2203.00555, fig. 2)."""
    if depths.is_alone:
        return (8 * depths.own) ** -0.25
    if depths.in_encoder:
        return 0.87 * (depths.encoder**4 * depths.decoder) ** (-1 / 16)
    return (12 * depths.decoder) ** -0.25


def subln_gain(depths: Depths) -> float:
    """gamma of Sub-LN (arXiv 2210.06423, fig. 2)."""
    if depths.is_alone:
        return math.sqrt(math.log(2 * depths.own))
    if depths.in_encoder:
        return math.sqrt(math.log(3 * depths.decoder) * math.log(2 * depths.encoder) / 3)
    return math.sqrt(math.log(3 * depths.decoder))


@dataclass(frozen=True)
class NormStyle:
    """One row of the table.

    Attributes:
        before: True for a LayerNorm at the start of each sublayer and at the end of the stack,
            False for one after each residual sum.
        inner: sublayers with a LayerNorm before their last matrix.
        output: sublayers with a LayerNorm after their last matrix.
        head_scale: whether each self-attention head has a learned factor.
        omega: whether a learned vector scales the residual.
        alpha: function for the constant that scales the residual.
        gain: function for the gain of the Xavier-normal feed-forward, value and output matrices.
    """

    before: bool
    inner: frozenset[Sublayer] = frozenset()
    output: frozenset[Sublayer] = frozenset()
    head_scale: bool = False
    omega: bool = False
    alpha: Callable[[Depths], float] = lambda _: 1.0
    gain: Callable[[Depths], float] = lambda _: 1.0


_ALL: frozenset[Sublayer] = frozenset({"attention", "cross_attention", "ffn"})
NORM_STYLES = {
    "pre": NormStyle(before=True),
    "post": NormStyle(before=False),
    "subln": NormStyle(before=True, inner=_ALL, gain=subln_gain),
    "deepnorm": NormStyle(before=False, alpha=deepnorm_alpha, gain=deepnorm_beta),
    "normformer": NormStyle(
        before=True,
        inner=frozenset({"ffn"}),
        output=frozenset({"attention"}),
        head_scale=True,
    ),
    "admin": NormStyle(before=False, omega=True),
}


def layer_norm(
    width: int,
    eps: float,
    norm_type: str = "layernorm",
    bias: bool = True,
    *,
    multiway: bool = False,
) -> nn.Module:
    """A LayerNorm, or an RMSNorm, which has no bias; with multiway one for each modality."""
    is_rms = norm_type == "rmsnorm"
    norm = nn.RMSNorm(width, eps) if is_rms else nn.LayerNorm(width, eps, bias=bias)
    return Multiway(norm) if multiway else norm


class Residual(nn.Module):
    """The LayerNorms, residual sum and dropout around a sublayer.

    Use: `x = residual(x, sublayer(residual.before(x)))`.

    Parameters: `norm`; `output_norm` with NormFormer; `omega` (D,) with Admin.
    """

    def __init__(
        self,
        style: NormStyle,
        sublayer: Sublayer,
        d_model: int,
        alpha: float,
        *,
        dropout: float,
        drop_path: float,
        norm_eps: float,
        norm_type: str = "layernorm",
        bias: bool = True,
        multiway: bool,
    ) -> None:
        """Build the residual of one sublayer.

        Args:
            style: row of NORM_STYLES.
            sublayer: kind of the sublayer.
            d_model: width of the residual stream.
            alpha: factor of the residual.
            dropout: probability of dropping a number of the sublayer's output in training.
            drop_path: probability of dropping a sample's whole output in training.
            norm_eps: epsilon of the LayerNorms.
            norm_type: kind of the norms, "layernorm" or "rmsnorm".
            bias: whether LayerNorms have biases.
            multiway: whether each modality has LayerNorms of its own.
        """
        super().__init__()
        self.starts_with_norm = style.before
        self.alpha = alpha
        norm = partial(layer_norm, d_model, norm_eps, norm_type, bias, multiway=multiway)
        self.norm = norm()
        self.output_norm = norm() if sublayer in style.output else None
        self.omega = nn.Parameter(torch.ones(d_model)) if style.omega else None
        self.dropout = nn.Dropout(dropout)
        self.drop_path = drop_path

    def before(self, x: Tensor, split_position: int | None = None) -> Tensor:
        """The sublayer's input, (B, T, D) -> (B, T, D)."""
        return per_modality(self.norm, x, split_position) if self.starts_with_norm else x

    def forward(self, x: Tensor, output: Tensor, split_position: int | None = None) -> Tensor:
        """The residual stream x (B, T, D) plus the sublayer's output (B, T, D)."""
        if self.output_norm is not None:
            output = per_modality(self.output_norm, output, split_position)
        output = self._dropped_path(self.dropout(output))
        if self.omega is not None:
            x = x * self.omega
        elif self.alpha != 1.0:
            x = x * self.alpha
        x = x + output
        return x if self.starts_with_norm else per_modality(self.norm, x, split_position)

    def _dropped_path(self, output: Tensor) -> Tensor:
        """Stochastic depth: whole samples at 0, the others scaled up (arXiv 1603.09382)."""
        if not self.training or self.drop_path == 0.0:
            return output
        kept = torch.rand(output.size(0), 1, 1, device=output.device) >= self.drop_path
        return output * (kept / (1.0 - self.drop_path)).to(output.dtype)
