"""Matrices: torch's, so called that every ZeRO stage rounds alike."""

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A matrix that sees one matrix of tokens, whatever the shape of its input.

    DeepSpeed puts a function of its own in the place of F.linear under ZeRO 3. Of inputs with three
    dimensions it rounds the product, adds the bias and rounds again; of two it does what torch
    does.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        flat = x.reshape(-1, self.in_features)
        return F.linear(flat, self.weight, self.bias).view(*x.shape[:-1], self.out_features)


class WideLinear(nn.Linear):
    """A matrix that multiplies in float32, whatever the type of its weight and its input."""

    def forward(self, h: Tensor) -> Tensor:
        """(N, d_in) of any float dtype -> (N, d_out) float32."""
        return F.linear(h.float(), self.weight.float())
