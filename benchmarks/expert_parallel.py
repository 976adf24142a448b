"""What spreading experts over GPUs costs: weak scaling, and the share of the step in all-to-all.

    python -m benchmarks.expert_parallel --gpus 2 --out benchmarks/results/expert_parallel.json
    python -m benchmarks.expert_parallel --cpu --out expert_parallel_cpu.json

The model of ds_configs/lm_xmoe.json, dropless, ZeRO 1, in the engine of magnetar train, on random
tokens, with as many sequences and experts for each GPU in every run:

    one          one GPU, which has all its experts
    replicated   all GPUs, each with the same experts (ep_size 1): what data parallelism alone costs
    spread       all GPUs, each with experts of its own (ep_size = GPUs)

and `spread` once more where nothing travels: each rank keeps the rows that it would send and
computes on those. Weak scaling is tokens/s a GPU over those of `one`. One step of each is profiled
on every rank; exposed is the time in which a GPU runs an all-to-all kernel (that includes waiting
for the other ranks to come to it) and no kernel that computes.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.layer_profile import SYNCHRONISATIONS, traced, within
from benchmarks.measurement import (
    NO_RUN,
    argument_parser,
    fill_in,
    git_commit,
    hardware,
    launch,
    nccl_settings,
    positive,
    require_json,
    versions,
    write_json,
)
from magnetar.data.errors import UserError
from magnetar.launchers.terminal.user_errors import user_errors

RUNS = ("one", "replicated", "spread")
NOTHING_TRAVELS = "nothing travels"
WARM_UP = 2  # steps
RANDOM_VOCAB_SIZE = 2000  # where the config leaves it to the data
STEP = "one step"
ALL_TO_ALL, ANY_COLLECTIVE = "ncclDevKernel_SendRecv", "nccl"
SIZES: dict[bool, dict[str, Any]] = {
    False: {
        "config": Path("ds_configs/lm_xmoe.json"),
        "experts": 16,
        "batch": 1024,
        "micro_batch": 128,
    },
    True: {
        "config": Path("ds_configs/quickstart.json"),
        "experts": 4,
        "batch": 4,
        "micro_batch": 2,
    },
}


def union(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of the spans (begin, end)."""
    covered, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        covered += max(0.0, last - max(first, end))
        end = max(end, last)
    return covered


