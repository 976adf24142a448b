"""The exchange of rows in two stages, inside the nodes and then between them.

Letters: M nodes, G ranks on each, W = M*G; L experts of each rank, C chunks.

Rank (m, g) is the g-th of node m. Its rows for (m', g') go to its neighbour (m, g') first, and from
there to (m', g'), among the ranks of the same place in their nodes:

    rank (0, 0) --inside--> rank (0, 1) --between--> rank (1, 1)

So a rank sends M - 1 messages to other nodes and not (M - 1) * G, each G times as large, for rows
that travel once more inside the node. Rows arrive in the order in which they would arrive in one
stage, so results are the same bits. All counts of both stages come from the one exchange of counts:
a neighbour is told what passes through it, any other rank what it gets.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from magnetar.models.moe.all_to_all import Exchange, Work


class _Words(NamedTuple):
    """What ranks tell each other about their counts.

    Attributes:
        told: where it lies among the (W*L,) counts that a rank sends, one rank after the other.
        sizes: of what each rank is told, and tells.
        received: (W*L,) where in what is heard lie the rows of each rank for this one.
        passing: (G*M*L,) where lie those of each neighbour for this place in each node.
    """

    told: Tensor
    sizes: list[int]
    received: Tensor
    passing: Tensor


@cache
def _words(
    num_nodes: int, num_ranks: int, num_local: int, rank: int, device: torch.device
) -> _Words:
    node = rank // (num_ranks // num_nodes)
    counts = torch.arange(num_ranks * num_local).view(num_nodes, -1, num_local)  # (M, G, L)
    told: list[Tensor] = []
    received: list[Tensor] = []
    passing: list[Tensor] = []
    begin = 0
    for other in range(num_ranks):
        its_node, its_place = divmod(other, num_ranks // num_nodes)
        part = counts[:, its_place] if its_node == node else counts[its_node, its_place]
        told.append(part.reshape(-1))
        heard = torch.arange(begin, begin + part.numel())
        begin += part.numel()
        if its_node == node:
            passing.append(heard)
            heard = heard.view(num_nodes, num_local)[node]
        received.append(heard)
    found = [torch.cat(parts).to(device) for parts in (told, received, passing)]
    return _Words(found[0], [part.numel() for part in told], *found[1:])


class _Stages(NamedTuple):
    """How many rows of a chunk travel in each stage, on the way to the experts.

    Attributes:
        given: to each neighbour.
        passing: [neighbour][node], those of a neighbour on their way to a node.
        arriving: from each node.
    """

    given: list[int]
    passing: list[list[int]]
    arriving: list[int]

    @property
    def taken(self) -> list[int]:
        """From each neighbour."""
        return list(map(sum, self.passing))

    @property
    def sent_on(self) -> list[int]:
        """To each node."""
        return list(map(sum, zip(*self.passing, strict=True)))


class _Relayed:
    """A second stage; until it has been waited for, what it sends is kept."""

    def __init__(self, work: Work, *kept: Tensor) -> None:
        self.work, self.kept = work, kept

    def wait(self) -> None:
        """See Work."""
        self.work.wait()
        for rows in self.kept:
            with _relaying(rows.device):  # which may give out the memory again
                self.work.wait()
        self.kept = ()


@cache
def _relaying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class HierarchicalExchange(Exchange):
    """An Exchange among ranks that lie side by side on several nodes, as many on each."""

    def _words(self, device: torch.device) -> _Words:
        sizes = (self.peers.num_nodes, self.num_ranks, self.num_local_experts, self.rank)
        return _words(*sizes, device)

    def _what_is_told(self, counts: Tensor) -> tuple[Tensor, tuple[list[int], ...], int]:
        words = self._words(counts.device)
        told = counts.view(-1).index_select(0, words.told)
        return told, (words.sizes, words.sizes), told.numel()

    def _received(self, counts: Tensor) -> Tensor:
        heard = counts[self.num_ranks * self.num_local_experts :]
        return heard[self._words(counts.device).received].view(self.num_ranks, -1)

    @cached_property
    def _stages(self) -> list[_Stages]:
        """Of each chunk."""
        num_nodes = self.peers.num_nodes
        heard = self._host_counts[self.num_ranks * self.num_local_experts :]
        passing = heard[self._words(heard.device).passing].view(
            -1, num_nodes, self.num_local_experts
        )
        passing = self._of_chunks(passing)  # (G, M, C)
        node, place = divmod(self.rank, passing.size(0))
        passing[place, node] = 0  # its own rows do not travel
        sent, received = (
            torch.tensor(splits.rows).view(self.num_chunks, num_nodes, -1)  # (C, M, G)
            for splits in self._sent_and_received
        )
        parts = (sent.sum(1), passing.permute(2, 0, 1), received.sum(2))
        return [_Stages(*of_chunk) for of_chunk in zip(*(p.tolist() for p in parts), strict=True)]

    def _num_sent(self, chunk: int, back: bool) -> tuple[int, list[int]]:
        stages = self._stages[chunk]
        inside = stages.taken if back else stages.given
        between = stages.arriving if back else stages.sent_on
        node, place = divmod(self.rank, len(inside))
        return sum(inside) - inside[place], between[:node] + between[node + 1 :]

    def _travel(self, chunk: int, rows: Tensor, arriving: Tensor, back: bool) -> Work:
        given, passing, from_nodes = stages = self._stages[chunk]
        inside, across = self.peers.inside, self.peers.across
        # In both stages what this rank gives to itself is a copy.
        num_passing = sum(stages.taken)
        if back:
            order = [list(of_node) for of_node in zip(*passing, strict=True)]
            first = (across, stages.sent_on, from_nodes)
            second = (inside, given, stages.taken)
        else:
            order = passing
            first = (inside, stages.taken, given)
            second = (across, from_nodes, stages.sent_on)
        halfway = rows.new_empty(num_passing, rows.size(1))
        work = self._start_stage(halfway, rows, *first)
        with _relaying(rows.device):
            work.wait()
            halfway_on = _transposed(halfway, order)
            work = self._start_stage(arriving, halfway_on, *second)
        return _Relayed(work, halfway, halfway_on)

    def _start_stage(
        self,
        arriving: Tensor,
        rows: Tensor,
        group: dist.ProcessGroup | None,
        here: list[int],
        there: list[int],
    ) -> Work:
        return self.comm.all_to_all_single(arriving, rows, here, there, group=group, async_op=True)


def _relaying(device: torch.device) -> AbstractContextManager[object]:
    """Where a GPU waits for the first stage, with whose end the second begins."""
    return torch.cuda.stream(_relaying_stream(device)) if device.type == "cuda" else nullcontext()


def _transposed(rows: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    """Blocks of so many rows each, [i][j] -> [j][i]."""
    blocks = iter(rows.split([size for of_one in sizes for size in of_one]))
    table = [[next(blocks) for _ in of_one] for of_one in sizes]
    return torch.cat([block for of_one in zip(*table, strict=True) for block in of_one])
