"""The row of each assignment when rows are sorted by expert: a counting sort.

Letters: N tokens, E experts, K top_k, A = N*K choices, B blocks of BLOCK_TOKENS tokens.

models.moe.kernels.fused_router has counted each block's assignments to each expert. Their running
sum, over experts and within one over blocks, is where a block's rows begin; within a block every
assignment counts the earlier ones that name its expert.

The rows of an expert are token-major: they follow the number n*K + k of an assignment. The plain
path's (models.moe.dispatch) are choice-major: they follow k*N + n.
"""

# Triton evaluates the annotations of a kernel's arguments and knows none for pointers.
# mypy: allow-untyped-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from magnetar.models.moe.all_to_all import SendOrder
from magnetar.models.moe.kernels.fused_router import BLOCK_TOKENS, num_blocks_of


class Positions(NamedTuple):
    """The rows of the assignments, sorted by expert, then by token, then by choice.

    The order of the experts is that of their indices, or that in which models.moe.all_to_all sends.

    Attributes:
        offsets: (E,) int32, end of each expert's rows, in the order of the experts.
        counts: (E,) int64, rows of each expert, in the order of the experts.
        row_of: (N, K) int32, row of each choice; -1 if it was dropped.
        assignment_of: (A,) int32, inverse of row_of: token * K + choice of each row. It ends with a
            0 for each dropped choice.
    """

    offsets: Tensor
    counts: Tensor
    row_of: Tensor
    assignment_of: Tensor


@triton.jit(do_not_specialize=["num_assignments", "num_blocks"])
def _positions_kernel(
    experts,
    ends,
    offsets,
    counts,
    row_of,
    assignment_of,
    places,
    num_assignments,
    num_blocks,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PLACED: tl.constexpr,
    ASSIGNMENTS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    CHUNK: tl.constexpr,
):
    block = tl.program_id(0)
    index = tl.arange(0, BLOCK_A)
    assignment = block * ASSIGNMENTS + index
    is_own = (index < ASSIGNMENTS) & (assignment < num_assignments)
    expert = tl.load(experts + assignment, mask=is_own, other=-1)
    has_row = expert >= 0
    rank = tl.zeros([BLOCK_A], tl.int32)  # earlier ones of the block with the same expert
    for begin in range(0, BLOCK_A, CHUNK):
        other_index = begin + tl.arange(0, CHUNK)
        other_assignment = block * ASSIGNMENTS + other_index
        is_other = (other_index < ASSIGNMENTS) & (other_assignment < num_assignments)
        other = tl.load(experts + other_assignment, mask=is_other, other=-1)
        is_earlier = other_index[None, :] < index[:, None]
        rank += tl.sum((is_earlier & (other[None, :] == expert[:, None])).to(tl.int32), 1)
    place = expert
    if PLACED:
        place = tl.load(places + expert, mask=has_row, other=0).to(tl.int32)
    # `ends` runs over experts, and within one over blocks: what ends before is where this begins.
    bin_at = place * num_blocks + block
    row = rank + tl.load(ends + bin_at - 1, mask=has_row & (bin_at > 0), other=0)
    tl.store(row_of + assignment, tl.where(has_row, row, -1), mask=is_own)
    tl.store(assignment_of + row, assignment, mask=has_row)
    if block == 0:
        column = tl.arange(0, BLOCK_E)
        is_expert = column < E
        end = tl.load(ends + column * num_blocks + num_blocks - 1, mask=is_expert, other=0)
        before = is_expert & (column > 0)
        start = tl.load(ends + column * num_blocks - 1, mask=before, other=0)
        tl.store(offsets + column, end, mask=is_expert)
        tl.store(counts + column, (end - start).to(tl.int64), mask=is_expert)


def kept_block_counts(experts: Tensor, num_experts: int) -> Tensor:
    """(N, K) int32, -1 for a dropped choice -> (E, B) int32, block_counts of the kept choices.

    The sums are of integers, so the order of atomic additions does not matter.
    """
    num_tokens = experts.size(0)
    num_blocks = num_blocks_of(num_tokens)
    blocks = torch.arange(num_tokens, device=experts.device).unsqueeze(1) // BLOCK_TOKENS
    bins = (experts * num_blocks + blocks).where(experts >= 0, num_experts * num_blocks)
    counts = experts.new_zeros(num_experts * num_blocks + 1)
    counts.scatter_add_(0, bins.view(-1), torch.ones_like(experts).view(-1))
    return counts[:-1].view(num_experts, num_blocks)


def sorted_positions(
    experts: Tensor,
    block_counts: Tensor,
    order: SendOrder | None = None,
    may_drop: bool = False,
) -> Positions:
    """Sort the assignments by expert, by counting.

    Args:
        experts: (N, K) int32, -1 for a dropped choice.
        block_counts: (E, B) int32, from Routing or `kept_block_counts`.
        order: order of the experts; None for that of their indices.
        may_drop: whether some choices may have been dropped.
    """
    (num_tokens, top_k), (num_experts, num_blocks) = experts.shape, block_counts.shape
    assert num_blocks == num_blocks_of(num_tokens)
    if order is not None:
        block_counts = block_counts.index_select(0, order.experts)
    ends = block_counts.view(-1).cumsum(0, dtype=torch.int32)  # (E*B,)
    found = Positions(
        offsets=experts.new_empty(num_experts),
        counts=experts.new_empty(num_experts, dtype=torch.int64),
        row_of=torch.empty_like(experts),
        assignment_of=(experts.new_zeros if may_drop else experts.new_empty)(num_tokens * top_k),
    )
    size = triton.next_power_of_2(BLOCK_TOKENS * top_k)
    _positions_kernel[(num_blocks,)](
        experts.contiguous(),
        ends,
        *found,
        None if order is None else order.positions,
        num_tokens * top_k,
        num_blocks,
        E=num_experts,
        BLOCK_E=triton.next_power_of_2(num_experts),
        PLACED=order is not None,
        ASSIGNMENTS=BLOCK_TOKENS * top_k,
        BLOCK_A=size,
        CHUNK=32,
        num_warps=max(1, size // 32),
    )
    return found
