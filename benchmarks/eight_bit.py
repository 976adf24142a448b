"""AdamW with 8-bit states beside fp32 AdamW: memory, loss curves, speed, through the real engine.

    python -m benchmarks.eight_bit --out benchmarks/results/eight_bit.json

Trains a wider benchmarks/layouts.json on the text of `make train`, once with each optimizer. A
third run, fp32 AdamW with another seed, shows the distance of two curves by chance.
Everything else is equal: initial weights (except for the other seed), batches, schedule, clipping.
`--set` changes the model or the layout of all runs; on a CPU make the model small.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import chart
from benchmarks.measurement import (
    Training,
    argument_parser,
    git_commit,
    hardware,
    launch,
    setting_words,
    versions,
    write_json,
)

WIDE = {
    "train_batch_size": 64,
    "magnetar.model.d_model": 512,
    "magnetar.model.d_ff": 2048,
    "magnetar.model.num_heads": 8,
    "magnetar.model.max_seq_len": 256,
    "magnetar.model.stable_embedding": True,
    "magnetar.data.seq_len": 256,
    "magnetar.training.lr_schedule.warmup_steps": 50,
    "magnetar.training.eval_sequences": 256,
    "zero_optimization.stage": 1,
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "fp32 AdamW": {},
    "AdamW8bit": {"optimizer.type": "AdamW8bit"},
    "fp32 AdamW, another seed": {"magnetar.training.seed": 2},
}
LAST = 20  # steps whose mean loss is compared


def work(out: Path, name: str, settings: list[str]) -> None:
    """The work of a rank for one optimizer."""
    import deepspeed.comm as dist
    import torch

    from magnetar.engine.build import start_distributed
    from magnetar.engine.evaluate import evaluate, rank_and_world_size
    from magnetar.models.cost import num_parameters

    training = Training(settings, start_distributed())
    config, device = training.config, training.device
    losses, norms, seconds = [], [], []
    for step in range(1, config.training.num_steps + 1):
        dist.barrier()
        begin = time.perf_counter()
        losses.append(training.step(step))
        norms.append(float(training.clip.norm))
        seconds.append(time.perf_counter() - begin)
    states = [
        value
        for of_tensor in training.engine.basic_optimizer.state.values()
        for value in of_tensor.values()
        if isinstance(value, torch.Tensor)
    ]
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in states}
    micro = config.deepspeed["train_micro_batch_size_per_gpu"]
    held_out = training.prepared.valid_batches(micro, *rank_and_world_size())
    valid = evaluate(training.engine.module, held_out, device)
    if dist.get_rank() != 0:
        return
    found = {
        "optimizer": name,
        "config": config.to_dict(),
        "parameters": num_parameters(config.model)[0],
        "ranks": training.ranks,
        "hardware": hardware(device),
        "versions": versions(),
        "commit": git_commit(),
        "state_bytes_of_a_rank": sum(storage.nbytes() for storage in storages.values()),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "step_seconds": statistics.median(seconds[len(seconds) // 4 :]),
        "losses": losses,
        "gradient_norms": norms,
        "last_loss": statistics.fmean(losses[-LAST:]),
        "valid_loss": valid.loss,
    }
    write_json(out, found)


def table(runs: list[dict[str, Any]]) -> str:
    """A Markdown table of the runs; differences are from the first."""
    lines = [
        f"| optimizer | states of a rank | peak memory | step | loss, last {LAST} steps "
        "| validation | largest difference of smoothed losses |",
        "|---|---|---|---|---|---|---|",
    ]
    reference = _smoothed(runs[0]["losses"])
    for run in runs:
        pairs = zip(_smoothed(run["losses"]), reference, strict=True)
        apart = max(abs(own - other) for own, other in pairs)
        peak = run["peak_memory_bytes"]
        lines.append(
            f"| {run['optimizer']} | {run['state_bytes_of_a_rank'] / 2**20:,.1f} MiB "
            f"| {f'{peak / 2**20:,.0f} MiB' if peak else '-'} | {run['step_seconds']:.4f} s "
            f"| {run['last_loss']:.4f} | {run['valid_loss']:.4f} | {apart:.4f} |"
        )
    return "\n".join(lines)


def _smoothed(losses: list[float]) -> list[float]:
    """Means of LAST losses, one after the other."""
    count = max(1, len(losses) - LAST + 1)
    return [statistics.fmean(losses[index : index + LAST]) for index in range(count)]


def draw(runs: list[dict[str, Any]], picture: Path) -> None:
    """The smoothed losses of the runs, a PNG."""
    with chart.picture(picture, 1, 1, figsize=(7, 4)) as (_, ((axes,),)):
        for run, (color, style) in zip(
            runs, ((chart.DENSE, "-"), (chart.ACCENT, "--"), (chart.GRAY, ":")), strict=True
        ):
            means = _smoothed(run["losses"])
            first = len(run["losses"]) - len(means) + 1
            steps = range(first, first + len(means))
            axes.plot(steps, means, style, color=color, label=run["optimizer"])
        axes.set(xlabel="step", ylabel=f"training loss, mean of {LAST} steps (nats)")
        axes.legend(frameon=False)


def main() -> None:
    """Train with each, print what was found, and draw the curves beside it."""
    parser = argument_parser("benchmarks.eight_bit", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="a .json file; a .png beside it")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--set", action="append", default=[], help="as for magnetar train")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.out, options.work, options.set)
        from magnetar.engine.cluster.process_groups import leave_distributed

        leave_distributed()
        return
    steps = {
        "magnetar.training.num_steps": options.steps,
        "magnetar.training.lr_schedule.total_steps": options.steps,
    }
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for name, keys in OPTIMIZERS.items():
            part = Path(folder, "part.json")
            arguments = ["--out", part, "--work", name]
            arguments += setting_words(WIDE | steps, options.set) + setting_words(keys)
            launch("benchmarks.eight_bit", options.ranks, arguments).check_returncode()
            runs.append(json.loads(part.read_text()))
    write_json(options.out, {"runs": runs})
    draw(runs, options.out.with_suffix(".png"))
    print(table(runs))


if __name__ == "__main__":
    main()
