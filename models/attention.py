"""Causal self-attention.

Letters: B batch, T tokens, D d_model, H num_heads.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.init import RandomSource


class SelfAttention(nn.Module):
    """Multi-head causal self-attention, optionally with Sub-LN's inner LayerNorm."""

    def __init__(
        self, d_model: int, num_heads: int, dropout: float, inner_norm: bool, gain: float
    ) -> None:
        """Build the layer.

        Args:
            d_model: width of the residual stream.
            num_heads: heads; divides d_model.
            dropout: probability of dropping an attention weight in training.
            inner_norm: a LayerNorm before the output projection (Sub-LN).
            gain: initial gain of the value and output projections.
        """
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.gain = gain
        self.qkv_proj = nn.Linear(d_model, 3 * d_model)
        self.inner_norm = nn.LayerNorm(d_model) if inner_norm else nn.Identity()
        self.out_proj = nn.Linear(d_model, d_model)

    def init_weights(self, source: RandomSource) -> None:
        """Xavier-normal: gain 1 for query and key, `gain` for value and output; biases 0."""
        for part, gain in enumerate((1.0, 1.0, self.gain)):
            matrix = self.qkv_proj.weight.data.chunk(3)[part]
            source.xavier_normal_(matrix, "qkv_proj.weight", gain, part=part)
        source.xavier_normal_(self.out_proj.weight.data, "out_proj.weight", self.gain)
        nn.init.zeros_(self.qkv_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to the positions up to and including one's own.

        Args:
            x: (B, T, D).

        Returns:
            (B, T, D), in the dtype of x.
        """
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, H, D/H)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, T, D/H) each
        heads = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out_proj(self.inner_norm(heads.transpose(1, 2).flatten(-2)))
