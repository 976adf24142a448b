"""The experts of one rank with kernels between and around their grouped matrix products.

Letters: E experts, A rows sorted by expert, D d_model, F d_ff.
"""

from typing import Any

import torch
from torch import Tensor

from models.kernels import activation
from models.kernels.activation import Activation
from models.kernels.matmul import matmul_activation, matmul_activation_backward


class SparseNetwork(torch.autograd.Function):
    """w2(h), h = act(w1(rows) + b1), normed with Sub-LN: an expert without its last bias."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        w1: Tensor,
        b1: Tensor,
        gain: Tensor | None,
        shift: Tensor | None,
        w2: Tensor,
        offsets: Tensor,
        name: str,
        eps: float,
    ) -> Tensor:
        """Apply each expert to its rows.

        Args:
            ctx: autograd's.
            rows: (A, D).
            w1: (E, D, F).
            b1: (E, F).
            gain: (E, F) of the inner LayerNorm; None: there is none.
            shift: (E, F), likewise.
            w2: (E, F, D).
            offsets: (E,) int32, where each expert's rows end.
            name: of the activation.
            eps: of the LayerNorm.

        Returns:
            (A, D).
        """
        means = scales = None
        if _fused(rows, gain):
            x, h = matmul_activation(rows, w1, b1, offsets, name)
        else:
            x = torch._grouped_mm(rows, w1, offs=offsets)
            h, means, scales = activation.forward(
                x, Activation(name, b1, gain, shift, eps), offsets
            )
        ctx.save_for_backward(rows, w1, b1, gain, shift, w2, offsets, x, h, means, scales)
        ctx.name, ctx.eps = name, eps
        return torch._grouped_mm(h, w2, offs=offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """(A, D) -> gradients of rows, w1, b1, gain, shift and w2."""
        rows, w1, b1, gain, shift, w2, offsets, x, h, means, scales = ctx.saved_tensors
        grad, grad_gain, grad_shift = grad.contiguous(), None, None
        grad_w2 = torch._grouped_mm(h.t(), grad, offs=offsets)
        if _fused(rows, gain):
            grad_x, grad_b1 = matmul_activation_backward(grad, w2, x, b1, offsets, ctx.name)
        else:
            grad_h = torch._grouped_mm(grad, w2.transpose(1, 2), offs=offsets)
            between = Activation(ctx.name, b1, gain, shift, ctx.eps)
            grad_x, grad_b1, grad_gain, grad_shift = activation.backward(
                grad_h, x, between, offsets, means, scales
            )
        grad_w1 = torch._grouped_mm(rows.t(), grad_x, offs=offsets)
        grad_rows = torch._grouped_mm(grad_x, w1.transpose(1, 2), offs=offsets)
        return grad_rows, grad_w1, grad_b1, grad_gain, grad_shift, grad_w2, None, None, None


def _fused(rows: Tensor, gain: Tensor | None) -> bool:
    """Whether the activation is done by the matrix product: a norm needs whole rows first."""
    return gain is None and rows.element_size() == 2 and rows.size(1) % 64 == 0
