"""Tokens to the rows of their experts and back, with autograd: one pass over memory each.

Letters: N tokens, D d_model, E experts, K top_k, A rows (kept assignments).

    tokens (N, D) -> GatherRows -> rows (A, D), sorted by expert -> experts -> CombineRows -> (N, D)

`row_of` (N, K) int32 is the row of each assignment, -1 if it was dropped. `assignment_of` (A,)
int32 is its inverse: the token-major number token * K + choice of each row's assignment.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from magnetar.models.moe.kernels.tiles import num_tiles, rows_of_tile, sum_tiles

ROWS = 4  # rows that a program moves at a time
TILE_ROWS = 32  # rows of a tile, in kernels that also sum over an expert's rows


@triton.jit
def _gather_kernel(
    tokens,
    assignment_of,
    rows,
    num_rows,
    D,
    K: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, COLUMNS)
    mask = (row < num_rows)[:, None] & (column < D)[None, :]
    token = (tl.load(assignment_of + row, mask=row < num_rows, other=0) // K).to(tl.int64)
    values = tl.load(tokens + token[:, None] * D + column[None, :], mask=mask)
    tl.store(rows + row.to(tl.int64)[:, None] * D + column[None, :], values, mask=mask)


@triton.jit
def _combine_kernel(
    rows,
    row_of,
    weights,
    experts,
    bias,
    out,
    num_tokens,
    D,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, COLUMNS)
    is_token, is_column = token < num_tokens, column < D
    total = tl.zeros([R, COLUMNS], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_of + token * K + k, mask=is_token, other=-1)
        mask = (row >= 0)[:, None] & is_column[None, :]
        value = tl.load(
            rows + row.to(tl.int64)[:, None] * D + column[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        if WEIGHTED:
            if BIASED:
                expert = tl.load(experts + token * K + k, mask=is_token, other=0).to(tl.int64)
                at = bias + expert[:, None] * D + column[None, :]
                value += tl.load(at, mask=mask, other=0.0).to(tl.float32)
            value *= tl.load(weights + token * K + k, mask=is_token, other=0.0)[:, None]
        total += value
    place = out + token.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=is_token[:, None] & is_column[None, :])


@triton.jit
def _combine_backward_kernel(
    grad_out,
    rows,
    assignment_of,
    weights,
    bias,
    offsets,
    grad_rows,
    grad_weights,
    partial_bias,
    D,
    K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
    BIASED: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    expert, first, end = rows_of_tile(tile, offsets, NUM_EXPERTS, EXPERTS, TILE)
    if expert < NUM_EXPERTS:
        column = tl.arange(0, COLUMNS)
        is_column = column < D
        if BIASED:
            place = expert.to(tl.int64) * D + column
            own_bias = tl.load(bias + place, mask=is_column, other=0.0).to(tl.float32)
        total = tl.zeros([R, COLUMNS], tl.float32)
        for step in range(0, TILE, R):
            row = first + step + tl.arange(0, R)
            is_row = row < end
            mask = is_row[:, None] & is_column[None, :]
            assignment = tl.load(assignment_of + row, mask=is_row, other=0)
            weight = tl.load(weights + assignment, mask=is_row, other=0.0)
            token = (assignment // K).to(tl.int64)
            grad = tl.load(
                grad_out + token[:, None] * D + column[None, :], mask=mask, other=0.0
            ).to(tl.float32)
            at = row.to(tl.int64)[:, None] * D + column[None, :]
            value = tl.load(rows + at, mask=mask, other=0.0).to(tl.float32)
            if BIASED:
                value += own_bias[None, :]
            tl.store(grad_weights + assignment, tl.sum(grad * value, 1), mask=is_row)
            grad *= weight[:, None]
            tl.store(grad_rows + at, grad.to(grad_rows.dtype.element_ty), mask=mask)
            total += grad
        if BIASED:
            tl.store(partial_bias + tile * D + column, tl.sum(total, 0), mask=is_column)


def _combine(
    rows: Tensor,
    row_of: Tensor,
    weights: Tensor | None = None,
    experts: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """(A, D) -> (N, D): the sum of each token's rows, weighted if there are weights."""
    (num_tokens, top_k), d_model = row_of.shape, rows.size(1)
    out = rows.new_empty(num_tokens, d_model)
    if num_tokens:
        tensors = (rows, row_of, weights, experts, bias, out)
        _combine_kernel[(triton.cdiv(num_tokens, ROWS),)](
            *tensors,
            num_tokens,
            d_model,
            K=top_k,
            WEIGHTED=weights is not None,
            BIASED=bias is not None,
            R=ROWS,
            COLUMNS=triton.next_power_of_2(d_model),
        )
    return out


class GatherRows(torch.autograd.Function):
    """The row of each assignment's token; backward adds a token's K gradients in a fixed order."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, row_of: Tensor, assignment_of: Tensor) -> Tensor:
        """(N, D), (N, K) and (A,) -> (A, D)."""
        ctx.save_for_backward(row_of)
        num_rows, d_model = assignment_of.numel(), tokens.size(1)
        rows = tokens.new_empty(num_rows, d_model)
        if num_rows:
            tensors = (tokens.contiguous(), assignment_of, rows)
            shape = {"K": row_of.size(1), "R": ROWS, "COLUMNS": triton.next_power_of_2(d_model)}
            _gather_kernel[(triton.cdiv(num_rows, ROWS),)](*tensors, num_rows, d_model, **shape)
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """(A, D) -> (N, D)."""
        (row_of,) = ctx.saved_tensors
        return _combine(grad.contiguous(), row_of), None, None


class CombineRows(torch.autograd.Function):
    """Each token's weighted sum of its experts' outputs and biases, sum_k w_k (y_k + b_k)."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        bias: Tensor | None,
        weights: Tensor,
        experts: Tensor,
        row_of: Tensor,
        assignment_of: Tensor,
        offsets: Tensor,
    ) -> Tensor:
        """(A, D) and weights (N, K) float32 -> (N, D) in the dtype of `rows`.

        The bias is (E, D), or None if the rows include it; experts (N, K) are integers, offsets
        (E,) int32 are the ends of the experts' rows. The module has row_of and assignment_of.
        """
        weights = weights.contiguous()
        out = _combine(rows, row_of, weights, experts, bias)
        ctx.save_for_backward(rows, bias, weights, assignment_of, offsets)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """(N, D) -> gradients of rows, bias and weights."""
        rows, bias, weights, assignment_of, offsets = ctx.saved_tensors
        (num_rows, d_model), num_experts = rows.shape, offsets.numel()
        grad_rows = torch.empty_like(rows)
        grad_weights = torch.zeros_like(weights)  # a dropped assignment has no row
        tiles = num_tiles(num_rows, num_experts, TILE_ROWS)
        partial = None if bias is None else rows.new_empty(tiles, d_model, dtype=torch.float32)
        inputs = (grad.contiguous(), rows, assignment_of, weights, bias, offsets)
        _combine_backward_kernel[(tiles,)](
            *inputs,
            grad_rows,
            grad_weights,
            partial,
            d_model,
            K=weights.size(1),
            NUM_EXPERTS=num_experts,
            EXPERTS=triton.next_power_of_2(num_experts),
            TILE=TILE_ROWS,
            BIASED=bias is not None,
            R=ROWS,
            COLUMNS=triton.next_power_of_2(d_model),
        )
        grad_bias = None
        if partial is not None:
            grad_bias = sum_tiles(partial, offsets, TILE_ROWS, bias.dtype)
        return grad_rows, grad_bias, grad_weights, None, None, None, None
