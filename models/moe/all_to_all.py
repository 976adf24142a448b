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
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Peers(NamedTuple):
    """The W ranks that share one set of experts, as one of them sees them.

    Attributes:
        group: of them all.
        rank: of this process among them.
        nodes: (W,) the node that each lies on; empty: one for all.
        inside: those of this rank's node; None: rows travel straight to their experts.
        across: those of the same place in their nodes, likewise.
    """

    group: dist.ProcessGroup
    rank: int
    nodes: tuple[int, ...] = ()
    inside: dist.ProcessGroup | None = None
    across: dist.ProcessGroup | None = None

    @property
    def num_nodes(self) -> int:
        """In how many groups rows travel after they have been sorted inside a node; 1: none."""
        return 1 if self.across is None else self.across.size()


@dataclass
class Traffic:
    """What a rank has sent to experts and back, forward and backward.

    Attributes:
        stayed: bytes of rows for its own experts.
        inside: bytes to other ranks of its node.
        between: bytes to other nodes.
        messages: to other nodes.
    """

    stayed: int = 0
    inside: int = 0
    between: int = 0
    messages: int = 0


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
    num_experts: int,
    num_ranks: int,
    num_chunks: int,
    rank: int,
    device: torch.device,
    num_nodes: int = 1,
) -> SendOrder:
    """The experts sorted by (chunk, rank, expert), and behind all others those of `rank`.

    With several nodes ranks are sorted by (place in the node, node).
    """
    experts = torch.arange(num_experts, device=device).view(num_ranks, num_chunks, -1)
    ranks = torch.arange(num_ranks, device=device).view(num_nodes, -1).t().reshape(-1)
    others = experts[ranks[ranks != rank]].transpose(0, 1)
    order = torch.cat([others.reshape(-1), experts[rank].reshape(-1)])
    return SendOrder(order, order.argsort())


class _Splits:
    """Rows of each chunk to, or from, each rank.

    Plain numbers: the device runs dry while the host makes these, and tensors would take it longer.
    """

    def __init__(self, counts: list[list[int]], rank: int) -> None:
        """Take the counts [rank][chunk] of a rank."""
        self.own_rows = counts[rank]
        self.rows = [list(of_chunk) for of_chunk in zip(*counts, strict=True)]  # [chunk][rank]
        for of_chunk in self.rows:
            of_chunk[rank] = 0
        self.ends = list(accumulate(map(sum, self.rows)))
        self.own_ends = list(accumulate(self.own_rows))

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


