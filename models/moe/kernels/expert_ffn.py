"""The feed-forward networks of the experts: grouped matmuls with kernels between and around them.

Letters: E experts of this rank, A rows that this rank sends, R rows sorted by expert, D d_model,
F d_ff.

    rows (R, D) @ w1 -> x (R, F) -> + b1, activation, inner LayerNorm -> h (R, F) @ w2 -> (R, D)

`ExpertFFN` runs where all rows are on this rank. `AllToAllExpertFFN` has the all-to-alls of expert
parallelism around the same network.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from magnetar.models.moe.all_to_all import AllToAll
from magnetar.models.moe.kernels import activation
from magnetar.models.moe.kernels.activation import Activation
from magnetar.models.moe.kernels.segments import (
    Segments,
    segments_of,
    sort_and_sum_segments,
    sort_segments,
    unsort_segments,
)
from magnetar.models.moe.kernels.weight_gradient import weight_gradient


def _grouped_mm(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """(R, X) and (E, X, Y) -> (R, Y)."""
    if rows.size(0) == 0:  # no kernel can be launched for an empty grid
        return rows.new_empty(0, matrices.size(-1))
    return torch._grouped_mm(rows, matrices, offs=offsets)


def _weight_gradient(node: Any, rows: Tensor, grad: Tensor, offsets: Tensor) -> Tensor | None:
    """(R, X) and (R, Y) -> (E, X, Y) for a node of `next_functions`; None if it needs none."""
    if node is None:
        return None
    if rows.size(0) == 0:
        return rows.new_zeros(offsets.numel(), rows.size(1), grad.size(1))
    return weight_gradient(node, rows, grad, offsets)


class ExpertFFN(torch.autograd.Function):
    """w2(h) with h = LN(act(w1(rows) + b1)): an expert without its output bias."""

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
            ctx: autograd's context.
            rows: (R, D).
            w1: (E, D, F).
            b1: (E, F).
            gain: (E, F), weight of the inner LayerNorm; None without one.
            shift: (E, F), bias of the inner LayerNorm; None without one.
            w2: (E, F, D).
            offsets: (E,) int32, end of each expert's rows.
            name: name of the activation.
            eps: epsilon of the LayerNorm.

        Returns:
            (R, D).
        """
        x = _grouped_mm(rows, w1, offsets)  # (R, F)
        h, means, scales = activation.forward(x, Activation(name, b1, gain, shift, eps), offsets)
        ctx.save_for_backward(rows, w1, b1, gain, shift, w2, offsets, x, h, means, scales)
        ctx.name, ctx.eps = name, eps
        return _grouped_mm(h, w2, offsets)  # (R, D)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """(R, D) -> gradients of rows, w1, b1, gain, shift and w2."""
        rows, w1, b1, gain, shift, w2, offsets, x, h, means, scales = ctx.saved_tensors
        grad = grad.contiguous()
        # next_functions has an entry for each tensor argument, None for the two absent norms.
        nodes = [node for node, _ in ctx.next_functions]
        grad_w2 = _weight_gradient(nodes[-2], h, grad, offsets)
        grad_h = _grouped_mm(grad, w2.transpose(1, 2), offsets)
        between = Activation(ctx.name, b1, gain, shift, ctx.eps)
        grad_x, *grads = activation.backward(grad_h, x, between, offsets, means, scales)
        grad_w1 = _weight_gradient(nodes[1], rows, grad_x, offsets)
        grad_rows = _grouped_mm(grad_x, w1.transpose(1, 2), offsets)
        return grad_rows, grad_w1, *grads, grad_w2, None, None, None


class AllToAllExpertFFN(torch.autograd.Function):
    """Dispatch, w2(h) + b2 on the ranks that hold the experts, combine."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        w1: Tensor,
        b1: Tensor,
        gain: Tensor | None,
        shift: Tensor | None,
        w2: Tensor,
        b2: Tensor,
        all_to_all: AllToAll,
        name: str,
        eps: float,
    ) -> Tensor:
        """Send each row to its expert and receive the expert's output for it.

        Args:
            ctx: autograd's context.
            rows: (A, D), sorted as models.moe.all_to_all says.
            w1: see ExpertFFN, as is what is not named here.
            b1: see ExpertFFN.
            gain: see ExpertFFN.
            shift: see ExpertFFN.
            w2: see ExpertFFN.
            b2: (E, D).
            all_to_all: the layer's all-to-alls.
            name: see ExpertFFN.
            eps: see ExpertFFN.

        Returns:
            (A, D).
        """
        rows = rows.contiguous()
        segments = segments_of(all_to_all.recv_counts(), all_to_all.rank)
        received = rows.new_empty(all_to_all.num_received_remote, rows.size(1))  # (S, D)
        with all_to_all.timed("time_falltoall"):
            all_to_all.start_dispatch(rows, received).wait()
        to_send, out = torch.empty_like(received), torch.empty_like(rows)
        inputs = rows.new_empty(all_to_all.num_received, rows.size(1))  # (R, D)
        sort_segments(all_to_all, segments, received, rows, inputs)
        x = _grouped_mm(inputs, w1, segments.offsets)  # (R, F)
        between = Activation(name, b1, gain, shift, eps)
        h, means, scales = activation.forward(x, between, segments.offsets)  # (R, F)
        y = _grouped_mm(h, w2, segments.offsets)  # (R, D)
        unsort_segments(all_to_all, segments, y, to_send, out, b2)
        with all_to_all.timed("time_salltoall"):
            all_to_all.start_combine(to_send, out).wait()
        ctx.save_for_backward(w1, b1, gain, shift, w2, b2, inputs, h, x, means, scales, *segments)
        ctx.all_to_all, ctx.name, ctx.eps = all_to_all, name, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """(A, D) -> gradients of rows, w1, b1, gain, shift, w2 and b2."""
        w1, b1, gain, shift, w2, b2, inputs, h, x, means, scales, *where = ctx.saved_tensors
        segments, all_to_all = Segments(*where), ctx.all_to_all
        grad = grad.contiguous()
        received = grad.new_empty(all_to_all.num_received_remote, grad.size(1))  # (S, D)
        all_to_all.start_dispatch(grad, received).wait()
        grad_y, to_send = torch.empty_like(inputs), torch.empty_like(received)
        grad_rows = torch.empty_like(grad)
        sums = sort_and_sum_segments(all_to_all, segments, received, grad, grad_y)  # (L*W, D)
        grad_h = _grouped_mm(grad_y, w2.transpose(1, 2), segments.offsets)  # (R, F)
        between = Activation(ctx.name, b1, gain, shift, ctx.eps)
        grad_x, *grads = activation.backward(grad_h, x, between, segments.offsets, means, scales)
        grad_inputs = _grouped_mm(grad_x, w1.transpose(1, 2), segments.offsets)  # (R, D)
        unsort_segments(all_to_all, segments, grad_inputs, to_send, grad_rows)
        # The weights' gradients are computed while the rows' gradients travel back.
        work = all_to_all.start_combine(to_send, grad_rows)
        nodes = [node for node, _ in ctx.next_functions]  # see ExpertFFN
        grad_w2 = _weight_gradient(nodes[-2], h, grad_y, segments.offsets)
        grad_w1 = _weight_gradient(nodes[1], inputs, grad_x, segments.offsets)
        grad_b2 = sums.unflatten(0, (b2.size(0), -1)).sum(1).to(b2.dtype)
        work.wait()
        return grad_rows, grad_w1, *grads, grad_w2, grad_b2, None, None, None
