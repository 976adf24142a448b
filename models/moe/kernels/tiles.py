"""Rows sorted by expert, cut into tiles of one expert each.

Letters: E experts, A rows, F columns, R largest number of rows of a tile.

Only the device knows how many tiles each expert has, but there are never more than A / R + E. That
many programs are launched. Each finds its rows from the experts' offsets, or finds none and ends.
For a sum over an expert's rows each tile writes its own sum and a second kernel adds those. The
order is always the same, which it would not be with atomic additions.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _tiles(offsets, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, R: tl.constexpr):
    """The experts' indices, the first rows and ends of each, and its number of tiles."""
    index = tl.arange(0, EXPERTS)
    ends = tl.load(offsets + index, mask=index < NUM_EXPERTS, other=0)
    starts = tl.load(offsets + index - 1, mask=(index > 0) & (index < NUM_EXPERTS), other=0)
    return index, starts, ends, tl.where(index < NUM_EXPERTS, (ends - starts + R - 1) // R, 0)


@triton.jit
def rows_of_tile(tile, offsets, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, R: tl.constexpr):
    """Expert, first row and end of a tile; expert NUM_EXPERTS: there is no such tile.

    EXPERTS is NUM_EXPERTS rounded up to a power of two.
    """
    index, starts, ends, tiles = _tiles(offsets, NUM_EXPERTS, EXPERTS, R)
    tile_ends = tl.cumsum(tiles, 0)
    expert = tl.sum((tile_ends <= tile).to(tl.int32), 0)
    expert = tl.minimum(expert, NUM_EXPERTS)
    is_own = index == expert
    first = tl.sum(tl.where(is_own, starts + (tile - (tile_ends - tiles)) * R, 0), 0)
    end = tl.minimum(first + R, tl.sum(tl.where(is_own, ends, 0), 0))
    return expert, first, end


def num_tiles(num_rows: int, num_experts: int, tile_rows: int) -> int:
    """The number of programs to launch, at least the number of tiles."""
    return num_rows // tile_rows + num_experts


@triton.jit
def _sum_tiles_kernel(
    partial,
    out,
    offsets,
    num_rows,
    num_columns,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    R: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert, part = tl.program_id(0), tl.program_id(2).to(tl.int64)
    index, _, _, tiles = _tiles(offsets, NUM_EXPERTS, EXPERTS, R)
    first = tl.sum(tl.where(index < expert, tiles, 0), 0)
    count = tl.sum(tl.where(index == expert, tiles, 0), 0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < num_columns
    total = tl.zeros([TILES, COLUMNS], tl.float32)
    begin = 0
    while begin < count:
        tile = begin + tl.arange(0, TILES)
        mask = (tile < count)[:, None] & is_column[None, :]
        where = (part * num_rows + first + tile)[:, None] * num_columns + columns[None, :]
        total += tl.load(partial + where, mask=mask, other=0.0)
        begin += TILES
    place = (part * NUM_EXPERTS + expert) * num_columns + columns
    tl.store(out + place, tl.sum(total, 0).to(out.dtype.element_ty), mask=is_column)


def sum_tiles(partial: Tensor, offsets: Tensor, tile_rows: int, dtype: torch.dtype) -> Tensor:
    """(..., tiles, F) float32, a row for each tile -> (..., E, F), sums over each expert's tiles.

    Args:
        partial: (..., tiles, F) float32; rows past the last tile are not read.
        offsets: (E,) int32, end of each expert's rows.
        tile_rows: R.
        dtype: dtype of the result.
    """
    *parts, num_rows, num_columns = partial.shape
    num_experts = offsets.numel()
    out = torch.empty(*parts, num_experts, num_columns, dtype=dtype, device=partial.device)
    columns = 128
    _sum_tiles_kernel[(num_experts, triton.cdiv(num_columns, columns), math.prod(parts))](
        partial,
        out,
        offsets,
        num_rows,
        num_columns,
        NUM_EXPERTS=num_experts,
        EXPERTS=triton.next_power_of_2(num_experts),
        R=tile_rows,
        TILES=16,
        COLUMNS=columns,
    )
    return out
