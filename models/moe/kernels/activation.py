"""Between an expert's two matrices: bias, activation and the inner LayerNorm, one pass each way.

Letters: E experts, A rows sorted by expert, F d_ff.

    h = act(x + b_e)                       without a norm
    h = LN(act(x + b_e)) * g_e + c_e       with Sub-LN's inner norm

The kernels compute in float32; x and h have the model's dtype. The backward pass keeps x and, with
a norm, each row's mean and 1 / standard deviation. It computes everything else again.
"""

from typing import Any, NamedTuple

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

    Abramowitz and Stegun, 7.1.26, is within 1e-7. Integral and density share one exponential; with
    a separate error function these kernels would wait for arithmetic, not for memory.
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
    """The operations between the two matrices.

    Attributes:
        name: one of ACTIVATIONS.
        bias: (E, F), bias of the first matrix.
        gain: (E, F), weight of the LayerNorm; None without one.
        shift: (E, F), bias of the LayerNorm; None without one.
        eps: epsilon of the LayerNorm.
    """

    name: str
    bias: Tensor
    gain: Tensor | None = None
    shift: Tensor | None = None
    eps: float = 1e-5


def _launch(
    num_rows: int, d_ff: int, activation: Activation, offsets: Tensor, backward: bool
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid and the options of both kernels: rows and columns per step, steps in flight, warps.

    They were found on an H100 at d_ff 4096 and are constants, since the order of the sums decides
    the last bits. A norm needs whole rows. One program then fills a multiprocessor, so it must
    fetch ahead.
    """
    num_experts, columns = offsets.numel(), triton.next_power_of_2(d_ff)
    if activation.gain is not None:
        rows, stages = (2, 3) if backward else (1, 3)
        warps = min(16 if backward else 8, max(4, columns // 256))
    else:
        columns = min(1024 if backward else 512, columns)
        rows, stages, warps = min(TILE_ROWS, 2048 // columns), None, 4
    grid = (num_tiles(num_rows, num_experts, TILE_ROWS), triton.cdiv(d_ff, columns))
    return grid, {
        "ACTIVATION": activation.name,
        "NORM": activation.gain is not None,
        "NUM_EXPERTS": num_experts,
        "EXPERTS": triton.next_power_of_2(num_experts),
        "TILE": TILE_ROWS,
        "R": rows,
        "COLUMNS": columns,
        "STAGES": stages,
        "num_warps": warps,
    }


def forward(x: Tensor, activation: Activation, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(A, F) -> h (A, F), and the norm's means (A,) and scales (A,), float32.

    Args:
        x: rows sorted by expert, contiguous.
        activation: bias, activation and norm to apply.
        offsets: (E,) int32, end of each expert's rows.
    """
    num_rows, d_ff = x.shape
    _, *parameters, eps = activation
    h = torch.empty_like(x)
    norm_rows = 0 if activation.gain is None else num_rows
    means, scales = x.new_empty(2, norm_rows, dtype=torch.float32)
    grid, options = _launch(num_rows, d_ff, activation, offsets, backward=False)
    _forward_kernel[grid](x, *parameters, h, means, scales, offsets, d_ff, eps, **options)
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
    num_rows, d_ff = x.shape
    norm = activation.gain is not None
    grad_x = torch.empty_like(x)
    grid, options = _launch(num_rows, d_ff, activation, offsets, backward=True)
    # A row of sums for each tile: of bias and, with a norm, of gain and shift.
    partial = torch.empty(3 if norm else 1, grid[0], d_ff, dtype=torch.float32, device=x.device)
    of_norm = partial[1:] if norm else (None, None)
    inputs = (grad.contiguous(), x, activation.bias, activation.gain, means, scales)
    _backward_kernel[grid](*inputs, grad_x, partial[0], *of_norm, offsets, d_ff, **options)
    sums = sum_tiles(partial, offsets, TILE_ROWS, activation.bias.dtype)
    return grad_x, sums[0], sums[1] if norm else None, sums[2] if norm else None
