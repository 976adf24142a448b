"""The resume matrix: saved by each of five layouts, continued by each of the five.

    python -m tests.faults.resume --out docs/resume.md

Each layout trains 20 steps and saves. From each of these checkpoints each layout goes on for 20
steps, through the `deepspeed` launcher and `magnetar train`, on the text of `make train`. The
losses of those steps are compared with those of an uninterrupted run of one rank.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.measurement import LAYOUTS as LAYOUTS_JSON
from benchmarks.measurement import argument_parser
from tests.faults.supervised import train as train_run

SAVED_AFTER, LAST = 20, 40
BOUND = 5e-5  # nats


class Layout(NamedTuple):
    """How many ranks, how many of them share a set of experts, the ZeRO stage."""

    world_size: int
    ep_size: int
    stage: int

    def __str__(self) -> str:
        return f"world {self.world_size}, ep {self.ep_size}, ZeRO {self.stage}"


LAYOUTS = (
    Layout(1, 1, 0),
    Layout(2, 1, 3),
    Layout(2, 2, 1),
    Layout(4, 2, 2),
    Layout(4, 4, 0),
)


def train(
    layout: Layout,
    run_dir: Path,
    num_steps: int,
    settings: list[str],
    seconds: float | None = None,
) -> list[float]:
    """Train a run to a step in a layout; the losses of all of its steps so far."""
    keys = {
        "zero_optimization.stage": layout.stage,
        "magnetar.model.moe.ep_size": layout.ep_size,
        "magnetar.training.num_steps": num_steps,
    }
    pairs = [*(f"{key}={value}" for key, value in keys.items()), *settings]
    train_run(run_dir, pairs, layout.world_size, LAYOUTS_JSON, seconds)
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def differences(folder: Path, settings: list[str]) -> dict[Layout, dict[Layout, float]]:
    """Saved by, continued by -> largest difference of a loss from the uninterrupted run's."""
    whole = train(LAYOUTS[0], folder / "whole", LAST, settings)[SAVED_AFTER:]
    found: dict[Layout, dict[Layout, float]] = {}
    for saver in LAYOUTS:
        saved = folder / "saved"
        train(saver, saved, SAVED_AFTER, settings)
        found[saver] = {}
        for reader in LAYOUTS:
            run_dir = folder / "continued"
            shutil.copytree(saved, run_dir)
            losses = train(reader, run_dir, LAST, settings)[SAVED_AFTER:]
            shutil.rmtree(run_dir)
            found[saver][reader] = max(abs(a - b) for a, b in zip(losses, whole, strict=True))
            print(f"{saver} -> {reader}: {found[saver][reader]:.1e}", flush=True)
        shutil.rmtree(saved)
    return found


def table(found: dict[Layout, dict[Layout, float]]) -> str:
    """The matrix in Markdown."""
    lines = [
        "| saved by \\ continued by | " + " | ".join(map(str, LAYOUTS)) + " |",
        "|---" * (len(LAYOUTS) + 1) + "|",
    ]
    for saver, row in found.items():
        lines.append(f"| {saver} | " + " | ".join(f"{row[r]:.1e}" for r in LAYOUTS) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the matrix; status 1 if a difference exceeds the bound."""
    parser = argument_parser("tests.faults.resume", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="the page, a .md file")
    parser.add_argument("--set", action="append", default=[], help="as for magnetar train")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = differences(Path(folder), options.set)
    text = table(found)
    options.out.write_text(PAGE_BEGIN + text)
    worst = max(max(row.values()) for row in found.values())
    print(f"\n{text}\nlargest difference {worst:.1e} nats, bound {BOUND:.0e}")
    return int(worst > BOUND)


PAGE_BEGIN = """# Every layout continues every layout's checkpoint

Made by `make invariance`: each layout trained benchmarks/layouts.json for 20 steps and saved; from
each of these checkpoints each layout went on for 20 steps, through the launcher and
`magnetar train`. Each cell: the largest difference of those 20 losses (nats) from an uninterrupted
run of one rank. Bound: 5e-5. tests/engine/checkpoint/test_resume.py has two of the pairs,
saved by world 2, ep 2, ZeRO 1.

"""

if __name__ == "__main__":
    sys.exit(main())
