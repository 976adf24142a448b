"""Matrix products of rows sorted by expert, and what follows them before the result is stored.

Letters: E experts, A rows, D columns that are summed over, F columns of the result, M rows of a
tile.

`torch._grouped_mm` is as fast at the product itself; but an activation and its derivative, done by
themselves, read and write the widest tensors of the layer once more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from models.kernels.activation import activated, slope
from models.kernels.tiles import num_tiles, rows_of_tile, sum_tiles

TILE_ROWS = 128
_TILE_COLUMNS, _TILE_DEPTH, _NUM_WARPS, _NUM_STAGES = 256, 64, 8, 3


@triton.jit
def _forward_kernel(
    rows,
    weight,
    bias,
    x,
    h,
    offsets,
    F,
    D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    M: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    expert, first, end = rows_of_tile(tl.program_id(1), offsets, NUM_EXPERTS, EXPERTS, M)
    if expert < NUM_EXPERTS:
        start = tl.program_id(0) * COLUMNS
        product = tl.zeros([M, COLUMNS], tl.float32)
        for depth in range(0, D, DEPTH):
            left = rows.load([first, depth])
            right = weight.load([expert * D + depth, start])
            product = tl.dot(left, right, product)
        row = first + tl.arange(0, M)
        column = start + tl.arange(0, COLUMNS)
        mask = (row < end)[:, None] & (column < F)[None, :]
        at = row.to(tl.int64)[:, None] * F + column[None, :]
        rounded = product.to(x.dtype.element_ty)  # the backward sees what is stored
        tl.store(x + at, rounded, mask=mask)
        b = tl.load(bias + expert.to(tl.int64) * F + column, mask=column < F, other=0.0)
        value = activated(rounded.to(tl.float32) + b.to(tl.float32)[None, :], ACTIVATION)
        tl.store(h + at, value.to(h.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad,
    weight,
    x,
    bias,
    grad_x,
    partial_bias,
    offsets,
    F,
    D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    M: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tile = tl.program_id(1)
    expert, first, end = rows_of_tile(tile, offsets, NUM_EXPERTS, EXPERTS, M)
    if expert < NUM_EXPERTS:
        start = tl.program_id(0) * COLUMNS
        product = tl.zeros([M, COLUMNS], tl.float32)
        for depth in range(0, D, DEPTH):
            left = grad.load([first, depth])
            right = weight.load([expert * F + start, depth])
            product = tl.dot(left, right.T, product)
        row = first + tl.arange(0, M)
        column = start + tl.arange(0, COLUMNS)
        mask = (row < end)[:, None] & (column < F)[None, :]
        at = row.to(tl.int64)[:, None] * F + column[None, :]
        b = tl.load(bias + expert.to(tl.int64) * F + column, mask=column < F, other=0.0)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + b.to(tl.float32)[None, :]
        product = tl.where(mask, product * slope(value, ACTIVATION), 0.0)
        tl.store(grad_x + at, product.to(grad_x.dtype.element_ty), mask=mask)
        tl.store(partial_bias + tile * F + column, tl.sum(product, 0), mask=column < F)


def _launch(num_rows: int, num_experts: int, d_ff: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, columns first so that neighbours share an expert's rows, and the constants."""
    columns = min(_TILE_COLUMNS, max(16, triton.next_power_of_2(d_ff)))
    grid = (triton.cdiv(d_ff, columns), num_tiles(num_rows, num_experts, TILE_ROWS))
    return grid, {
        "NUM_EXPERTS": num_experts,
        "EXPERTS": triton.next_power_of_2(num_experts),
        "M": TILE_ROWS,
        "COLUMNS": columns,
        "DEPTH": _TILE_DEPTH,
        "num_warps": _NUM_WARPS,
        "num_stages": _NUM_STAGES,
    }


def matmul_activation(
    rows: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """x = rows w_e and h = act(x + b_e).

    Args:
        rows: (A, D) in a 16-bit type, contiguous, D a multiple of 64.
        weight: (E, D, F).
        bias: (E, F).
        offsets: (E,) int32, where each expert's rows end.
        activation: one of models.kernels.activation.ACTIVATIONS.

    Returns:
        x and h, (A, F) each.
    """
    num_experts, d_model, d_ff = weight.shape
    x, h = rows.new_empty(2, rows.size(0), d_ff)
    grid, constants = _launch(rows.size(0), num_experts, d_ff)
    _forward_kernel[grid](
        TensorDescriptor.from_tensor(rows, [TILE_ROWS, _TILE_DEPTH]),
        TensorDescriptor.from_tensor(weight.view(-1, d_ff), [_TILE_DEPTH, constants["COLUMNS"]]),
        bias,
        x,
        h,
        offsets,
        d_ff,
        D=d_model,
        ACTIVATION=activation,
        **constants,
    )
    return x, h


def matmul_activation_backward(
    grad: Tensor, weight: Tensor, x: Tensor, bias: Tensor, offsets: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the bias, where h = act(x + b_e) and grad is that of h w_e.

    Args:
        grad: (A, D) in a 16-bit type, contiguous, D a multiple of 64.
        weight: (E, F, D).
        x: (A, F).
        bias: (E, F).
        offsets: (E,) int32, where each expert's rows end.
        activation: one of models.kernels.activation.ACTIVATIONS.

    Returns:
        (A, F) and (E, F).
    """
    num_experts, d_ff, d_model = weight.shape
    grad_x = torch.empty_like(x)
    grid, constants = _launch(grad.size(0), num_experts, d_ff)
    partial = torch.empty(grid[1], d_ff, dtype=torch.float32, device=grad.device)
    _backward_kernel[grid](
        TensorDescriptor.from_tensor(grad, [TILE_ROWS, _TILE_DEPTH]),
        TensorDescriptor.from_tensor(weight.view(-1, d_model), [constants["COLUMNS"], _TILE_DEPTH]),
        x,
        bias,
        grad_x,
        partial,
        offsets,
        d_ff,
        D=d_model,
        ACTIVATION=activation,
        **constants,
    )
    return grad_x, sum_tiles(partial, offsets, TILE_ROWS, bias.dtype)
