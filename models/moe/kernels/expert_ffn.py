"""The feed-forward networks of the experts: grouped matmuls with kernels between and around them.

Letters: E experts of this rank, A rows that this rank sends, R rows sorted by expert, S of them
from other ranks, D d_model, F d_ff.

    rows (R, D) @ w1 -> x (R, F) -> + b1, activation, inner LayerNorm -> h (R, F) @ w2 -> (R, D)

With expert parallelism an all-to-all brings the rows and another one takes the outputs back.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from magnetar.models.moe.all_to_all import AllToAll
from magnetar.models.moe.kernels import activation
from magnetar.models.moe.kernels.activation import Activation
from magnetar.models.moe.kernels.segments import Segments, move_segments, segments_of
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
    """w2(h) with h = LN(act(w1(rows) + b1)), on the ranks that hold the experts.

    Without an all-to-all the output bias is added where the rows are combined.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        w1: Tensor,
        b1: Tensor,
        gain: Tensor | None,
        shift: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        offsets: Tensor | None,
        all_to_all: AllToAll | None,
        name: str,
        eps: float,
    ) -> Tensor:
        """Apply each expert to its rows, (R, D) -> (R, D) or with all_to_all (A, D) -> (A, D).

        The parameters are w1 (E, D, F), w2 (E, F, D), b1, gain and shift (E, F), b2 (E, D). Gain
        and shift are the inner LayerNorm's, or None. Without all_to_all b2 is None and offsets
        (E,) int32 are the ends of the experts' rows; with it offsets is None, and the rows are
        sorted as models.moe.all_to_all says. `name` is the activation's, `eps` the LayerNorm's.
        """
        inputs, segments = rows, None
        if all_to_all is not None:
            rows = rows.contiguous()
            segments = segments_of(all_to_all.recv_counts(), all_to_all.rank)
            _, recv = all_to_all.row_counts
            received = rows.new_empty(recv.remote, rows.size(1))  # (S, D)
            with all_to_all.timed("time_falltoall"):
                all_to_all.start(rows, received).wait()
            inputs, offsets = rows.new_empty(recv.remote + recv.own, rows.size(1)), segments.offsets
            move_segments(all_to_all, segments, inputs, received, rows, arriving=True)
        assert offsets is not None
        x = _grouped_mm(inputs, w1, offsets)  # (R, F)
        h, means, scales = activation.forward(x, Activation(name, b1, gain, shift, eps), offsets)
        out = _grouped_mm(h, w2, offsets)  # (R, D)
        if all_to_all is not None and segments is not None:
            y, to_send, out = out, torch.empty_like(received), torch.empty_like(rows)
            move_segments(all_to_all, segments, y, to_send, out, arriving=False, bias=b2)
            with all_to_all.timed("time_salltoall"):
                all_to_all.start(to_send, out, back=True).wait()
        parameters = (w1, b1, gain, shift, w2, b2)
        ctx.save_for_backward(inputs, *parameters, offsets, x, h, means, scales, *(segments or ()))
        ctx.all_to_all, ctx.name, ctx.eps = all_to_all, name, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """(R, D) or (A, D) -> gradients of rows, w1, b1, gain, shift, w2 and b2."""
        inputs, w1, b1, gain, shift, w2, b2, offsets, x, h, means, scales, *where = (
            ctx.saved_tensors
        )
        all_to_all: AllToAll | None = ctx.all_to_all
        grad = grad.contiguous()
        grad_y = grad
        if all_to_all is not None:
            segments = Segments(*where)
            received = grad.new_empty(all_to_all.row_counts[1].remote, grad.size(1))  # (S, D)
            all_to_all.start(grad, received).wait()
            grad_y = torch.empty_like(inputs)  # (R, D)
            sums = move_segments(
                all_to_all, segments, grad_y, received, grad, arriving=True, summed=True
            )  # (E*W, D)
        grad_h = _grouped_mm(grad_y, w2.transpose(1, 2), offsets)  # (R, F)
        between = Activation(ctx.name, b1, gain, shift, ctx.eps)
        grad_x, *grads = activation.backward(grad_h, x, between, offsets, means, scales)
        grad_rows = _grouped_mm(grad_x, w1.transpose(1, 2), offsets)  # (R, D)
        if all_to_all is not None:
            by_expert, to_send = grad_rows, torch.empty_like(received)
            grad_rows = torch.empty_like(grad)  # (A, D)
            move_segments(all_to_all, segments, by_expert, to_send, grad_rows, arriving=False)
            # The weights' gradients are computed while the rows' gradients travel back.
            work = all_to_all.start(to_send, grad_rows, back=True)
        # next_functions has an entry for each tensor argument. The last but one is w2's: the last
        # is that of offsets, or of b2 with an all-to-all.
        nodes = [node for node, _ in ctx.next_functions]
        grad_w2 = _weight_gradient(nodes[-2], h, grad_y, offsets)
        grad_w1 = _weight_gradient(nodes[1], inputs, grad_x, offsets)
        grad_b2 = None
        if all_to_all is not None:
            assert sums is not None
            grad_b2 = sums.unflatten(0, (b2.size(0), -1)).sum(1).to(b2.dtype)
            work.wait()
        return grad_rows, grad_w1, *grads, grad_w2, grad_b2, None, None, None, None
