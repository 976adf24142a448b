"""Rows of all ranks, moved from the order of arrival to the order of the experts, and back.

Letters: W ranks, L local experts, A rows that this rank sends, R rows that its experts receive,
S of them from other ranks, D d_model.

A segment is the rows of one sender for one expert. Rows arrive sorted by (sender, expert) and the
grouped matmuls want them sorted by (expert, sender). A segment is contiguous in both orders, so a
tile of it moves by one constant shift. Rows of this rank for its own experts are read, and written,
in the tensor of the rows it sends (see models.moe.all_to_all).
"""

# Triton evaluates the annotations of a kernel's arguments and knows none for pointers.
# mypy: allow-untyped-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from magnetar.models.moe.all_to_all import AllToAll
from magnetar.models.moe.kernels.permute import ROWS, TILE_ROWS
from magnetar.models.moe.kernels.tiles import num_tiles, rows_of_tile, sum_tiles


class Segments(NamedTuple):
    """The place of every segment, in the order (expert, sender).

    Attributes:
        offsets: (L,) int32, end of each expert's rows.
        ends: (L*W,) int32, end of each segment in the order (expert, sender).
        arrivals: (L*W,) int32, start of each segment among the S received rows; for this rank's own
            segments, start among its own rows.
    """

    offsets: Tensor
    ends: Tensor
    arrivals: Tensor


@triton.jit
def _segments_kernel(
    counts,
    offsets,
    ends,
    arrivals,
    rank,
    RANKS: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.arange(0, BLOCK)
    is_segment = index < RANKS * LOCAL
    # In the order (expert, sender).
    expert, sender = index // RANKS, index % RANKS
    count = tl.load(counts + sender * LOCAL + expert, mask=is_segment, other=0).to(tl.int32)
    end = tl.cumsum(count, 0)
    tl.store(ends + index, end, mask=is_segment)
    tl.store(offsets + expert, end, mask=is_segment & (sender == RANKS - 1))
    # In the order (sender, expert), that of arrival.
    sender, expert = index // LOCAL, index % LOCAL
    count = tl.load(counts + sender * LOCAL + expert, mask=is_segment, other=0).to(tl.int32)
    own = tl.where(sender == rank, count, 0)
    start = tl.where(sender == rank, tl.cumsum(own, 0), tl.cumsum(count - own, 0)) - count
    tl.store(arrivals + expert * RANKS + sender, start, mask=is_segment)


def segments_of(counts: Tensor, rank: int) -> Segments:
    """The segments of `rank`, from (W, L) int64 rows of each sender for each of its experts."""
    num_ranks, num_local_experts = counts.shape
    num_segments = num_ranks * num_local_experts
    segments = Segments(
        counts.new_empty(num_local_experts, dtype=torch.int32),
        counts.new_empty(num_segments, dtype=torch.int32),
        counts.new_empty(num_segments, dtype=torch.int32),
    )
    _segments_kernel[(1,)](
        counts,
        *segments,
        rank,
        RANKS=num_ranks,
        LOCAL=num_local_experts,
        BLOCK=triton.next_power_of_2(num_segments),
    )
    return segments


@triton.jit
def _move_kernel(
    by_expert,
    by_sender,
    own,
    ends,
    arrivals,
    bias,
    partial,
    D,
    rank,
    RANKS: tl.constexpr,
    NUM_SEGMENTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ARRIVING: tl.constexpr,
    BIASED: tl.constexpr,
    SUMMED: tl.constexpr,
    TILE: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    segment, first, end = rows_of_tile(tile, ends, NUM_SEGMENTS, SEGMENTS, TILE)
    if segment < NUM_SEGMENTS:
        shift = tl.load(arrivals + segment) - tl.load(ends + segment - 1, mask=segment > 0, other=0)
        column = tl.arange(0, COLUMNS)
        is_column = column < D
        if BIASED:
            expert = (segment // RANKS).to(tl.int64)
            own_bias = tl.load(bias + expert * D + column, mask=is_column, other=0.0)
        if SUMMED:
            total = tl.zeros([R, COLUMNS], tl.float32)
        for step in range(0, TILE, R):
            row = first + step + tl.arange(0, R)
            mask = (row < end)[:, None] & is_column[None, :]
            here = row.to(tl.int64)[:, None] * D + column[None, :]
            there = (row + shift).to(tl.int64)[:, None] * D + column[None, :]
            if ARRIVING:
                if segment % RANKS == rank:
                    value = tl.load(own + there, mask=mask, other=0.0)
                else:
                    value = tl.load(by_sender + there, mask=mask, other=0.0)
                if SUMMED:
                    total += value.to(tl.float32)
                tl.store(by_expert + here, value, mask=mask)
            else:
                value = tl.load(by_expert + here, mask=mask, other=0.0)
                if BIASED:
                    value = value.to(tl.float32) + own_bias.to(tl.float32)[None, :]
                value = value.to(by_sender.dtype.element_ty)
                if segment % RANKS == rank:
                    tl.store(own + there, value, mask=mask)
                else:
                    tl.store(by_sender + there, value, mask=mask)
        if SUMMED:
            tl.store(partial + tile.to(tl.int64) * D + column, tl.sum(total, 0), mask=is_column)


def move_segments(
    all_to_all: AllToAll,
    segments: Segments,
    by_expert: Tensor,
    by_sender: Tensor,
    sent: Tensor,
    *,
    arriving: bool,
    bias: Tensor | None = None,
    summed: bool = False,
) -> Tensor | None:
    """Write arriving rows to the order of the experts, others to that of the senders.

    By_expert is (R, D), by_sender (S, D) has the rows of other ranks, and the last ones of sent
    (A, D) are this rank's own. A bias (L, D) is added to rows that are not arriving. Summed returns
    (L*W, D) float32, the sum of each segment's arriving rows.
    """
    (num_rows, d_model), num_segments = by_expert.shape, segments.ends.numel()
    tiles = num_tiles(num_rows, num_segments, TILE_ROWS)
    partial = by_expert.new_empty(tiles, d_model, dtype=torch.float32) if summed else None
    _move_kernel[(tiles,)](
        by_expert,
        by_sender,
        sent[all_to_all.row_counts[0].remote :],
        segments.ends,
        segments.arrivals,
        bias,
        partial,
        d_model,
        all_to_all.rank,
        RANKS=num_segments // segments.offsets.numel(),
        NUM_SEGMENTS=num_segments,
        SEGMENTS=triton.next_power_of_2(num_segments),
        ARRIVING=arriving,
        BIASED=bias is not None,
        SUMMED=summed,
        TILE=TILE_ROWS,
        R=ROWS,
        COLUMNS=triton.next_power_of_2(d_model),
    )
    return None if partial is None else sum_tiles(partial, segments.ends, TILE_ROWS, torch.float32)
