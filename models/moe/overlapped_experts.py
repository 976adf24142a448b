"""The experts of one rank on rows that come from, and go back to, all ranks of its group.

Letters: W ranks, L local experts, C chunks, M = L / C experts of a chunk, A rows that this rank
sends, R rows that its experts get, S rows of those that come from other ranks, D d_model, F d_ff.
models.moe.all_to_all says what a chunk is and where rows lie.

Rows of one sender for one expert are a segment. They arrive sorted by (sender, expert), and
the products want (expert, sender): in both orders a segment lies in one piece, so rows are moved by
segments, each tile of them by a shift of its own, without any sort and without indices. This rank's
own are read, and written, where it keeps what it sends.
"""

# Triton evaluates the annotations of a kernel's arguments and knows none for pointers.
# mypy: allow-untyped-defs

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from magnetar.models.moe.all_to_all import Exchange
from magnetar.models.moe.kernels import activation
from magnetar.models.moe.kernels.activation import Activation
from magnetar.models.moe.kernels.dispatch import ROWS, TILE_ROWS
from magnetar.models.moe.kernels.tiles import num_tiles, rows_of_tile, sum_tiles
from magnetar.models.moe.kernels.weight_gradient import weight_gradient


class Segments(NamedTuple):
    """Where a rank's rows lie.

    Attributes:
        offsets: (L,) int32, where each expert's rows end.
        chunk_offsets: (C, M) int32, the same, counted from the chunk's first row.
        ends: (C, M*W) int32, where segments end in the order (expert, sender), likewise.
        arrivals: (C, M*W) int32, in that order too: where segments begin on arrival; this rank's
            own, where they begin among its own rows of the chunk.
    """

    offsets: Tensor
    chunk_offsets: Tensor
    ends: Tensor
    arrivals: Tensor


@triton.jit
def _segments_kernel(
    counts,
    offsets,
    chunk_offsets,
    ends,
    arrivals,
    rank,
    RANKS: tl.constexpr,
    LOCAL: tl.constexpr,
    OF_CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
):
    chunk = tl.program_id(0)
    first_expert = chunk * OF_CHUNK
    index = tl.arange(0, BLOCK)
    is_segment = index < RANKS * OF_CHUNK
    expert, sender = index // RANKS, index % RANKS
    at = counts + sender * LOCAL + first_expert + expert
    end = tl.cumsum(tl.load(at, mask=is_segment, other=0).to(tl.int32), 0)
    tl.store(ends + chunk * RANKS * OF_CHUNK + index, end, mask=is_segment)
    other = tl.arange(0, BLOCK_ALL)
    is_earlier = (other < RANKS * LOCAL) & (other % LOCAL < first_expert)
    earlier = tl.sum(tl.load(counts + other, mask=is_earlier, other=0).to(tl.int32), 0)
    is_last = is_segment & (sender == RANKS - 1)
    tl.store(chunk_offsets + first_expert + expert, end, mask=is_last)
    tl.store(offsets + first_expert + expert, earlier + end, mask=is_last)
    sender, expert = index // OF_CHUNK, index % OF_CHUNK
    at = counts + sender * LOCAL + first_expert + expert
    count = tl.load(at, mask=is_segment, other=0).to(tl.int32)
    place = (first_expert + expert) * RANKS + sender
    own = tl.where(sender == rank, count, 0)
    start = tl.where(sender == rank, tl.cumsum(own, 0), tl.cumsum(count - own, 0)) - count
    tl.store(arrivals + place, start, mask=is_segment)


def segments_of(counts: Tensor, rank: int, num_chunks: int) -> Segments:
    """Where rows of `rank` lie, of (W, L) int64 rows of each sender for each expert."""
    num_ranks, num_experts = counts.shape
    of_chunk = num_experts // num_chunks
    found = Segments(
        counts.new_empty(num_experts, dtype=torch.int32),
        counts.new_empty(num_chunks, of_chunk, dtype=torch.int32),
        counts.new_empty(num_chunks, of_chunk * num_ranks, dtype=torch.int32),
        counts.new_empty(num_chunks, of_chunk * num_ranks, dtype=torch.int32),
    )
    _segments_kernel[(num_chunks,)](
        counts,
        *found,
        rank,
        RANKS=num_ranks,
        LOCAL=num_experts,
        OF_CHUNK=of_chunk,
        BLOCK=triton.next_power_of_2(num_ranks * of_chunk),
        BLOCK_ALL=triton.next_power_of_2(num_ranks * num_experts),
    )
    return found


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


