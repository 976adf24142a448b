"""The experts of one rank with kernels between and around their grouped matrix products.

Letters: E experts, A rows sorted by expert, D d_model, F d_ff.
"""

from typing import Any

import torch
from torch import Tensor

from magnetar.models.moe.kernels import activation
from magnetar.models.moe.kernels.activation import Activation
from magnetar.models.moe.kernels.weight_gradient import weight_gradient


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
        x = torch._grouped_mm(rows, w1, offs=offsets)
        between = Activation(name, b1, gain, shift, eps)
        h, means, scales = activation.forward(x, between, offsets)
        ctx.save_for_backward(rows, w1, b1, gain, shift, w2, offsets, x, h, means, scales)
        ctx.name, ctx.eps = name, eps
        return torch._grouped_mm(h, w2, offs=offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """(A, D) -> gradients of rows, w1, b1, gain, shift and w2."""
        rows, w1, b1, gain, shift, w2, offsets, x, h, means, scales = ctx.saved_tensors
        grad = grad.contiguous()
        nodes = [node for node, _ in ctx.next_functions]  # of tensors: no norm has none
        grad_w2 = weight_gradient(nodes[-2], h, grad, offsets)
        grad_h = torch._grouped_mm(grad, w2.transpose(1, 2), offs=offsets)
        between = Activation(ctx.name, b1, gain, shift, ctx.eps)
        grad_x, *grads = activation.backward(grad_h, x, between, offsets, means, scales)
        grad_w1 = weight_gradient(nodes[1], rows, grad_x, offsets)
        grad_rows = torch._grouped_mm(grad_x, w1.transpose(1, 2), offs=offsets)
        return grad_rows, grad_w1, *grads, grad_w2, None, None, None
