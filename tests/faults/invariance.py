"""The layout is an implementation detail: every layout's losses and gradient norms, side by side.

    python -m tests.faults.invariance --out docs/invariance.md

Trains benchmarks/layouts.json for 50 steps on the text of `make train`, in fp32 and in bf16. It
takes every combination of ranks (1, 2, 4), ep_size (1, 2, 4, dividing the ranks), ZeRO stage, top_k
(1, 2), dispatch (dropless, capacity) and gradient accumulation (1, 4). Each run is compared with
one rank, ep_size 1, ZeRO 0 (in bf16 ZeRO 1) of the same top_k, dispatch and accumulation. The
accumulation must be the same, since capacity and balance loss are those of one accumulation step
over all ranks (`moe.balance_scope`).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

from benchmarks.measurement import Training, argument_parser, launch

NUM_STEPS = 50
ROUNDING = "rounding"
NUM_ROUNDINGS = {"fp32": 3, "bf16": 9}  # in bf16 their spread is the bound
LOSS_BOUND, NORM_BOUND = 5e-5, 2e-4  # nats; relative
VARIANTS = {
    f"top-{top_k}, {dispatch}, {accumulation} micro-step{'s' * (accumulation > 1)}": {
        "magnetar.model.moe.top_k": top_k,
        "gradient_accumulation_steps": accumulation,
    }
    | (
        {"magnetar.model.moe.dispatch": dispatch, "magnetar.model.moe.capacity_factor": 1.0}
        if dispatch == "capacity"
        else {}
    )
    for top_k, dispatch, accumulation in product((1, 2), ("dropless", "capacity"), (1, 4))
}


def layouts(world_size: int, dtype: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and keys of every layout of so many ranks; bf16 needs ZeRO."""
    for ep_size, stage in product((1, 2, 4), (0, 1, 2, 3)):
        if world_size % ep_size or (dtype == "bf16" and stage == 0):
            continue
        keys: dict[str, Any] = {
            "magnetar.model.moe.ep_size": ep_size,
            "zero_optimization.stage": stage,
        }
        if dtype == "bf16":
            keys["bf16.enabled"] = True
        yield f"{world_size} | {ep_size} | {stage}", keys
        if world_size == 1 and stage == 1:
            for seed in range(NUM_ROUNDINGS[dtype]):
                yield f"1 | 1 | 1, rounding {seed + 1}", keys | {ROUNDING: seed}


def round_otherwise(engine: Any, seed: int) -> None:
    """Move each master weight by at most one unit in its last place; in bf16 move products, too.

    Each number that a linear layer returns and each weight's gradient is moved whenever it has been
    rounded to bf16: with the probability of 1/6 by one unit in its last place, which is the
    variance of the difference of two roundings.
    """
    import torch

    from magnetar.engine.checkpoint.format import WEIGHT
    from magnetar.engine.zero import shares

    generator = torch.Generator().manual_seed(seed)
    for share in shares(engine):
        weight = share.values[WEIGHT]
        units = torch.randint(-1, 2, weight.shape, generator=generator).to(weight.device)
        weight.mul_(1 + units * 2.0**-23)

    if next(engine.module.parameters()).dtype != torch.bfloat16:
        return

    def moved(values: torch.Tensor) -> torch.Tensor:
        if values.dtype != torch.bfloat16:
            return values
        draws = torch.rand(values.shape, device=values.device)
        steps = (draws < 1 / 12).short() - (draws > 11 / 12).short()
        bits = values.detach().contiguous().view(torch.int16)  # the next one is the next number
        otherwise = (bits + steps * (values != 0)).view(torch.bfloat16)
        return values + (otherwise - values.detach())

    for parameter in engine.module.parameters():
        parameter.register_hook(moved)
    for module in engine.module.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _module, _inputs, output: moved(output))


def curve(changes: dict[str, Any], num_steps: int, device: Any) -> dict[str, list[float]]:
    """The global batch's loss, the gradient norm and the clip coefficient of each step."""
    import torch

    rounding, linear = changes.pop(ROUNDING, None), torch.nn.functional.linear
    training = Training([f"{key}={json.dumps(value)}" for key, value in changes.items()], device)
    engine, clip = training.engine, training.clip
    if rounding is not None:
        round_otherwise(engine, rounding)
    found: dict[str, list[float]] = {"loss": [], "norm": [], "coefficient": []}
    for step in range(1, num_steps + 1):
        found["loss"].append(training.step(step))
        found["norm"].append(float(clip.norm))
        found["coefficient"].append(float(clip.coefficient))
    engine.destroy()
    torch.nn.functional.linear = linear  # ZeRO 3 leaves its own there
    return found


def work(out: Path, dtype: str, variants: list[str], num_steps: int) -> None:
    """What each rank does: every layout of this many ranks, one after the other."""
    import deepspeed.comm as dist
    import torch

    from magnetar.engine.build import start_distributed

    device = start_distributed()
    torch.set_num_threads(1)  # tiny products: threads would only wait for one another
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for variant in variants:
        for name, keys in layouts(dist.get_world_size(), dtype):
            answer = curve(VARIANTS[variant] | keys, num_steps, device)
            found.setdefault(f"{dtype}, {variant}", {})[name] = answer
            if dist.get_rank() == 0:
                print(f"{dtype}, {variant}: {name}: {answer['loss'][-1]:.4f}", flush=True)
    if dist.get_rank() == 0:
        out.write_text(json.dumps({"hardware": hardware(), "curves": found}))
    dist.barrier()


def curves_of(world_size: int, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks with the launcher; what they found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "curves.json")
        arguments = ["--out", out, "--work", "--dtypes", dtype, "--variants", *options.variants]
        arguments += ["--steps", str(options.steps)]
        launch("tests.faults.invariance", world_size, arguments).check_returncode()
        return json.loads(out.read_text())


