"""A measurement of the ranks' collectives through the real launcher: results and speed."""

import json
import os
import re
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from magnetar.data.errors import MachineError
from magnetar.engine.build import missing_types, start_distributed
from magnetar.engine.cluster.hosts import path_of_programs
from magnetar.engine.doctor.node import MARK

_REPEATS = 5
_SLOW = 0.5  # a link is slow below this share of the median of its kind


class Sizes(NamedTuple):
    """Bytes that a rank hands to each collective.

    Attributes:
        all_reduce_bytes: gradient bytes all-reduced per step.
        all_to_all_bytes: token-row bytes exchanged among the ep_size ranks.
        point_to_point_bytes: bytes sent to one other rank.
        ep_size: number of ranks that share the experts; 0: all.
    """

    all_reduce_bytes: int
    all_to_all_bytes: int
    point_to_point_bytes: int
    ep_size: int = 0


class Link(NamedTuple):
    """Two ranks that have sent to each other at the same time.

    Attributes:
        ranks: numbers of the two ranks.
        is_inside: whether both are on one machine.
        bandwidth: bytes a second, each way.
    """

    ranks: tuple[int, int]
    is_inside: bool
    bandwidth: float


def measure(sizes: Sizes, seconds: float) -> None:
    """Measure the collectives on every rank, within a time limit; rank 0 prints the results."""
    signal.alarm(round(seconds))  # the default action ends the process even inside a collective
    device = start_distributed()
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    ep_size = sizes.ep_size or num_ranks
    results: dict[str, Any] = {"backend": dist.get_backend(), "num_ranks": num_ranks}
    values = torch.full((sizes.all_reduce_bytes // 4,), rank + 1.0, device=device)
    dist.all_reduce(values)
    results["sums_right"] = all(_gathered(bool((values == num_ranks * (num_ranks + 1) / 2).all())))
    results["all_reduce"] = [sizes.all_reduce_bytes, _seconds(lambda: dist.all_reduce(values))]

    groups = [
        dist.new_group(list(range(first, first + ep_size)))
        for first in range(0, num_ranks, ep_size)
    ]
    group, place = groups[rank // ep_size], rank % ep_size
    per_rank = max(1, sizes.all_to_all_bytes // 4 // ep_size)
    sent = torch.full((ep_size, per_rank), float(rank), device=device)
    received = torch.empty_like(sent)

    def exchange() -> None:
        dist.all_to_all_single(received, sent, group=group)

    exchange()
    senders = torch.arange(ep_size, device=device) + (rank - place)
    results["rows_right"] = all(_gathered(bool((received == senders[:, None]).all())))
    results["all_to_all"] = [4 * per_rank * ep_size, _seconds(exchange), ep_size]

    results["missing_types"] = _gathered(missing_types())
    results["links"] = _links(sizes.point_to_point_bytes, device)
    if rank == 0:
        print(f"{MARK}{json.dumps(results)}", flush=True)
    signal.alarm(0)


def _gathered(value: Any) -> list[Any]:
    """The value of every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _times(call: Callable[[], None], prepare: Callable[[], object] = _synchronize) -> list[float]:
    """Seconds of a few calls; a first one, which makes the connections, is not counted."""
    times = []
    for _ in range(1 + _REPEATS):
        prepare()
        _synchronize()
        start = time.perf_counter()
        call()
        _synchronize()
        times.append(time.perf_counter() - start)
    return times[1:]


def _seconds(collective: Callable[[], None]) -> float:
    """The median time of one call in seconds; all ranks start together."""
    return statistics.median(_times(collective, dist.barrier))


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Rounds in which every pair of `count` players meets once (circle method)."""
    players = [*range(count)] + [-1] * (count % 2)  # -1: a bye
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in pairs if -1 not in pair]
        players = [players[0], players[-1], *players[1:-1]]


def _links(num_bytes: int, device: torch.device) -> list[Link]:
    """Links between the machines' first ranks, then inside each machine; complete on rank 0."""
    rank = dist.get_rank()
    ranks_of: dict[str, list[int]] = {}
    for other, name in enumerate(_gathered(os.environ.get("CROSS_RANK", os.uname().nodename))):
        ranks_of.setdefault(name, []).append(other)
    own = next(ranks for ranks in ranks_of.values() if rank in ranks)
    leaders = [ranks[0] for ranks in ranks_of.values()]
    most = max(map(len, ranks_of.values()))
    buffers = torch.ones(2, max(1, num_bytes // 4), device=device)
    found = []
    for team, size in ((leaders, len(leaders)), (own, most)):
        for pairs in rounds(size):
            dist.barrier()
            for ranks in [(team[a], team[b]) for a, b in pairs if b < len(team)]:
                if rank in ranks:
                    speed = num_bytes / _pair_seconds(buffers, sum(ranks) - rank)
                    found.append(Link(ranks, team is own, speed))
    slowest: dict[tuple[tuple[int, int], bool], float] = {}
    for ranks, is_inside, speed in (link for links in _gathered(found) for link in links):
        slowest[ranks, is_inside] = min(speed, slowest.get((ranks, is_inside), speed))
    return [Link(*link, speed) for link, speed in slowest.items()]


def _pair_seconds(buffers: Tensor, peer: int) -> float:
    """The best of a few times in which both ranks send and receive a buffer."""

    def exchange() -> None:
        operations = [
            dist.P2POp(dist.isend, buffers[0], peer),
            dist.P2POp(dist.irecv, buffers[1], peer),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return min(_times(exchange))


def slow_links(links: Sequence[Link]) -> list[tuple[Link, float]]:
    """Links with less than half the median bandwidth of their kind, and that median."""
    found = []
    for is_inside in (False, True):
        kind = [link for link in links if link.is_inside == is_inside]
        median = statistics.median([link.bandwidth for link in kind] or [0.0])
        found += [(link, median) for link in kind if link.bandwidth < _SLOW * median]
    return found


def launch(launcher: Sequence[str], sizes: Sizes, seconds: float) -> dict[str, Any]:
    """The measurements of all ranks, which the deepspeed launcher's command line starts.

    Raises:
        MachineError: if the ranks measured nothing; it has the end of their output.
    """
    asked = ",".join(map(str, (*sizes, round(seconds))))
    command = [*launcher, "--module", "magnetar.launchers.doctor", f"--measure={asked}"]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | {"PATH": path_of_programs()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=seconds + 60)
            words = f"the launcher ended with status {status}"
        except subprocess.TimeoutExpired:
            words = f"the ranks were not done within {seconds + 60:.0f} s"
        finally:
            if process.poll() is None:
                # SIGKILL, because DeepSpeed's launcher answers any other signal by ending the
                # launchers of all other runs too. The ranks end by themselves.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        lines = output.read().splitlines()
    for line in lines:
        if MARK in line:
            results = json.loads(line.partition(MARK)[2])
            results["links"] = [Link(tuple(a), b, c) for a, b, c in results["links"]]
            return results
    errors = [line for line in lines if re.search(r"(^|: )(error|\w*Error): ", line)]
    raise MachineError("\n".join([f"{words}:", *(errors or lines)[-8:]]))
