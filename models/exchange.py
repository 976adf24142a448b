"""Rows to the ranks that have their experts, and back.

Letters: W ranks that share one set of experts, E experts, L = E / W of each rank, C chunks,
M = L / C experts of a chunk, A rows that this rank sends, R rows that its experts get, S rows of
those that come from other ranks, D d_model, N tokens, K top_k.

Chunk c holds the experts c*M to (c+1)*M of every rank, and is exchanged by itself: rows of one
chunk travel while those of another are computed. What is sent is sorted by (chunk, rank, expert),
and arrives sorted by (chunk, sender, expert); what this rank has for its own experts lies behind
all that and does not travel. An expert lies in one chunk, so it sees the same rows in the same
order however many chunks there are.

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


class SendOrder(NamedTuple):
    """The order in which a rank sends its rows.

    Attributes:
        experts: (E,) int64, the experts in that order.
        places: (E,) int64, the place of each expert in it.
    """

    experts: Tensor
    places: Tensor


@cache
def send_order(
    num_experts: int, num_ranks: int, num_chunks: int, rank: int, device: torch.device
) -> SendOrder:
    """The experts sorted by (chunk, rank, expert), and behind all others those of `rank`."""
    experts = torch.arange(num_experts, device=device).view(num_ranks, num_chunks, -1)
    others = torch.cat([experts[:rank], experts[rank + 1 :]]).transpose(0, 1)
    order = torch.cat([others.reshape(-1), experts[rank].reshape(-1)])
    return SendOrder(order, order.argsort())


class _Splits:
    """Rows of each chunk to, or from, each rank."""

    def __init__(self, counts: Tensor, rank: int) -> None:
        """Take (C, W) of the host, of a rank."""
        own, others = counts[:, rank], counts.clone()
        others[:, rank] = 0
        self.rows: list[list[int]] = others.tolist()  # [chunk][rank]
        self.own_rows: list[int] = own.tolist()
        self.ends: list[int] = others.sum(1).cumsum(0).tolist()
        self.own_ends: list[int] = own.cumsum(0).tolist()

    @property
    def total(self) -> int:
        """All rows, those that do not travel among them."""
        return self.ends[-1] + self.own_ends[-1]

    def part(self, chunk: int, rows: Tensor) -> Tensor:
        """What travels of a chunk."""
        return rows[self.ends[chunk] - sum(self.rows[chunk]) : self.ends[chunk]]

    def own_part(self, chunk: int, rows: Tensor) -> Tensor:
        """What does not, where it lies behind all that does."""
        end = self.ends[-1] + self.own_ends[chunk]
        return rows[end - self.own_rows[chunk] : end]

    def sorted_part(self, chunk: int, rows: Tensor) -> Tensor:
        """All rows of a chunk, where they lie sorted by expert."""
        end = self.ends[chunk] + self.own_ends[chunk]
        return rows[end - self.own_rows[chunk] - sum(self.rows[chunk]) : end]


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Exchange:
    """The exchange of one forward pass of a layer; the backward pass goes the same ways.

    Made on every rank of the group at once: that starts the exchange of the counts.

    Attributes:
        rank: of this process in the group.
        num_chunks: C.
        timed: measures what is not hidden of the way there, "time_falltoall", and of the way back,
            "time_salltoall".
    """

    def __init__(
        self,
        comm: ModuleType,
        group: dist.ProcessGroup,
        rank: int,
        counts: Tensor,
        num_chunks: int,
        timed: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """Start the exchange of counts.

        Args:
            comm: whose all_to_all_single is called.
            group: the W ranks.
            rank: of this process among them.
            counts: (W, L) int64, rows for each expert of each rank.
            num_chunks: C, which divides L.
            timed: see the class.
        """
        self.comm, self.group, self.rank = comm, group, rank
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
        return _Splits(sent, self.rank), _Splits(received, self.rank)

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
        return self._sent_and_received[1].total

    @property
    def num_arriving(self) -> int:
        """S."""
        return self._sent_and_received[1].ends[-1]

    @property
    def num_sent(self) -> int:
        """A."""
        return self._sent_and_received[0].total

    def arriving_part(self, chunk: int, rows: Tensor) -> Tensor:
        """A chunk's rows of (S, D)."""
        return self._sent_and_received[1].part(chunk, rows)

    def own_part(self, chunk: int, rows: Tensor) -> Tensor:
        """Those of a chunk's (A, D) that do not travel."""
        return self._sent_and_received[0].own_part(chunk, rows)

    def sorted_part(self, chunk: int, rows: Tensor) -> Tensor:
        """A chunk's rows of (R, ...), sorted by expert."""
        return self._sent_and_received[1].sorted_part(chunk, rows)

    def start(self, chunk: int, rows: Tensor, arriving: Tensor) -> dist.Work:
        """Send a chunk of (A, D) to its experts, into a chunk of (S, D).

        Until the work has been waited for, the caller keeps both.
        """
        sent, received = self._sent_and_received
        return self._start(chunk, (sent, rows), (received, arriving))

    def start_back(self, chunk: int, rows: Tensor, arriving: Tensor) -> dist.Work:
        """Send a chunk of (S, D) to where it came from, into a chunk of (A, D); see `start`."""
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
        by_expert = _by_expert(counts, self.rank, rows.size(0))
        rows = experts(rows.index_select(0, by_expert), counts.sum(0))
        rows = torch.empty_like(rows).index_copy(0, by_expert, rows)
        with self.timed("time_salltoall"):
            return _AllToAll.apply(rows, self, True)


def _by_expert(counts: Tensor, rank: int, num_rows: int) -> Tensor:
    """(W, L) rows of each sender for each expert -> (R,), where sorted rows have arrived.

    Rows come sorted by (sender, expert), this rank's own last; the grouped matmul wants
    (expert, sender).
    """
    arriving = torch.cat([counts[:rank], counts[rank + 1 :], counts[rank : rank + 1]])
    starts = (arriving.view(-1).cumsum(0) - arriving.view(-1)).view_as(counts)
    starts = torch.cat([starts[:rank], starts[-1:], starts[rank:-1]])
    sizes = counts.t().reshape(-1)  # (L*W,)
    shifts = starts.t().reshape(-1) - (sizes.cumsum(0) - sizes)
    places = torch.arange(num_rows, device=counts.device)
    return places + shifts.repeat_interleave(sizes, output_size=num_rows)


class _AllToAll(torch.autograd.Function):
    """Rows of one chunk there or back; the gradient travels the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange, back: bool) -> Tensor:
        ctx.exchange, ctx.back = exchange, back
        rows = rows.contiguous()
        num_rows = exchange.num_sent if back else exchange.num_received
        arriving = rows.new_empty(num_rows, rows.size(1))
        start = exchange.start_back if back else exchange.start
        work = start(0, rows, arriving)
        num_own = exchange.own_part(0, arriving if back else rows).size(0)
        arriving[num_rows - num_own :] = rows[rows.size(0) - num_own :]
        work.wait()
        return arriving

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _AllToAll.apply(grad, ctx.exchange, not ctx.back), None, None
