"""The all-to-all of expert parallelism: token rows go to the ranks of their experts, and back.

Letters: W ranks that share one set of experts, E experts, L = E / W experts of each rank,
A rows that this rank sends, R rows that its experts receive, S of them from other ranks, D d_model.

A rank sends its rows sorted by (rank of the expert, expert). Rows for its own experts come
last and are not sent. Rows of other ranks arrive sorted by (sender, expert).

    A rows of this rank's tokens               | rows for other ranks ... | own rows |
                                                        |  all-to-all          |
    R rows of this rank's experts              | S rows of other ranks ...| own rows |

The numbers of rows are known on the device first, and NCCL wants them on the host: that is the one
wait of a layer. They are copied on a stream of their own, so that the device works on whatever is
queued between the construction of an AllToAll and its first use.
"""

import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

NODE_VARIABLE = "MAGNETAR_NODE"


class Peers(NamedTuple):
    """The W ranks that share one set of experts.

    Attributes:
        group: process group of these ranks.
        rank: rank of this process in the group.
        nodes: (W,) node of each rank; empty if all ranks share one node.
    """

    group: dist.ProcessGroup
    rank: int
    nodes: tuple[int, ...] = ()


# Ranks of a group never move to another node, so one gather serves every MoE layer of a model.
_nodes_of_group: WeakKeyDictionary[dist.ProcessGroup, tuple[int, ...]] = WeakKeyDictionary()


def peers_of(group: dist.ProcessGroup) -> Peers:
    """The ranks of a group and their nodes; every rank of the group calls this together."""
    if group not in _nodes_of_group:
        names: list[str] = [""] * group.size()
        dist.all_gather_object(names, node_name(), group=group)
        _nodes_of_group[group] = tuple(names.index(name) for name in names)
    return Peers(group, group.rank(), _nodes_of_group[group])


def node_name() -> str:
    """MAGNETAR_NODE if it is set; otherwise the host name and the network namespace."""
    if NODE_VARIABLE in os.environ:
        return os.environ[NODE_VARIABLE]
    network = Path("/proc/self/ns/net")  # two containers of one host have two namespaces
    return f"{socket.gethostname()} {os.readlink(network) if network.exists() else ''}"


def expert_parallel_rank(rank: int, world_size: int, ep_size: int, placement: str) -> int:
    """The rank within its expert-parallel group, which says which experts it holds."""
    if placement == "across_nodes":
        return rank // (world_size // ep_size)
    return rank % ep_size


@dataclass
class Traffic:
    """Bytes of token rows that a rank has dispatched and combined, forward and backward.

    Attributes:
        local: bytes for this rank's own experts, which are not sent.
        intra_node: bytes sent to other ranks of the same node.
        inter_node: bytes sent to other nodes.
    """

    local: int = 0
    intra_node: int = 0
    inter_node: int = 0


class SendOrder(NamedTuple):
    """The order in which a rank sends its rows.

    Attributes:
        experts: (E,) int64, experts in the order of sending.
        positions: (E,) int64, position of each expert in that order.
    """

    experts: Tensor
    positions: Tensor


@cache
def send_order(num_experts: int, num_ranks: int, rank: int, device: torch.device) -> SendOrder:
    """The experts sorted by (rank, expert), with this rank's own experts behind all others."""
    experts = torch.arange(num_experts, device=device).view(num_ranks, -1)  # (W, L)
    order = torch.cat([experts[:rank], experts[rank + 1 :], experts[rank : rank + 1]]).view(-1)
    return SendOrder(order, order.argsort())


