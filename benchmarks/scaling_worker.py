"""What the ranks of the scaling benchmark do.

    deepspeed --num_gpus N --module benchmarks.scaling_worker JOB

JOB is a file of JSON: `runs`, by name resolved configs or, of part `numbers`, changes to
benchmarks/layouts.json; `part`; `rounds` of so many `steps`; `out`, the file of what was found.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch

from benchmarks.expert_parallel import WARM_UP, Bench
from benchmarks.step_contenders import checked, cost
from magnetar.data.atomic import write_atomically
from magnetar.engine.build import start_distributed
from magnetar.engine.cluster.process_groups import leave_distributed
from magnetar.launchers.terminal.user_errors import user_errors
from magnetar.models.cost import num_parameters
from tests.faults.invariance import curve

STEPS_COMPARED = 20
MOST_PROFILED = 2  # micro-steps: the trace of more takes long to write


def measured(bench: Bench, rounds: int, steps: int) -> dict[str, Any]:
    """On every rank: a config's speed and memory."""
    config, device, sizes = bench.config, bench.device, bench.config.deepspeed
    for _ in range(WARM_UP):
        bench.step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {"step_ms": [bench.milliseconds(steps) for _ in range(rounds)]}
    if device.type == "cuda":
        peak = torch.tensor(torch.cuda.max_memory_allocated(), device=device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        found["peak_bytes"] = int(peak)
    if bench.layers:
        found["busiest_rank"] = bench.imbalance()
    moe = config.model.moe
    return found | {
        "ranks": bench.ranks,
        "num_experts": moe.num_experts if moe else 0,
        "num_parameters": num_parameters(config.model)[0],
        "flops_per_token": cost(config),
        "dtype": config.dtype,
        "compile": config.training.compile,
        "sequences": sizes["train_batch_size"] // bench.ranks,
        "micro_batch": sizes["train_micro_batch_size_per_gpu"],
        "seq_len": config.data.seq_len,
        "profile": [],
    }


def balanced(bench: Bench, rounds: int, steps: int) -> list[float]:
    """Milliseconds of a step in which no rank has more rows than another; it stays so."""
    bench.force_balance()
    for _ in range(WARM_UP):
        bench.step()
    return [bench.milliseconds(steps) for _ in range(rounds)]


def keep(job: dict[str, Any], found: dict[str, Any]) -> None:
    """Rank 0 writes what there is."""
    if dist.get_rank() == 0:
        write_atomically(Path(job["out"]), json.dumps(found))


def work(file: Path) -> None:
    """What each rank of a launch does; rank 0 writes after each of the job's runs."""
    job, found = json.loads(file.read_text()), {}
    device = start_distributed()
    torch.set_num_threads(1)  # on a CPU a core each, however many ranks
    for name, values in job["runs"].items():
        if job["part"] == "numbers":
            found[name] = curve(values, STEPS_COMPARED, device)
        else:
            bench = Bench(checked(values, dist.get_world_size()), device)
            found[name] = measured(bench, job["rounds"], job["steps"])
            keep(job, found)  # whatever becomes of the profile
            if bench.config.deepspeed["gradient_accumulation_steps"] <= MOST_PROFILED:
                found[name]["profile"] = bench.profiles()
            if job["part"] == "scaling":
                found[name]["balanced_ms"] = balanced(bench, job["rounds"], job["steps"])
            bench.engine.destroy()
            del bench
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        torch.compiler.reset()  # compiled versions count for all models of a process
        keep(job, found)
    dist.barrier()


@user_errors()
def main() -> None:
    """Do the job that the last argument names; before it is the launcher's --local_rank."""
    work(Path(sys.argv[-1]))
    leave_distributed()


if __name__ == "__main__":
    main()
