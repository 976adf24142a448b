"""The dense feed-forward network.

Letters: D d_model, F d_ff.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from models.init import RandomSource

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


class FeedForward(nn.Module):
    """w2(LN(activation(w1 x))): two matrices, the LayerNorm only with Sub-LN."""

    def __init__(
        self, d_model: int, d_ff: int, activation: str, inner_norm: bool, gain: float
    ) -> None:
        """Build the network; `gain` is the initial gain of both matrices."""
        super().__init__()
        self.gain = gain
        self.activation = ACTIVATIONS[activation]
        self.w1 = nn.Linear(d_model, d_ff)
        self.inner_norm = nn.LayerNorm(d_ff) if inner_norm else nn.Identity()
        self.w2 = nn.Linear(d_ff, d_model)

    def init_weights(self, source: RandomSource) -> None:
        """Xavier-normal with `gain`; biases 0."""
        for name, linear in (("w1", self.w1), ("w2", self.w2)):
            source.xavier_normal_(linear.weight.data, f"{name}.weight", self.gain)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.w2(self.inner_norm(self.activation(self.w1(x))))