class RowCounts(NamedTuple):
    """Numbers of rows in one direction, on the host.

    These are plain integers because the device may run out of work while the host computes them,
    and small tensors would take the host longer.

    Attributes:
        by_rank: (W,) rows sent to, or received from, each rank; 0 for this rank.
        remote: sum of by_rank.
        own: rows for this rank's own experts.
    """

    by_rank: list[int]
    remote: int
    own: int


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class AllToAll:
    """The all-to-alls of one forward pass of a layer; the backward pass uses the same row counts.

    Every rank of the group constructs it at the same time. The constructor starts the all-to-all of
    the counts.

    Attributes:
        peers: ranks that exchange rows.
        rank: rank of this process among them.
        timed: context manager that measures "time_falltoall" (dispatch) or "time_salltoall"
            (combine).
    """

    def __init__(
        self,
        comm: ModuleType,
        peers: Peers,
        send_counts: Tensor,
        timed: Callable[[str], AbstractContextManager[None]],
        traffic: Traffic | None = None,
    ) -> None:
        """Start the all-to-all of the counts, by comm.all_to_all_single.

        Counts are (W, L) int64, rows for each expert of each rank. Sent bytes are added to traffic.
        """
        self.comm, self.peers, self.rank = comm, peers, peers.rank
        self.timed = timed
        self.traffic = traffic
        # [0] is what this rank sends to the others, [1] what it receives. One tensor, one copy.
        self._counts = send_counts.new_empty(2, *send_counts.shape)  # (2, W, L)
        self._counts[0] = send_counts
        self._counts_work = comm.all_to_all_single(
            self._counts[1].view(-1), send_counts.view(-1), group=peers.group, async_op=True
        )
        self._counts_on_host = self._counts
        if send_counts.is_cuda:
            self._counts_on_host = torch.empty(
                self._counts.shape, dtype=self._counts.dtype, pin_memory=True
            )
            with torch.cuda.stream(_copy_stream(send_counts.device)):
                self._counts_work.wait()
                self._counts_on_host.copy_(self._counts, non_blocking=True)
                self._counts_copied = torch.cuda.current_stream().record_event()

    @cached_property
    def row_counts(self) -> tuple[RowCounts, RowCounts]:
        """The rows sent, A in all, and the rows received, R in all; the host waits here."""
        if self._counts.is_cuda:
            self._counts_copied.synchronize()
        else:
            self._counts_work.wait()
        found = []
        for by_rank in self._counts_on_host.sum(2).tolist():
            own, by_rank[self.rank] = by_rank[self.rank], 0
            found.append(RowCounts(by_rank, sum(by_rank), own))
        return found[0], found[1]

    def recv_counts(self) -> Tensor:
        """(W, L) int64 on the device, rows that each rank sends to each of this rank's experts."""
        if self._counts.is_cuda:
            torch.cuda.current_stream().wait_event(self._counts_copied)
        else:
            self._counts_work.wait()
        return self._counts[1]

    def start(self, rows: Tensor, received: Tensor, back: bool = False) -> dist.Work:
        """Dispatch (A, D) into (S, D); with `back` combine (S, D) into (A, D).

        The caller keeps both tensors until it has waited for the work. On a GPU only the current
        stream waits.
        """
        send, recv = self.row_counts[::-1] if back else self.row_counts
        work: dist.Work = self.comm.all_to_all_single(
            received[: recv.remote],
            rows[: send.remote],
            recv.by_rank,
            send.by_rank,
            group=self.peers.group,
            async_op=True,
        )
        if self.traffic is not None:
            bytes_per_row = rows.size(1) * rows.element_size()
            nodes = self.peers.nodes or (0,) * len(send.by_rank)
            here = nodes[self.rank]
            pairs = zip(send.by_rank, nodes, strict=True)
            intra_node = sum(number for number, node in pairs if node == here)
            self.traffic.local += bytes_per_row * send.own
            self.traffic.intra_node += bytes_per_row * intra_node
            self.traffic.inter_node += bytes_per_row * (send.remote - intra_node)
        return work

    def through(self, rows: Tensor, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(A, D) -> (A, D), sorted as the module says: dispatch, apply the experts, combine.

        The experts are a function of (R, D), sorted by (expert, sender), and of the (L,) int64 rows
        of each expert; it returns (R, D). This is the plain path.
        """
        with self.timed("time_falltoall"):
            rows = _MoveRows.apply(rows, self, False)  # (R, D), sorted by (sender, expert)
        counts = self.recv_counts()  # (W, L)
        order = sender_major_positions(counts, self.rank, rows.size(0))  # (R,)
        rows = experts(rows.index_select(0, order), counts.sum(0))  # (R, D), by (expert, sender)
        rows = torch.empty_like(rows).index_copy(0, order, rows)  # (R, D), by (sender, expert)
        with self.timed("time_salltoall"):
            return _MoveRows.apply(rows, self, True)  # (A, D)


def sender_major_positions(counts: Tensor, rank: int, num_rows: int) -> Tensor:
    """(R,) int64, the positions, among the received rows, of the rows sorted by (expert, sender).

    Received rows are sorted by (sender, expert) with this rank's own rows last. The grouped matmul
    wants them sorted by (expert, sender). Counts are (W, L), rows of each sender for each expert.
    """
    received = torch.cat([counts[:rank], counts[rank + 1 :], counts[rank : rank + 1]])  # (W, L)
    starts = (received.view(-1).cumsum(0) - received.view(-1)).view_as(counts)  # (W, L)
    starts = torch.cat([starts[:rank], starts[-1:], starts[rank:-1]])  # (W, L), senders in order
    sizes = counts.t().reshape(-1)  # (L*W,)
    shifts = starts.t().reshape(-1) - (sizes.cumsum(0) - sizes)  # (L*W,)
    positions = torch.arange(num_rows, device=counts.device)  # (R,)
    return positions + shifts.repeat_interleave(sizes, output_size=num_rows)


class _MoveRows(torch.autograd.Function):
    """Dispatch or combine with autograd; the gradient travels the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, all_to_all: AllToAll, back: bool) -> Tensor:
        ctx.all_to_all, ctx.back = all_to_all, back
        rows = rows.contiguous()
        counts = all_to_all.row_counts[0 if back else 1]
        received = rows.new_empty(counts.remote + counts.own, rows.size(1))
        work = all_to_all.start(rows, received, back)
        # This rank's own rows are last on both sides, and are copied while the others travel.
        received[counts.remote :] = rows[rows.size(0) - counts.own :]
        work.wait()
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _MoveRows.apply(grad, ctx.all_to_all, not ctx.back), None, None
