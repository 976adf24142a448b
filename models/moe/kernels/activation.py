"""Between an expert's two matrices: bias, activation and the inner LayerNorm, one pass each way.

Letters: E experts, A rows sorted by expert, F d_ff.

    h = act(x + b_e)                       without a norm
    h = LN(act(x + b_e)) * g_e + c_e       with Sub-LN's

Everything is float32 inside; x and h have the model's type. Kept for the backward are x and, with a
norm, each row's mean and 1 / standard deviation: what lies between is computed again.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from magnetar.models.moe.kernels.tiles import num_tiles, rows_of_tile, sum_tiles

ACTIVATIONS = ("gelu", "relu", "swish")
TILE_ROWS = 32
_INV_SQRT_2 = tl.constexpr(0.7071067811865476)
_INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _normal(x):
    """The standard normal distribution at x: (its integral, its density).

    Abramowitz and Stegun, 7.1.26: within 1e-7. Both need the same exponential, where an error
    function of its own would make these kernels wait for arithmetic instead of memory.
    """
    bell = tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.3275911 * _INV_SQRT_2 * tl.abs(x))
    tail = t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    tail = 0.5 * bell * t * (0.254829592 + tail)
    return tl.where(x > 0.0, 1.0 - tail, tail), bell * _INV_SQRT_2_PI


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """act(x), float32."""
    if ACTIVATION == "gelu":
        integral, _ = _normal(x)
        return x * integral
    elif ACTIVATION == "swish":
        return x * tl.sigmoid(x)
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    """act'(x), float32; relu's at 0 is 0, as torch has it."""
    if ACTIVATION == "gelu":
        integral, density = _normal(x)
        return integral + x * density
    elif ACTIVATION == "swish":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    else:
        return tl.where(x > 0.0, 1.0, 0.0)


@triton.jit
def _forward_kernel(
    x,
    bias,
    gain,
    shift,
    h,
    means,
    scales,
    offsets,
    F,
    eps,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    expert, first, end = rows_of_tile(tl.program_id(0), offsets, NUM_EXPERTS, EXPERTS, TILE)
    if expert < NUM_EXPERTS:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        is_column = column < F
        place = expert.to(tl.int64) * F + column
        b = tl.load(bias + place, mask=is_column, other=0.0).to(tl.float32)
        if NORM:
            g = tl.load(gain + place, mask=is_column, other=0.0).to(tl.float32)
            c = tl.load(shift + place, mask=is_column, other=0.0).to(tl.float32)
        for step in tl.range(0, TILE, R, num_stages=STAGES):
            row = first + step + tl.arange(0, R)
            mask = (row < end)[:, None] & is_column[None, :]
            at = row.to(tl.int64)[:, None] * F + column[None, :]
            value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + b[None, :]
            value = _activated(value, ACTIVATION)
            if NORM:
                value = tl.where(is_column[None, :], value, 0.0)
                mean = tl.sum(value, 1) / F
                centred = tl.where(is_column[None, :], value - mean[:, None], 0.0)
                scale = tl.rsqrt(tl.sum(centred * centred, 1) / F + eps)
                tl.store(means + row, mean, mask=row < end)
                tl.store(scales + row, scale, mask=row < end)
                value = centred * scale[:, None] * g[None, :] + c[None, :]
            tl.store(h + at, value.to(h.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad_h,
    x,
    bias,
    gain,
    means,
    scales,
    grad_x,
    partial_bias,
    partial_gain,
    partial_shift,
    offsets,
    F,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0)
    expert, first, end = rows_of_tile(tile, offsets, NUM_EXPERTS, EXPERTS, TILE)
    if expert < NUM_EXPERTS:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        is_column = column < F
        place = expert.to(tl.int64) * F + column
        b = tl.load(bias + place, mask=is_column, other=0.0).to(tl.float32)
        sum_bias = tl.zeros([COLUMNS], tl.float32)
        if NORM:
            g = tl.load(gain + place, mask=is_column, other=0.0).to(tl.float32)
            sum_gain = tl.zeros([COLUMNS], tl.float32)
            sum_shift = tl.zeros([COLUMNS], tl.float32)
        for step in tl.range(0, TILE, R, num_stages=STAGES):
            row = first + step + tl.arange(0, R)
            mask = (row < end)[:, None] & is_column[None, :]
            at = row.to(tl.int64)[:, None] * F + column[None, :]
            value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + b[None, :]
            grad = tl.load(grad_h + at, mask=mask, other=0.0).to(tl.float32)
            if NORM:
                mean = tl.load(means + row, mask=row < end, other=0.0)
                scale = tl.load(scales + row, mask=row < end, other=0.0)
                normed = (_activated(value, ACTIVATION) - mean[:, None]) * scale[:, None]
                normed = tl.where(mask, normed, 0.0)
                sum_shift += tl.sum(grad, 0)
                sum_gain += tl.sum(grad * normed, 0)
                grad *= g[None, :]
                along = tl.sum(grad * normed, 1) / F
                grad = grad - tl.sum(grad, 1)[:, None] / F - normed * along[:, None]
                grad *= scale[:, None]
            grad = tl.where(mask, grad * _slope(value, ACTIVATION), 0.0)
            sum_bias += tl.sum(grad, 0)
            tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=mask)
        where = tile.to(tl.int64) * F + column
        tl.store(partial_bias + where, sum_bias, mask=is_column)
        if NORM:
            tl.store(partial_gain + where, sum_gain, mask=is_column)
            tl.store(partial_shift + where, sum_shift, mask=is_column)


class Activation(NamedTuple):
    """What is applied between the matrices.

    Attributes:
        name: one of ACTIVATIONS.
        bias: (E, F).
        gain, shift: (E, F) of the LayerNorm; None: there is none.
        eps: of the LayerNorm.
    """

    name: str
    bias: Tensor
    gain: Tensor | None = None
    shift: Tensor | None = None
    eps: float = 1e-5


def _shape(d_ff: int, norm: bool, backward: bool) -> dict[str, int | None]:
    """A program's rows and columns a step, steps in flight, warps: a norm needs whole rows.

    Found on an H100 at d_ff 4096, and constants: the order of the sums decides the last bits.
    Whole rows leave room for one program on a processor, which must fetch ahead by itself.
    """
    columns = triton.next_power_of_2(d_ff)
    if norm:
        warps = min(16 if backward else 8, max(4, columns // 256))
        rows, stages = (2, 3) if backward else (1, 3)
        return {"R": rows, "COLUMNS": columns, "STAGES": stages, "num_warps": warps}
    columns = min(1024 if backward else 512, columns)
    rows = min(TILE_ROWS, 2048 // columns)
    return {"R": rows, "COLUMNS": columns, "STAGES": None, "num_warps": 4}


def forward(x: Tensor, activation: Activation, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(A, F) -> h (A, F), and the norm's means (A,) and scales (A,), float32.

    Args:
        x: rows sorted by expert, contiguous.
        activation: bias, activation and norm to apply.
        offsets: (E,) int32, end of each expert's rows.
    """
    (num_rows, d_ff), num_experts = x.shape, offsets.numel()
    norm = activation.gain is not None
    h = torch.empty_like(x)
    means, scales = x.new_empty(2, num_rows if norm else 0, dtype=torch.float32)
    shape = _shape(d_ff, norm, backward=False)
    grid = (num_tiles(num_rows, num_experts, TILE_ROWS), triton.cdiv(d_ff, shape["COLUMNS"]))
    _forward_kernel[grid](
        x,
        activation.bias,
        activation.gain,
        activation.shift,
        h,
        means,
        scales,
        offsets,
        d_ff,
        activation.eps,
        ACTIVATION=activation.name,
        NORM=norm,
        NUM_EXPERTS=num_experts,
        EXPERTS=triton.next_power_of_2(num_experts),
        TILE=TILE_ROWS,
        **shape,
    )
    return h, means, scales