class _Chunk:
    """The rows of one chunk of the experts, within tensors of all of them."""

    def __init__(self, exchange: Exchange, segments: Segments, number: int) -> None:
        self.exchange, self.number = exchange, number
        self.offsets = segments.chunk_offsets[number]  # (M,)
        self.ends, self.arrivals = segments.ends[number], segments.arrivals[number]
        self.experts = slice(number * self.offsets.numel(), (number + 1) * self.offsets.numel())

    def rows(self, rows: Tensor) -> Tensor:
        """The chunk's part of (R, ...)."""
        return self.exchange.sorted_part(self.number, rows)

    def own(self, table: Tensor | None) -> Tensor | None:
        """The part of (L, ...) that belongs to the chunk's experts."""
        return None if table is None else table[self.experts]

    def sort(self, arriving: Tensor, sent: Tensor, target: Tensor) -> None:
        """From (S, D) in order of arrival, and this rank's own of (A, D), to (R, D) by expert."""
        self._move(self.rows(target), arriving, sent, None, None, arriving=True)

    def sort_and_sum(self, arriving: Tensor, sent: Tensor, target: Tensor) -> Tensor:
        """`sort`; the (M*W, D) float32 sums over each segment."""
        target = self.rows(target)
        tiles = num_tiles(target.size(0), self.ends.numel(), TILE_ROWS)
        partial = target.new_empty(tiles, target.size(1), dtype=torch.float32)
        self._move(target, arriving, sent, None, partial, arriving=True)
        return sum_tiles(partial, self.ends, TILE_ROWS, torch.float32)

    def unsort(
        self, source: Tensor, leaving: Tensor, sent: Tensor, bias: Tensor | None = None
    ) -> None:
        """The way back, of the chunk's rows by expert, plus the experts' (M, D) biases."""
        self._move(source, leaving, sent, bias, None, arriving=False)

    def _move(
        self,
        by_expert: Tensor,
        by_sender: Tensor,
        sent: Tensor,
        bias: Tensor | None,
        partial: Tensor | None,
        arriving: bool,
    ) -> None:
        (num_rows, d_model), num_segments = by_expert.shape, self.ends.numel()
        _move_kernel[(num_tiles(num_rows, num_segments, TILE_ROWS),)](
            by_expert,
            self.exchange.arriving_part(self.number, by_sender),
            self.exchange.own_part(self.number, sent),
            self.ends,
            self.arrivals,
            bias,
            partial,
            d_model,
            self.exchange.rank,
            RANKS=num_segments // self.offsets.numel(),
            NUM_SEGMENTS=num_segments,
            SEGMENTS=triton.next_power_of_2(num_segments),
            ARRIVING=arriving,
            BIASED=bias is not None,
            SUMMED=partial is not None,
            TILE=TILE_ROWS,
            R=ROWS,
            COLUMNS=triton.next_power_of_2(d_model),
        )


def _chunks(exchange: Exchange, segments: Segments) -> list[_Chunk]:
    return [_Chunk(exchange, segments, number) for number in range(exchange.num_chunks)]


