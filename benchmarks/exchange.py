"""Rows to experts on two nodes and back: straight, and inside the nodes first.

    python -m benchmarks.exchange --slots 4 --out benchmarks/results/exchange_two_hosts.json

The nodes are two network namespaces of this machine, joined by a cable (Linux and root; see
tests.faults.hosts), or, with --here, only names that ranks of this machine get. --mbit makes the
cable slower. The ranks are processes on the CPU, joined by gloo: what is measured is the price of a
message and of a second way through memory there, not a GPU's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.provenance import git_commit, hardware, versions
from magnetar.data.errors import UserError
from magnetar.launchers.user_errors import user_errors
from tests.faults.hosts import INTERFACE, missing, two_hosts

KINDS = ("flat", "hierarchical")
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE}


def work(options: argparse.Namespace) -> None:
    """What each rank does; the first writes what all have found."""
    import torch
    import torch.distributed as dist

    from magnetar.models.moe.all_to_all import Peers, Traffic
    from magnetar.models.moe.config import MoEConfig
    from magnetar.models.moe.nodes import peers_of

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    keys: dict[str, Any] = {"num_experts": num_ranks, "ep_size": num_ranks}
    peers: dict[str, Peers] = {
        kind: peers_of(group, MoEConfig(**keys, exchange=kind))  # type: ignore[arg-type]
        for kind in KINDS
    }
    results = []
    for num_rows in options.rows:
        counts = torch.full((num_ranks, 1), -(-num_rows // num_ranks))
        rows = torch.randn(int(counts.sum()), options.width)
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        sums: dict[str, Any] = {}
        for turn in range(options.warm_up + options.rounds):
            for kind in KINDS if turn % 2 else reversed(KINDS):
                traffic = Traffic()
                dist.barrier()
                begin = time.perf_counter()
                back = exchanged(peers[kind], counts, rows, traffic)
                took = torch.tensor(time.perf_counter() - begin)
                assert torch.equal(back, rows)
                dist.all_reduce(took, op=dist.ReduceOp.MAX)
                if turn >= options.warm_up:
                    seconds[kind].append(float(took))
                sums[kind] = torch.tensor([traffic.inside, traffic.between, traffic.messages])
        for kind in KINDS:
            dist.all_reduce(sums[kind])
            inside, between, messages = sums[kind].tolist()
            results.append(
                {
                    "rows": num_rows,
                    "exchange": kind,
                    "ms": 1000 * statistics.median(seconds[kind]),
                    "ms_all": [1000 * value for value in seconds[kind]],
                    "bytes_inside": inside,
                    "bytes_between": between,
                    "messages_between": messages,
                }
            )
    if rank == 0:
        found = {"ranks": num_ranks, "nodes": peers["flat"].nodes, "results": results}
        options.out.write_text(json.dumps(found | {"hardware": hardware(torch.device("cpu"))}))
    dist.barrier()
    dist.destroy_process_group()


def exchanged(peers: Any, counts: Any, rows: Any, traffic: Any) -> Any:
    """Rows that have been at their experts, which return what they get."""
    import torch.distributed as dist

    from magnetar.models.moe.all_to_all import Exchange
    from magnetar.models.moe.hierarchical_all_to_all import HierarchicalExchange

    kind = Exchange if peers.across is None else HierarchicalExchange
    exchange = kind(dist, peers, counts, 1, lambda _: nullcontext(), traffic)
    return exchange.through(rows, lambda rows, _: rows)


Start = Callable[[Sequence[str], Mapping[str, str]], subprocess.Popen]


@contextmanager
def nodes(options: argparse.Namespace) -> Iterator[tuple[str, list[Start]]]:
    """The first rank's address, and what starts a process on each node."""
    if options.here:

        def start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
            return subprocess.Popen(command, env=dict(environment) | {"GLOO_SOCKET_IFNAME": "lo"})

        yield "127.0.0.1", [start, start]
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        two_hosts(Path(folder, "hosts"), options.slots) as two,
    ):
        for host in two.hosts:
            if options.mbit:
                shape = f"rate {options.mbit}mbit burst 128kb latency 200ms".split()
                command = ["tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", *shape]
                host.run(command, check=True)
        starts: list[Start] = [
            lambda command, environment, host=host: host.start(command, env=environment)  # type: ignore[misc]
            for host in two.hosts
        ]
        yield two.hosts[0].address, starts


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks on both nodes; what they found.

    Raises:
        UserError: if a rank fails.
    """
    with nodes(options) as (address, starts), tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        command = [sys.executable, "-m", "benchmarks.exchange", *options.arguments]
        command += ["--out", str(out), "--work"]
        ranks = []
        for rank in range(2 * options.slots):
            node = rank // options.slots
            environment = os.environ | ENVIRONMENT
            environment |= {"RANK": str(rank), "WORLD_SIZE": str(2 * options.slots)}
            environment |= {"MASTER_ADDR": address, "MASTER_PORT": "29571"}
            if options.here:
                environment["MAGNETAR_NODE"] = f"node {node}"
            ranks.append(starts[node](command, environment))
        statuses = [process.wait() for process in ranks]
        if any(statuses) or not out.is_file():
            raise UserError(f"the ranks ended with {statuses}")
        return json.loads(out.read_text())


def table(found: dict[str, Any]) -> str:
    """Markdown, a line for each number of rows."""
    lines = [
        "| rows of a rank | KiB of a message between nodes | flat, ms | by nodes, ms | messages "
        "between nodes | MiB between | MiB inside |",
        "|---|---|---|---|---|---|---|",
    ]
    results = iter(found["results"])
    for flat, other in zip(results, results, strict=True):
        size = [r["bytes_between"] / r["messages_between"] / 1024 for r in (flat, other)]
        lines.append(
            f"| {flat['rows']} | {size[0]:.0f}, {size[1]:.0f} | {flat['ms']:.2f} "
            f"| {other['ms']:.2f} | {flat['messages_between']}, {other['messages_between']} "
            f"| {flat['bytes_between'] / 2**20:.2f}, {other['bytes_between'] / 2**20:.2f} "
            f"| {flat['bytes_inside'] / 2**20:.2f}, {other['bytes_inside'] / 2**20:.2f} |"
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    from benchmarks.moe_layer import counts, positive

    parser = argparse.ArgumentParser(prog="python -m benchmarks.exchange", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--slots", type=positive, default=4, help="ranks on each node: 4")
    parser.add_argument(
        "--rows", type=counts, default=[8, 64, 512, 4096, 16384], help="of a rank, with commas"
    )
    parser.add_argument("--width", type=positive, default=256, help="numbers of a row: 256")
    parser.add_argument("--rounds", type=positive, default=20, help="timed, of each: 20")
    parser.add_argument("--warm-up", type=positive, default=3, help="and before that: 3")
    parser.add_argument("--mbit", type=positive, help="the cable's, in Mbit/s: as fast as it is")
    parser.add_argument("--here", action="store_true", help="nodes by name alone, without root")
    parser.add_argument("--out", type=Path, required=True, help="results, a .json file")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    return options


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write the results."""
    options = parse(arguments)
    if options.work:
        work(options)
        return
    if options.slots < 2:
        raise UserError(f"--slots {options.slots} has no inside of a node: use 2 or more")
    if options.out.suffix != ".json":
        raise UserError(f"--out {options.out} must end in .json: such as --out results.json")
    if not options.here and (reason := missing()):
        raise UserError(f"{reason}: or use --here")
    found = {"benchmark": "exchange", "commit": git_commit(), "versions": versions()}
    found |= {key: getattr(options, key) for key in ("slots", "width", "rounds", "mbit", "here")}
    found |= measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{table(found)}\nwrote {options.out}")


if __name__ == "__main__":
    main()