def backward(
    grad: Tensor,
    x: Tensor,
    activation: Activation,
    offsets: Tensor,
    means: Tensor,
    scales: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x (A, F), bias, gain and shift (E, F each) from that of h (A, F)."""
    (num_rows, d_ff), num_experts = x.shape, offsets.numel()
    norm = activation.gain is not None
    grad_x = torch.empty_like(x)
    tiles = num_tiles(num_rows, num_experts, TILE_ROWS)
    partial = torch.empty(3 if norm else 1, tiles, d_ff, dtype=torch.float32, device=x.device)
    shape = _shape(d_ff, norm, backward=True)
    _backward_kernel[(tiles, triton.cdiv(d_ff, shape["COLUMNS"]))](
        grad.contiguous(),
        x,
        activation.bias,
        activation.gain,
        means,
        scales,
        grad_x,
        partial[0],
        partial[1] if norm else None,
        partial[2] if norm else None,
        offsets,
        d_ff,
        ACTIVATION=activation.name,
        NORM=norm,
        NUM_EXPERTS=num_experts,
        EXPERTS=triton.next_power_of_2(num_experts),
        TILE=TILE_ROWS,
        **shape,
    )
    sums = sum_tiles(partial, offsets, TILE_ROWS, activation.bias.dtype)
    return grad_x, sums[0], sums[1] if norm else None, sums[2] if norm else None