def _product(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """Grouped product; without rows there is nothing that a kernel could be started for."""
    if rows.size(0) == 0:
        return rows.new_empty(0, matrices.size(-1))
    return torch._grouped_mm(rows, matrices, offs=offsets)


def _weight_gradient(node: Any, rows: Tensor, grad: Tensor, offsets: Tensor) -> Tensor | None:
    """(R, X) and (R, Y) -> (L, X, Y) for a node of `next_functions`; None: nobody wants it."""
    if node is None:
        return None
    if rows.size(0) == 0:
        return rows.new_zeros(offsets.numel(), rows.size(1), grad.size(1))
    return weight_gradient(node, rows, grad, offsets)


class ExchangedNetwork(torch.autograd.Function):
    """w2(h) + b2, h = act(w1(rows) + b1), normed with Sub-LN, on the ranks that have the experts.

    The order of the calls is the schedule. A chunk travels beside what is called after it was
    started. A grouped product takes all of a GPU's processors until it ends, and would wait for
    those that an exchange occupies; so exchanges are started after a chunk's first product, beside
    its activation. What nothing hides is the first chunk's way there and the last one's way back;
    in the backward pass the weights' gradients are computed meanwhile, of all experts at once.
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
        b2: Tensor,
        exchange: Exchange,
        name: str,
        eps: float,
    ) -> Tensor:
        """Send each row to its expert, and get back what that makes of it.

        Args:
            ctx: autograd's.
            rows: (A, D), sorted as models.moe.all_to_all says.
            w1: (L, D, F).
            b1: (L, F).
            gain: (L, F) of the inner LayerNorm; None: there is none.
            shift: (L, F), likewise.
            w2: (L, F, D).
            b2: (L, D).
            exchange: with the ranks.
            name: of the activation.
            eps: of the LayerNorm.

        Returns:
            (A, D).
        """
        rows = rows.contiguous()
        segments = segments_of(exchange.received_counts(), exchange.rank, exchange.num_chunks)
        chunks = _chunks(exchange, segments)
        arriving = rows.new_empty(exchange.num_arriving, rows.size(1))
        with exchange.timed("time_falltoall"):
            there = [exchange.start(0, rows, arriving)]
            there[0].wait()
        leaving, out = torch.empty_like(arriving), torch.empty_like(rows)
        inputs = rows.new_empty(exchange.num_received, rows.size(1))
        h = rows.new_empty(exchange.num_received, w1.size(2))
        back, kept = [], []
        for number, chunk in enumerate(chunks):
            if number:
                there[number].wait()
            chunk.sort(arriving, rows, inputs)
            x = _product(chunk.rows(inputs), w1[chunk.experts], chunk.offsets)
            if number + 1 < len(chunks):
                there.append(exchange.start(number + 1, rows, arriving))
            if number:
                back.append(exchange.start_back(number - 1, leaving, out))
            between = Activation(name, b1[chunk.experts], chunk.own(gain), chunk.own(shift), eps)
            _, means, scales = activation.forward(x, between, chunk.offsets, chunk.rows(h))
            y = _product(chunk.rows(h), w2[chunk.experts], chunk.offsets)
            chunk.unsort(y, leaving, out, b2[chunk.experts])
            kept += [x, means, scales]
        with exchange.timed("time_salltoall"):
            back.append(exchange.start_back(len(chunks) - 1, leaving, out))
            for work in back:
                work.wait()
        ctx.save_for_backward(w1, b1, gain, shift, w2, b2, inputs, h, *segments, *kept)
        ctx.exchange, ctx.name, ctx.eps = exchange, name, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """(A, D) -> gradients of rows, w1, b1, gain, shift, w2 and b2."""
        w1, b1, gain, shift, w2, b2, inputs, h, *others = ctx.saved_tensors
        segments, kept = Segments(*others[:4]), others[4:]
        exchange = ctx.exchange
        chunks = _chunks(exchange, segments)
        grad = grad.contiguous()
        arriving = grad.new_empty(exchange.num_arriving, grad.size(1))
        there = [exchange.start(0, grad, arriving)]
        grads, leaving = torch.empty_like(inputs), torch.empty_like(arriving)
        grad_rows, grad_x = torch.empty_like(grad), torch.empty_like(h)
        back, sums, small = [], [], []
        for number, chunk in enumerate(chunks):
            there[number].wait()
            sums.append(chunk.sort_and_sum(arriving, grad, grads))
            second = w2[chunk.experts].transpose(1, 2)
            grad_h = _product(chunk.rows(grads), second, chunk.offsets)
            if number + 1 < len(chunks):
                there.append(exchange.start(number + 1, grad, arriving))
            if number:
                back.append(exchange.start_back(number - 1, leaving, grad_rows))
            between = Activation(
                ctx.name, b1[chunk.experts], chunk.own(gain), chunk.own(shift), ctx.eps
            )
            x, means, scales = kept[3 * number : 3 * number + 3]
            own = (means, scales, chunk.rows(grad_x))
            small.append(activation.backward(grad_h, x, between, chunk.offsets, *own)[1:])
            first = w1[chunk.experts].transpose(1, 2)
            grad_inputs = _product(chunk.rows(grad_x), first, chunk.offsets)
            chunk.unsort(grad_inputs, leaving, grad_rows)
        back.append(exchange.start_back(len(chunks) - 1, leaving, grad_rows))
        nodes = [node for node, _ in ctx.next_functions]  # of tensors: no norm has none
        grad_w2 = _weight_gradient(nodes[-2], h, grads, segments.offsets)
        grad_w1 = _weight_gradient(nodes[1], inputs, grad_x, segments.offsets)
        between_grads = [
            None if parts[0] is None else torch.cat(parts) for parts in zip(*small, strict=True)
        ]
        grad_b2 = torch.cat(sums).view(b2.size(0), -1, b2.size(1)).sum(1).to(b2.dtype)
        for work in back:
            work.wait()
        return grad_rows, grad_w1, *between_grads, grad_w2, grad_b2, None, None, None