def difference(own: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """The largest of a loss, in nats, and of a gradient norm, relative, over all steps."""
    return (
        max(abs(a - b) for a, b in zip(own["loss"], other["loss"], strict=True)),
        max(abs(a / b - 1) for a, b in zip(own["norm"], other["norm"], strict=True)),
    )


def bounds(dtype: str, curves: dict[str, Any]) -> tuple[float, float]:
    """Of the loss and of the norm; in bf16 the largest difference of two one-rank runs' roundings.

    Those are of the first layout: itself, and as often rounded otherwise.
    """
    if dtype == "fp32":
        return LOSS_BOUND, NORM_BOUND
    first = next(iter(curves))
    rounded = [curve for name, curve in curves.items() if name == first or "rounding" in name]
    found = [difference(one, other) for one, other in combinations(rounded, 2)]
    return max(loss for loss, _ in found), max(norm for _, norm in found)


def cell(dtype: str, name: str, curves: dict[str, Any]) -> tuple[str, bool]:
    """A layout's differences from the first layout, and whether they are within the bounds.

    In fp32 beyond the bound of the loss, that from the nearest run of another rounding stands
    beside it.
    """
    own, reference = curves[name], next(iter(curves.values()))
    loss, norm = difference(own, reference)
    loss_bound, norm_bound = bounds(dtype, curves)
    text, is_rounding = f"{loss:.0e}, {norm:.0e}", "rounding" in name
    within = (loss <= loss_bound and norm <= norm_bound) or is_rounding
    if not within:
        text = f"**{text}**"
    if dtype == "fp32" and loss > loss_bound and not is_rounding:
        other = {r: difference(own, c)[0] for r, c in curves.items() if "rounding" in r}
        nearest = min(other, key=other.__getitem__)
        text += f" ({other[nearest]:.0e} from {nearest.partition(', ')[2]})"
    is_clipped = max(own["coefficient"]) < 1
    return text if is_clipped else f"{text}, NOT clipped", within and is_clipped


def table(dtype: str, found: dict[str, dict[str, Any]], variants: list[str]) -> tuple[str, bool]:
    """A type's Markdown table, and whether every difference is below its bound."""
    columns = [f"{dtype}, {variant}" for variant in variants]
    lines = [
        "| ranks | ep_size | ZeRO | " + " | ".join(variants) + " |",
        "|---" * (3 + len(variants)) + "|",
    ]
    holds = True
    for name in found[columns[0]]:
        cells = [cell(dtype, name, found[column]) for column in columns]
        lines.append(f"| {name} | " + " | ".join(text for text, _ in cells) + " |")
        holds &= all(within for _, within in cells)
    allowed = [bounds(dtype, found[column]) for column in columns]
    lines.append("| | | bound | " + " | ".join(f"{a:.0e}, {b:.0e}" for a, b in allowed) + " |")
    return "\n".join(lines), holds


def main() -> int:
    """Run every layout and write the page; status 1 if a difference exceeds its bound."""
    parser = argument_parser("tests.faults.invariance", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="the page, a .md file")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.out, options.dtypes[0], options.variants, options.steps)
        from magnetar.engine.cluster.process_groups import leave_distributed

        leave_distributed()
        return 0
    found: dict[str, dict[str, Any]] = {}
    for dtype, world_size in product(options.dtypes, options.worlds):
        answer = curves_of(world_size, dtype, options)
        for column, curves in answer["curves"].items():
            found.setdefault(column, {}).update(curves)
    page, holds = PAGE_BEGIN.format(steps=options.steps, hardware=answer["hardware"]), True
    for dtype in options.dtypes:
        text, within = table(dtype, found, options.variants)
        page += f"\n## {dtype}\n\n{text}\n"
        print(f"{dtype} is {'within' if within else 'NOT within'} its bounds")
        holds &= within
    options.out.write_text(page)
    print(f"wrote {options.out}")
    return int(not holds)


def hardware() -> str:
    """What the layouts run on."""
    import torch
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator().device_name()
    where = "CPU, gloo" if name == "cpu" else f"{torch.cuda.get_device_name()}, NCCL"
    return f"{where}; torch {torch.__version__}"


PAGE_BEGIN = """# Every layout gives the same numbers

Made by tests/faults/invariance.py on {hardware}.

The model: benchmarks/layouts.json (4 layers, 8 experts in every 2nd, X-MoE router, balance loss
0.01, no dropout, SparseClip active on every step), {steps} steps on the text of `make train`. Each
cell: the largest difference of a loss (nats) and of a gradient norm (relative) from the first row
of its column, over all steps; **bold**: beyond the bound, which is in the last row.

Capacity and balance statistics are those of one accumulation step over all ranks, so a column
compares runs of the same number of accumulation steps; with dispatch `dropless` and
`moe.balance_scope` "batch" their number has no influence either (tests/engine/test_invariance.py).

Rows "rounding" are one rank again, rounded otherwise: each master weight is moved at the start by
at most one unit in its last place. In bf16 each gradient is moved, too, in each step, with the
probability of 1/6 by one unit of bf16 (the variance of the difference of two roundings), for a
layout adds up in another order in each step. What rounding alone does is the bound in bf16: the
largest difference of any two of the ten runs of one rank.

In fp32 the bound is 5e-5 nats and 2e-4 of the norm. Rounding can decide which expert a token goes
to where two are equally good, and then the curves part, those of one rank as well: beside a
difference beyond the bound stands, in brackets, that from the nearest run of another rounding.
"""

if __name__ == "__main__":
    sys.exit(main())
