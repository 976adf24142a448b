"""Rows to the ranks that have their experts, and back.

Letters: W ranks that share one set of experts, E experts, L = E / W of each rank, C chunks,
A rows that this rank sends, R rows that its experts get, D d_model, N tokens, K top_k.

Chunk c holds the experts c*L/C to (c+1)*L/C of every rank, and is exchanged by itself: rows of one
chunk travel while those of another are computed. What is sent is sorted by (chunk, rank, expert),
and arrives sorted by (chunk, sender, expert). An expert lies in one chunk, so it sees the same rows
in the same order however many chunks there are.

How many rows go where is known on the device, and the host must know it before it can ask for
buffers and call NCCL: the one wait of a layer. It is for a copy on a stream of its own, so that the
device has work meanwhile: whatever is queued between the Exchange and its first use.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, cached_property
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def chunk_order(num_experts: int, num_ranks: int, num_chunks: int, device: torch.device) -> Tensor:
    """(E,) int64, the place of each expert where experts are sorted by chunk, then by rank."""
    places = torch.arange(num_experts, device=device).view(num_chunks, num_ranks, -1)
    return places.transpose(0, 1).reshape(-1)


class _Splits(NamedTuple):
    """Rows of each chunk to, or from, each rank.

    Attributes:
        rows: [chunk][rank].
        ends: where each chunk's rows end.
    """

    rows: list[list[int]]
    ends: list[int]

    def part(self, chunk: int, rows: Tensor) -> Tensor:
        """The rows of a chunk among those of all of them."""
        return rows[self.ends[chunk] - sum(self.rows[chunk]) : self.ends[chunk]]


def _splits(counts: Tensor) -> _Splits:
    """Of (C, W) on the host."""
    return _Splits(counts.tolist(), counts.sum(1).cumsum(0).tolist())


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Exchange:
    """The exchange of one forward pass of a layer; the backward pass goes the same ways.

    Made on every rank of the group at once: that starts the exchange of the counts.

    Attributes:
        num_chunks: C.
        timed: measures what is not hidden of the way there, "time_falltoall", and of the way back,
            "time_salltoall".
    """

    def __init__(
        self,
        comm: ModuleType,
        group: dist.ProcessGroup,
        counts: Tensor,
        num_chunks: int,
        timed: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """Start the exchange of counts.

        Args:
            comm: whose all_to_all_single is called.
            group: the W ranks.
            counts: (W, L) int64, rows for each expert of each rank.
            num_chunks: C, which divides L.
            timed: see the class.
        """
        self.comm, self.group = comm, group
        self.num_chunks = num_chunks
        self.timed = timed
        self._counts = counts.new_empty(2, *counts.shape)  # what is sent, what is received
        self._counts[0] = counts
        self._arrival = comm.all_to_all_single(
            self._counts[1], self._counts[0], group=group, async_op=True
        )
        self._on_host = self._counts
        if counts.is_cuda:
            self._on_host = torch.empty(self._counts.shape, dtype=counts.dtype, pin_memory=True)
            with torch.cuda.stream(_copying_stream(counts.device)):
                self._arrival.wait()
                self._on_host.copy_(self._counts, non_blocking=True)
                self._copied = torch.cuda.current_stream().record_event()

    @cached_property
    def _sent_and_received(self) -> tuple[_Splits, _Splits]:
        """What is sent and received, once the host knows: it waits."""
        if self._counts.is_cuda:
            self._copied.synchronize()
        else:
            self._arrival.wait()
        by_chunk = self._on_host.unflatten(2, (self.num_chunks, -1)).sum(-1)  # (2, W, C)
        sent, received = by_chunk.transpose(1, 2)
        return _splits(sent), _splits(received)

    def received_counts(self) -> Tensor:
        """(W, L) int64, the rows that each rank sends to each expert of this one."""
        if self._counts.is_cuda:
            torch.cuda.current_stream().wait_event(self._copied)
        else:
            self._arrival.wait()
        return self._counts[1]

    @property
    def num_received(self) -> int:
        """R."""
        return self._sent_and_received[1].ends[-1]

    @property
    def num_sent(self) -> int:
        """A."""
        return self._sent_and_received[0].ends[-1]

    def received_part(self, chunk: int, rows: Tensor) -> Tensor:
        """A chunk's rows of (R, ...) in the order of arrival, or of the experts."""
        return self._sent_and_received[1].part(chunk, rows)

    def start(self, chunk: int, rows: Tensor, arriving: Tensor) -> dist.Work:
        """Send a chunk of (A, D) to its experts, into a chunk of (R, D).

        Until the work has been waited for, the caller keeps both.
        """
        sent, received = self._sent_and_received
        return self._start(chunk, (sent, rows), (received, arriving))

    def start_back(self, chunk: int, rows: Tensor, arriving: Tensor) -> dist.Work:
        """Send a chunk of (R, D) to where it came from, into a chunk of (A, D); see `start`."""
        sent, received = self._sent_and_received
        return self._start(chunk, (received, rows), (sent, arriving))

    def _start(
        self, chunk: int, source: tuple[_Splits, Tensor], target: tuple[_Splits, Tensor]
    ) -> dist.Work:
        return self.comm.all_to_all_single(
            target[0].part(chunk, target[1]),
            source[0].part(chunk, source[1]),
            target[0].rows[chunk],
            source[0].rows[chunk],
            group=self.group,
            async_op=True,
        )

    def through(self, rows: Tensor, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What experts return, in one chunk and nothing overlapped.

        Args:
            rows: (A, D), sorted as the module says.
            experts: called with (R, D), sorted by expert and within one by sender, and the (L,)
                int64 rows of each expert; returns (R, D).

        Returns:
            (A, D).
        """
        assert self.num_chunks == 1
        with self.timed("time_falltoall"):
            rows = _AllToAll.apply(rows, self, False)  # (R, D)
        counts = self.received_counts()
        by_expert = _by_expert(counts, rows.size(0))
        rows = experts(rows.index_select(0, by_expert), counts.sum(0))
        rows = torch.empty_like(rows).index_copy(0, by_expert, rows)
        with self.timed("time_salltoall"):
            return _AllToAll.apply(rows, self, True)


def _by_expert(counts: Tensor, num_rows: int) -> Tensor:
    """(W, L) rows of each sender for each expert -> (R,), the place of arrival of sorted rows.

    Rows come sorted by (sender, expert); the grouped matmul wants (expert, sender).
    """
    sizes = counts.t().reshape(-1)  # (L*W,)
    arrival = (counts.view(-1).cumsum(0).view_as(counts) - counts).t().reshape(-1)
    shifts = arrival - (sizes.cumsum(0) - sizes)
    places = torch.arange(num_rows, device=counts.device)
    return places + shifts.repeat_interleave(sizes, output_size=num_rows)


class _AllToAll(torch.autograd.Function):
    """Rows of one chunk there or back; the gradient travels the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange, back: bool) -> Tensor:
        ctx.exchange, ctx.back = exchange, back
        num_rows = exchange.num_sent if back else exchange.num_received
        arriving = rows.new_empty(num_rows, rows.size(1))
        start = exchange.start_back if back else exchange.start
        start(0, rows.contiguous(), arriving).wait()
        return arriving

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _AllToAll.apply(grad, ctx.exchange, not ctx.back), None, None