class Work(Protocol):
    """What is under way."""

    def wait(self) -> object:
        """Return when it has arrived; on a GPU, have the current stream wait for that."""


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Exchange:
    """The exchange of one forward pass of a layer; the backward pass goes the same ways.

    Made on every rank of the group at once: that starts the exchange of the counts.

    Attributes:
        peers: with whom.
        rank: of this process among them.
        num_chunks: C.
        timed: measures what is not hidden of the way there, "time_falltoall", and of the way back,
            "time_salltoall".
    """

    def __init__(
        self,
        comm: ModuleType,
        peers: Peers,
        counts: Tensor,
        num_chunks: int,
        timed: Callable[[str], AbstractContextManager[None]],
        traffic: Traffic | None = None,
    ) -> None:
        """Start the exchange of counts.

        Args:
            comm: whose all_to_all_single is called.
            peers: the W ranks.
            counts: (W, L) int64, rows for each expert of each rank.
            num_chunks: C, which divides L.
            timed: see the class.
            traffic: to which what is sent is added; None: nobody counts.
        """
        self.comm, self.peers, self.rank = comm, peers, peers.rank
        self.num_chunks = num_chunks
        self.timed = timed
        self.traffic = traffic
        self.num_ranks, self.num_local_experts = counts.shape
        told, sizes, num_heard = self._what_is_told(counts)
        self._counts = counts.new_empty(counts.numel() + num_heard)  # what is sent, what is heard
        self._counts[: counts.numel()] = counts.view(-1)
        self._arrival = comm.all_to_all_single(
            self._counts[counts.numel() :], told, *sizes, group=peers.group, async_op=True
        )
        self._on_host = self._counts
        if counts.is_cuda:
            self._on_host = torch.empty(self._counts.shape, dtype=counts.dtype, pin_memory=True)
            with torch.cuda.stream(_copying_stream(counts.device)):
                self._arrival.wait()
                self._on_host.copy_(self._counts, non_blocking=True)
                self._copied = torch.cuda.current_stream().record_event()

    def _what_is_told(self, counts: Tensor) -> tuple[Tensor, tuple[list[int], ...], int]:
        """What each rank is told of (W, L) counts, how much of it (heard, told), and is heard."""
        return counts.view(-1), (), counts.numel()

    def _received(self, counts: Tensor) -> Tensor:
        """(W, L) of all that was sent and heard, on the host or the device."""
        return counts[-self.num_ranks * self.num_local_experts :].view(self.num_ranks, -1)

    def _of_chunks(self, counts: Tensor) -> Tensor:
        """(..., L) -> (..., C), the rows of each chunk."""
        return counts.unflatten(-1, (self.num_chunks, -1)).sum(-1)

    @cached_property
    def _host_counts(self) -> Tensor:
        """All that was sent and heard, once the host knows: it waits."""
        if self._counts.is_cuda:
            self._copied.synchronize()
        else:
            self._arrival.wait()
        return self._on_host

    @cached_property
    def _sent_and_received(self) -> tuple[_Splits, _Splits]:
        """What is sent and received, by chunk and rank."""
        sent = self._host_counts[: self.num_ranks * self.num_local_experts].view(self.num_ranks, -1)
        received = self._received(self._host_counts)
        return self._splits(sent), self._splits(received)

    def _splits(self, counts: Tensor) -> _Splits:
        """Of (W, L) on the host."""
        return _Splits(self._of_chunks(counts).tolist(), self.rank)

    def received_counts(self) -> Tensor:
        """(W, L) int64, the rows that each rank sends to each expert of this one."""
        if self._counts.is_cuda:
            torch.cuda.current_stream().wait_event(self._copied)
        else:
            self._arrival.wait()
        return self._received(self._counts)

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

    def start(self, chunk: int, rows: Tensor, arriving: Tensor) -> Work:
        """Send a chunk of (A, D) to its experts, into a chunk of (S, D).

        Until the work has been waited for, the caller keeps both.
        """
        sent, received = self._sent_and_received
        work = self._travel(chunk, sent.part(chunk, rows), received.part(chunk, arriving), False)
        self._count(chunk, rows, False)
        return work

    def start_back(self, chunk: int, rows: Tensor, arriving: Tensor) -> Work:
        """Send a chunk of (S, D) to where it came from, into a chunk of (A, D); see `start`."""
        sent, received = self._sent_and_received
        work = self._travel(chunk, received.part(chunk, rows), sent.part(chunk, arriving), True)
        self._count(chunk, rows, True)
        return work

    def _travel(self, chunk: int, rows: Tensor, arriving: Tensor, back: bool) -> Work:
        """Start to send what travels of a chunk."""
        there, here = (splits.rows[chunk] for splits in self._sent_and_received)
        if back:
            there, here = here, there
        return self.comm.all_to_all_single(
            arriving, rows, here, there, group=self.peers.group, async_op=True
        )

    def _count(self, chunk: int, rows: Tensor, back: bool) -> None:
        """Add to the traffic what this rank sends of a chunk of rows like these."""
        if self.traffic is None:
            return
        splits = self._sent_and_received[back]
        bytes_of_row = rows.size(1) * rows.element_size()
        inside, between = self._num_sent(chunk, back)
        self.traffic.stayed += bytes_of_row * splits.own_rows[chunk]
        self.traffic.inside += bytes_of_row * inside
        self.traffic.between += bytes_of_row * sum(between)
        self.traffic.messages += sum(map(bool, between))

    def _num_sent(self, chunk: int, back: bool) -> tuple[int, list[int]]:
        """Rows of a chunk that this rank sends inside its node, and in each message to another."""
        rows, nodes = self._sent_and_received[back].rows[chunk], self.peers.nodes
        if not nodes:
            return sum(rows), []
        own = nodes[self.rank]
        between = [num for num, node in zip(rows, nodes, strict=True) if node != own]
        return sum(rows) - sum(between), between

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
