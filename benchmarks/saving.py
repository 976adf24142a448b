"""The cost of saving: the time that training stands still, with and without asynchronous saves.

    python -m benchmarks.saving --ranks 2 --out benchmarks/results/saving_cpu.json

Trains benchmarks/layouts.json made wider, and saves several times in each way, in turn. `async`
goes on at once: `blocked` is the time in `save` and, in the step after it, that of the update
waiting for the copy; `step_while_writing` is that step, `step` one without a save. `sync` waits
until the checkpoint is complete. Times are the slowest rank's.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measurement import Training, argument_parser, launch, setting_words, write_json

REPEATS = 5
BIG = {
    "magnetar.model.d_model": 512,
    "magnetar.model.d_ff": 2048,
    "magnetar.model.num_heads": 8,
    "zero_optimization.stage": 1,
}


def work(out: Path, folder: str, settings: list[str]) -> None:
    """What each rank does."""
    import deepspeed.comm as dist
    import torch

    from magnetar.engine.build import start_distributed
    from magnetar.engine.checkpoint.save_load import Saver

    training = Training(settings, start_distributed())
    device = training.device

    def slowest(seconds: float) -> float:
        value = torch.tensor([seconds], dtype=torch.float64, device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return float(value)

    def timed(action: Callable[..., None], *arguments: Any) -> float:
        dist.barrier()
        begin = time.perf_counter()
        action(*arguments)
        return slowest(time.perf_counter() - begin)

    training.step(1)
    times: dict[str, list[float]] = {
        name: [] for name in ("step", "blocked", "step_while_writing", "sync")
    }
    step, state = 1, {"seconds": 0.0, "num_clipped": 0, "before": {}, "after": {}}
    waited = [0.0]
    with Saver(training.engine, training.config, training.prepared) as saver:
        wait_for_copy = saver.copied.wait

        def timed_wait() -> None:
            begin = time.perf_counter()
            wait_for_copy()
            waited[0] += time.perf_counter() - begin

        saver.copied.wait = timed_wait
        saver.save(step, state)
        saver.wait()
        for _ in range(REPEATS):
            times["step"].append(timed(training.step, step := step + 1))
            waited[0] = 0.0
            seconds = timed(saver.save, step, state)
            times["step_while_writing"].append(timed(training.step, step := step + 1))
            times["blocked"].append(seconds + slowest(waited[0]))
            saver.wait()
            times["sync"].append(timed(lambda: (saver.save(step, state), saver.wait())))
    if dist.get_rank() == 0:
        checkpoint = max((Path(folder) / "checkpoints").iterdir())
        num_bytes = sum(file.stat().st_size for file in checkpoint.iterdir())
        median = {name: statistics.median(values) for name, values in times.items()}
        write_json(
            out,
            {
                "ranks": training.ranks,
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
                "machine": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "bytes": num_bytes,
                "seconds": times,
                "median": median,
                "blocked_share_of_sync": median["blocked"] / median["sync"],
            },
        )


def main() -> None:
    """Measure, and print what was found."""
    parser = argument_parser("benchmarks.saving", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="a .json file")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", help="where checkpoints go; a temporary folder")
    parser.add_argument("--set", action="append", default=[], help="as for magnetar train")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.out, options.folder, options.set)
        from magnetar.engine.cluster.process_groups import leave_distributed

        leave_distributed()
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        own = {"magnetar.model.moe.ep_size": options.ranks, "magnetar.training.run_dir": folder}
        arguments = ["--out", options.out, "--folder", folder, "--work"]
        arguments += setting_words(BIG | own, options.set)
        launch("benchmarks.saving", options.ranks, arguments).check_returncode()
    found = json.loads(options.out.read_text())
    print(
        f"{found['bytes'] / 2**20:,.0f} MiB: a synchronous save takes "
        f"{found['median']['sync']:.2f} s, an asynchronous one blocks for "
        f"{found['median']['blocked']:.3f} s, {found['blocked_share_of_sync']:.1%} of that"
    )


if __name__ == "__main__":
    main()