def device_times(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a Chrome trace (times in microseconds), what the device did within STEP.

    Returns:
        step_ms; exchange_ms and exposed_ms, in which all-to-all kernels run at all and beside no
        kernel that computes; other_exposed_ms, in which other collectives run beside neither;
        idle_ms, in which no kernel runs; synchronisations of the host, and copies to it.
    """
    outer, inside = within(events, STEP)
    spans: dict[str, list[tuple[float, float]]] = {"compute": [], "exchange": [], "other": []}
    for event in inside:
        if event["cat"] == "kernel":
            name = event["name"]
            kind = "other" if ANY_COLLECTIVE in name.lower() else "compute"
            kind = "exchange" if name.startswith(ALL_TO_ALL) else kind
            spans[kind].append((event["ts"], event["ts"] + event["dur"]))
    compute = union(spans["compute"])
    with_exchange = union(spans["compute"] + spans["exchange"])
    everything = union(itertools.chain(*spans.values()))
    return {
        "step_ms": outer["dur"] / 1000,
        "exchange_ms": union(spans["exchange"]) / 1000,
        "exposed_ms": (with_exchange - compute) / 1000,
        "other_exposed_ms": (everything - with_exchange) / 1000,
        "idle_ms": (outer["dur"] - everything) / 1000,
        "synchronisations": sum(event["name"] in SYNCHRONISATIONS for event in inside),
        "copies_to_host": sum(
            event["cat"] == "gpu_memcpy" and "DtoH" in event["name"] for event in inside
        ),
    }


def in_turn(_gate: Any, _given: Any, decided: Any, num_experts: int) -> Any:
    """Forward hook of a router: experts in turn in the place of those that it has chosen."""
    turns = _turns(*decided.experts.shape, num_experts, decided.experts.device)
    stats = decided.stats._replace(load=turns["load"].float())
    return decided._replace(**turns, stats=stats)


@cache
def _turns(num_tokens: int, top_k: int, num_experts: int, device: Any) -> dict[str, Any]:
    """Fields of a router's decision; a token's experts lie far from each other."""
    import torch

    from magnetar.models.moe.dispatch import expert_counts

    turns = torch.arange(num_tokens, device=device).unsqueeze(1)
    experts = (turns + torch.arange(top_k, device=device) * (num_experts // top_k)) % num_experts
    load = expert_counts(experts, num_experts)
    if device.type != "cuda":
        return {"experts": experts, "load": load}
    from magnetar.models.moe.kernels.counting_sort import kept_block_counts

    blocks = kept_block_counts(experts.int(), num_experts)
    return {"experts": experts.int(), "load": load, "block_counts": blocks}


class NothingTravels:
    """A stand-in for torch.distributed: each rank receives its own rows, beside computing."""

    def __init__(self, device: Any) -> None:
        """Make a stream for the copies, as NCCL has."""
        import torch

        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __getattr__(self, name: str) -> Any:
        """The attribute of torch.distributed, for everything but rows."""
        import torch.distributed

        return getattr(torch.distributed, name)

    def all_to_all_single(self, output: Any, given: Any, *_splits: Any, **_group: Any) -> Any:
        """Copy, beginning when what is queued is done."""
        import torch

        if self.stream is None:
            output.copy_(given)
            return SimpleNamespace(wait=lambda: None)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output.copy_(given)
            done = self.stream.record_event()
        # The closure keeps both tensors until it has been waited for.
        return SimpleNamespace(
            wait=lambda kept=(output, given): torch.cuda.current_stream().wait_event(done)
        )


def config_of(options: argparse.Namespace, run: str, ranks: int) -> Any:
    """The run's config, resolved for its ranks.

    Raises:
        UserError: if the config is wrong; it lists all problems.
    """
    from benchmarks.step_contenders import sparse_config
    from magnetar.engine.config.schema import check_config, load_config

    overrides = [
        *("zero_optimization.stage=1", f"train_batch_size={options.batch}"),
        f"train_micro_batch_size_per_gpu={options.micro_batch}",
        *options.set,
    ]
    config = load_config(options.config, overrides)
    vocab_size = config.model.vocab_size or RANDOM_VOCAB_SIZE
    values = sparse_config(config, options.experts, vocab_size=vocab_size).to_dict()
    values["train_batch_size"] *= ranks
    values["magnetar"]["training"]["run_dir"] = NO_RUN
    moe = values["magnetar"]["model"]["moe"]
    if options.capacity is not None:
        moe |= {"dispatch": "capacity", "capacity_factor": options.capacity}
        moe["capacity_scope"] = "rank"
    if run == "spread":
        moe |= {"num_experts": options.experts * ranks, "ep_size": ranks}
    found, problems = check_config(values, world_size=ranks)
    if found is None:
        raise UserError("\n  ".join([f"{run} cannot be measured:", *(t for _, t in problems)]))
    return found


def busiest_rank(loads: list[Any], ranks: int) -> float:
    """The mean over layers of the busiest rank's assignments over the mean rank's.

    Args:
        loads: (E,) for each layer, assignments of all ranks' tokens.
        ranks: number of ranks that share the experts.
    """
    by_rank = [load.view(ranks, -1).sum(1).double() for load in loads]
    return statistics.fmean(float(sums.max() / sums.mean()) for sums in by_rank)


class Bench:
    """The engine of a config on this rank."""

    def __init__(self, config: Any, device: Any) -> None:
        """Build it; the ranks must have joined."""
        import deepspeed.comm as dist

        from magnetar.engine.build import build_engine
        from magnetar.models.moe.layer import SparseFeedForward

        self.config, self.device, self.begin = config, device, time.perf_counter()
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.engine, _ = build_engine(config, device)
        self.layers = [m for m in self.engine.module.modules() if isinstance(m, SparseFeedForward)]
        self.number = 0

    def step(self) -> None:
        """The next step, on random tokens of this rank's own."""
        from benchmarks.step_worker import random_batch
        from magnetar.engine.train_step import loss_weights, train_step

        self.number += 1
        batch = random_batch(self.config, self.number * self.ranks + self.rank, self.device)
        seed = self.config.training.seed
        train_step(
            self.engine,
            batch,
            loss_weights(self.config.model.moe, self.config.training),
            seed,
            self.number,
        )

    def finish(self) -> None:
        """Wait for the device."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def keep_rows(self) -> None:
        """From now on nothing travels between ranks."""
        for layer in self.layers:
            if layer.ep_size > 1:
                layer.comm = NothingTravels(self.device)

    def force_balance(self) -> None:
        """From now on every expert gets as many rows, and every rank."""
        for layer in self.layers:
            hook = partial(in_turn, num_experts=layer.moe.num_experts)
            layer.gate.register_forward_hook(hook)

    def say(self, text: str) -> None:
        """Tell how far the benchmark is, once."""
        if self.rank == 0:
            print(f"  {time.perf_counter() - self.begin:5.1f} s  {text}", flush=True)

    def milliseconds(self, num_steps: int) -> float:
        """Of a step, on the slowest rank."""
        import deepspeed.comm as dist
        import torch

        self.finish()
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(num_steps):
            self.step()
        self.finish()
        seconds = torch.tensor([time.perf_counter() - begin], device=self.device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return 1000 * float(seconds) / num_steps

    def profiles(self) -> list[dict[str, Any]]:
        """`device_times` of a step on every rank; none without a GPU."""
        import torch.distributed

        if self.device.type != "cuda":
            return []
        own = device_times(traced(self.step, self.device, STEP))
        found: list[Any] = [None] * self.ranks
        torch.distributed.all_gather_object(found, own)
        return found

    def imbalance(self) -> float:
        """Of a step's last micro-batch, see `busiest_rank`."""
        import deepspeed.comm as dist

        loads: dict[int, Any] = {}
        hooks = [
            layer.register_forward_hook(
                lambda _m, _i, result, n=n: loads.update({n: result[1].load.detach().clone()})
            )
            for n, layer in enumerate(self.layers)
        ]
        self.step()
        for hook in hooks:
            hook.remove()
        for load in loads.values():
            dist.all_reduce(load)
        return busiest_rank([load.cpu() for load in loads.values()], self.layers[0].ep_size)


def work(options: argparse.Namespace) -> None:
    """What each rank of a run does; rank 0 writes what all have found."""
    import torch
    import torch.distributed

    from magnetar.engine.build import start_distributed

    if options.carve_out:
        torch._C._set_sm_carveout_experimental(options.carve_out)
    device = start_distributed()
    ranks = torch.distributed.get_world_size()
    bench = Bench(config_of(options, options.run, ranks), device)
    record: dict[str, Any] = {"run": options.run, "ranks": bench.ranks, "step_ms": []}
    bench.say("engine built")
    for _ in range(WARM_UP):
        bench.step()
    bench.say("warmed up")
    for _ in range(options.rounds):
        record["step_ms"].append(bench.milliseconds(options.steps))
        bench.say(f"{record['step_ms'][-1]:.1f} ms a step")
    record["busiest_rank"] = bench.imbalance()
    if profiles := bench.profiles():
        record["profile"] = profiles
    bench.say("profiled")
    records = [record]
    if options.run == "spread":
        bench.keep_rows()
        bench.step()
        times = [bench.milliseconds(options.steps) for _ in range(options.rounds)]
        records.append({"run": NOTHING_TRAVELS, "ranks": bench.ranks, "step_ms": times})
    if bench.rank == 0:
        sizes = {"seq_len": bench.config.data.seq_len, "hardware": hardware(bench.device)}
        options.out.write_text(json.dumps(sizes | {"records": records}))
    torch.distributed.barrier()


def summarised(records: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """The records with their medians and their scaling.

    Args:
        records: records of all runs, among them `one`.
        tokens: number of tokens of a step for each GPU.
    """
    for record in records:
        record["median_ms"] = statistics.median(record["step_ms"])
        record["tokens_per_second_per_gpu"] = 1000 * tokens / record["median_ms"]
    (one,) = (record for record in records if record["run"] == "one")
    for record in records:
        record["scaling"] = one["median_ms"] / record["median_ms"]
        for profile in record.get("profile", []):
            profile["exposed_share"] = profile["exposed_ms"] / profile["step_ms"]
    return records


def table(found: dict[str, Any]) -> str:
    """Markdown, a line for each run."""
    lines = [
        "| | GPUs | ms a step | tokens/s a GPU | over one GPU's | all-to-all, ms "
        "| exposed, share of each rank's step | host waits | busiest rank |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in found["results"]:
        profiles = record.get("profile", [])
        exchange = ", ".join(f"{profile['exchange_ms']:.1f}" for profile in profiles)
        exposed = ", ".join(f"{profile['exposed_share']:.1%}" for profile in profiles)
        waits = ", ".join(str(profile["synchronisations"]) for profile in profiles)
        busiest = f"{record['busiest_rank']:.3f}" if "busiest_rank" in record else ""
        lines.append(
            f"| {record['run']} | {record['ranks']} "
            f"| {record['median_ms']:.1f} ({min(record['step_ms']):.1f} to "
            f"{max(record['step_ms']):.1f}) | {record['tokens_per_second_per_gpu']:,.0f} "
            f"| {record['scaling']:.3f} | {exchange} | {exposed} | {waits} | {busiest} |"
        )
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks of every run, one run after the other; what they found.

    Raises:
        UserError: if the ranks of a run fail.
    """
    records: list[dict[str, Any]] = []
    found: dict[str, Any] = {"benchmark": "expert_parallel", "commit": git_commit()}
    found |= {"versions": versions(), "environment": nccl_settings()}
    keys = ("experts", "batch", "micro_batch", "set", "rounds", "steps", "carve_out", "capacity")
    found |= {key: getattr(options, key) for key in keys} | {"config": str(options.config)}
    for run in options.runs:
        ranks = 1 if run == "one" else options.gpus
        print(f"{run}: {ranks} rank{'s' * (ranks > 1)}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "found.json")
            arguments = [*options.arguments, "--run", run, "--out", str(out)]
            launch("benchmarks.expert_parallel", ranks, arguments)
            if not out.is_file():
                raise UserError(f"the ranks of `{run}` failed: what they say is above")
            answer = json.loads(out.read_text())
        records += answer["records"]
        found |= {"hardware": answer["hardware"], "seq_len": answer["seq_len"]}
    found["results"] = summarised(records, options.batch * found["seq_len"])
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with the defaults of a GPU or of a CPU."""
    parser = argument_parser("benchmarks.expert_parallel", __doc__)
    parser.add_argument("--gpus", type=positive, default=2, help="ranks that share experts: 2")
    parser.add_argument("--cpu", action="store_true", help="small, on processes of the CPU")
    parser.add_argument("--config", type=Path, help="lm_xmoe.json; with --cpu quickstart.json")
    parser.add_argument("--experts", type=positive, help="of a layer for each GPU: 16; --cpu 4")
    parser.add_argument("--batch", type=positive, help="sequences of a step, a GPU: 1024; --cpu 4")
    parser.add_argument("--micro-batch", type=positive, help="sequences at once: 128; --cpu 2")
    parser.add_argument("--rounds", type=positive, default=5, help="timed, of each: 5")
    parser.add_argument("--steps", type=positive, default=2, help="of a round: 2")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the config"
    )
    parser.add_argument(
        "--carve-out", type=int, default=0, help="processors that matrix products leave free: 0"
    )
    parser.add_argument(
        "--capacity",
        type=float,
        metavar="FACTOR",
        help="drop what is beyond, of each rank (GShard); none: nothing",
    )
    parser.add_argument("--quick", action="store_true", help="without `replicated`")
    parser.add_argument("--out", type=Path, required=True, help="results, a .json file")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher's
    options = parser.parse_args(arguments)
    fill_in(options, SIZES[options.cpu])
    options.runs = [run for run in RUNS if not (options.quick and run == "replicated")]
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    return options


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write the results."""
    options = parse(arguments)
    if options.cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if options.run is not None:
        work(options)
        from magnetar.engine.cluster.process_groups import leave_distributed

        leave_distributed()
        return
    if options.gpus < 2:
        raise UserError(f"--gpus {options.gpus} shares nothing: use 2 or more")
    require_json(options.out)
    for run in options.runs:  # before anything is started
        config_of(options, run, 1 if run == "one" else options.gpus)
    found = measure(options)
    write_json(options.out, found)
    print(f"{table(found)}\nwrote {options.out}")


if __name__ == "__main__":
    main()
