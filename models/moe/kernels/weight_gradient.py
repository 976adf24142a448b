"""The gradient of stacked matrices, accumulated in place over micro-batches.

Letters: E experts, A rows sorted by expert, X and Y columns of the two factors.

A product followed by an addition passes over memory of the weights' size four times. Here the last
step of the product reads the accumulated gradient and writes the sum: two passes, and one rounding
in place of two. `torch._grouped_mm` cannot accumulate; it computes the first gradient.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK_X, BLOCK_Y, BLOCK_ROWS = 128, 256, 64


@triton.jit
def _add_kernel(
    left,
    right,
    out,
    offsets,
    X: tl.constexpr,
    Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    expert = tl.program_id(1)
    blocks: tl.constexpr = (Y + BLOCK_Y - 1) // BLOCK_Y
    x = (tl.program_id(0) // blocks) * BLOCK_X
    y = (tl.program_id(0) % blocks) * BLOCK_Y
    end = tl.load(offsets + expert)
    first = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    if end > first:
        total = tl.zeros([BLOCK_X, BLOCK_Y], tl.float32)
        whole = first + (end - first) // BLOCK_ROWS * BLOCK_ROWS
        for row in range(first, whole, BLOCK_ROWS):
            total = tl.dot(left.load([row, x]).T, right.load([row, y]), total)
        if whole < end:
            is_own = (whole + tl.arange(0, BLOCK_ROWS) < end)[:, None]
            a = tl.where(is_own, left.load([whole, x]), 0.0)
            b = tl.where(is_own, right.load([whole, y]), 0.0)
            total = tl.dot(a.T, b, total)
        total += out.load([expert * X + x, y]).to(tl.float32)
        out.store([expert * X + x, y], total.to(out.dtype))


def _add_gradient(total: Tensor, left: Tensor, right: Tensor, offsets: Tensor) -> None:
    """total (E, X, Y) += each expert's left.T @ right, of (A, X) and (A, Y)."""
    num_experts, x, y = total.shape
    described = TensorDescriptor.from_tensor
    _add_kernel[(triton.cdiv(x, BLOCK_X) * triton.cdiv(y, BLOCK_Y), num_experts)](
        described(left, [BLOCK_ROWS, BLOCK_X]),
        described(right, [BLOCK_ROWS, BLOCK_Y]),
        described(total.view(-1, y), [BLOCK_X, BLOCK_Y]),
        offsets,
        x,
        y,
        BLOCK_X=BLOCK_X,
        BLOCK_Y=BLOCK_Y,
        BLOCK_ROWS=BLOCK_ROWS,
        num_warps=8,
        num_stages=3,
    )


def weight_gradient(node: Any, left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """The gradient of stacked matrices, for a backward function to return.

    If the parameter already has a gradient, the kernel adds to that tensor in place and returns it,
    so autograd does not copy it. Hooks on the parameter still fire with the accumulated gradient.

    Args:
        node: entry of the matrices in `next_functions`, the node that receives the gradient.
        left: (A, X).
        right: (A, Y), the same dtype.
        offsets: (E,) int32, end of each expert's rows.

    Returns:
        (E, X, Y).
    """
    if _is_accumulated(node) and _can_add(node.variable.grad, left, right):
        total: Tensor = node.variable.grad
        node.variable.grad = None
        _add_gradient(total, left.contiguous(), right.contiguous(), offsets)
        return total
    return torch._grouped_mm(left.t(), right, offs=offsets)


def _is_accumulated(node: Any) -> bool:
    """Whether the node adds to a parameter's gradient, and no hook sees the summand before."""
    parameter = getattr(node, "variable", None)
    if parameter is None or parameter.grad is None or parameter._backward_hooks:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # raised inside torch.autograd.grad, which accumulates nothing
        return False


def _can_add(total: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether the kernel supports it: 16-bit dtypes, and tiles that end where matrices end."""
    matches = total.dtype == left.dtype == right.dtype and total.element_size() == 2
    is_placed = total.is_contiguous() and total.data_ptr() % 16 == 0
    return matches and is_placed and total.size(1) % BLOCK_X == 0 and total.size(2) % 8 == 0
