"""The dense feed-forward network.

Letters: D d_model, F d_ff.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from magnetar.models.layers.init import RandomSource
from magnetar.models.layers.norms import layer_norm


class Linear(nn.Linear):
    """nn.Linear that flattens its input to two dimensions.

    Where weights are sharded DeepSpeed replaces F.linear. With three-dimensional inputs its
    function rounds the product, adds the bias and rounds again; with two it does what torch does.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        flat = x.reshape(-1, self.in_features)
        return F.linear(flat, self.weight, self.bias).view(*x.shape[:-1], self.out_features)


def zero_bias(linear: nn.Module) -> None:
    """Set the bias of a linear layer to 0, if it has one."""
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)  # type: ignore[arg-type]


class WideLinear(nn.Linear):
    """nn.Linear that multiplies in float32, whatever the dtype of its weight and input."""

    def forward(self, h: Tensor) -> Tensor:
        """(N, d_in) of any float dtype -> (N, d_out) float32."""
        return F.linear(h.float(), self.weight.float())


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "swish": F.silu,
    "swiglu": F.silu,
}
# activation(w1 x) * (w3 x) in place of activation(w1 x) (arXiv 2002.05202).
GATED_ACTIVATIONS = {"swiglu"}


class FeedForward(nn.Module):
    """w2(LN(activation(w1 x))), the LayerNorm only with Sub-LN and NormFormer.

    A gated activation has a third matrix: w2(LN(activation(w1 x) * (w3 x))).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: str,
        inner_norm: bool,
        gain: float,
        norm_eps: float = 1e-5,
        activation_dropout: float = 0.0,
        norm_type: str = "layernorm",
        bias: bool = True,
    ) -> None:
        """Build the network.

        Args:
            d_model: width of the residual stream.
            d_ff: inner width.
            activation: key of ACTIVATIONS.
            inner_norm: whether a LayerNorm precedes the second matrix.
            gain: initial gain of all matrices.
            norm_eps: epsilon of the LayerNorm.
            activation_dropout: probability of dropping an activation in training.
            norm_type: kind of the norm, see `layer_norm`.
            bias: whether matrices and a LayerNorm have biases.
        """
        super().__init__()
        self.gain = gain
        self.activation = ACTIVATIONS[activation]
        self.w1 = Linear(d_model, d_ff, bias)
        self.w3 = Linear(d_model, d_ff, bias) if activation in GATED_ACTIVATIONS else None
        self.dropout = nn.Dropout(activation_dropout)
        self.inner_norm = (
            layer_norm(d_ff, norm_eps, norm_type, bias) if inner_norm else nn.Identity()
        )
        self.w2 = Linear(d_ff, d_model, bias)

    def init_weights(self, source: RandomSource) -> None:
        """Xavier-normal with `gain`; biases 0."""
        for name in ("w1", "w2", "w3"):
            linear = getattr(self, name)
            if linear is not None:
                source.xavier_normal_(linear.weight.data, f"{name}.weight", self.gain)
                zero_bias(linear)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        h = self.activation(self.w1(x))  # (..., F)
        if self.w3 is not None:
            h = h * self.w3(x)
        return self.w2(self.inner_norm(self.dropout(h)))
