"""Random kills of a run under supervision, which must end like an undisturbed one.

    python -m tests.faults.kills --kills 50 --out benchmarks/results/kills.json

tests/faults/supervised.json (2 ranks, 300 steps, a checkpoint every 5) trains once undisturbed.
Then it trains under `magnetar supervise`, run after run, until a random rank has been killed by
SIGKILL so often: at a random moment after a start, or while one of its first checkpoints is
written. Every run must finish without a hand, with the metrics of the undisturbed one and with the
bits of its weights and moments. Text: the speeches of `make train`.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.measurement import argument_parser, git_commit, versions, write_json
from tests.faults.supervised import Supervised, being_saved, difference, kill, records, train

# Where a start takes as long as the longest moment, ten kills in a row can all meet one.
PATIENT = ("--num_gpus", "2", "--max-restarts", "50", "--max-backoff", "1")
_POLL = 0.002


def kill_once(run: Supervised, draw: random.Random, most_seconds: float) -> dict[str, Any] | None:
    """Wait for the next start, and for a moment of it, and kill a rank; None if the run ended."""
    launcher = next_start(run)
    if launcher is None:
        return None
    begun, since, num_starts = time.monotonic(), time.time(), starts_of_training(run)
    aimed_at = "save" if draw.random() < 0.3 else "moment"
    moment = begun + draw.uniform(0, most_seconds)
    later, which, num_saves = draw.uniform(0, 0.03), draw.random(), draw.randint(1, 4)
    saves: set[str] = set()
    while run.launcher() == launcher:
        is_now = time.monotonic() >= moment
        if aimed_at == "save":
            saves |= being_saved(run.run_dir, since)
            is_now = len(saves) >= num_saves
            time.sleep(later if is_now else 0)
        ranks = run.ranks() if is_now else {}
        if ranks:
            rank = sorted(ranks)[int(which * len(ranks))]
            saving, step = being_saved(run.run_dir, since), run.last_step()
            has_begun = starts_of_training(run) > num_starts
            if not kill(ranks[rank]):
                continue
            found = {
                "rank": rank,
                "aimed_at": aimed_at,
                "seconds_after_start": round(time.monotonic() - begun, 2),
                "phase": "save" if saving else "training" if has_begun else "start",
                "step": step,
            }
            killed = time.monotonic()
            while run.launcher() == launcher:
                time.sleep(_POLL)
            return found | {"seconds_to_notice": round(time.monotonic() - killed, 2)}
        time.sleep(_POLL)
    return kill_once(run, draw, most_seconds)  # it ended before its moment


def starts_of_training(run: Supervised) -> int:
    """How often a start has come as far as its first step."""
    file = run.run_dir / "logbook.md"
    book = file.read_text() if file.is_file() else ""
    return book.count("**start**") + book.count("**resume**")


def next_start(run: Supervised) -> int | None:
    """The launcher, as soon as there is one; None if the run ended."""
    while run.process.poll() is None:
        if (launcher := run.launcher()) is not None:
            return launcher
        time.sleep(_POLL)
    return None


def kill_all(folder: Path, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """The kills, and how each run differs from the undisturbed one: "" where it does not."""
    draw, kills, differences = random.Random(options.seed), [], []
    settings = [f"magnetar.training.num_steps={options.steps}", *options.set]
    whole = folder / "whole"
    begun = time.monotonic()
    train(whole, settings)
    print(f"undisturbed: {time.monotonic() - begun:.0f} s, {len(records(whole))} records")
    while len(kills) < options.kills:
        run_dir = folder / f"run_{len(differences)}"
        with Supervised(run_dir, settings, PATIENT) as run:
            while len(kills) < options.kills:
                found = kill_once(run, draw, options.seconds)
                if found is None:
                    break
                kills.append({"run": len(differences), **found})
                print(f"kill {len(kills):>3}: {json.dumps(kills[-1])}", flush=True)
            status = run.end()
            if status != 0:
                raise SystemExit(f"run {len(differences)} ended with {status}:\n{run.output}")
        differences.append(difference(run_dir, whole))
        print(f"run {len(differences) - 1} finished: {differences[-1] or 'equal'}", flush=True)
        if differences[-1] == "":
            shutil.rmtree(run_dir)
    return kills, differences


def table(kills: list[dict[str, Any]]) -> str:
    """Kills by what the run was doing, in Markdown."""
    lines = ["| killed while | rank 0 | rank 1 |", "|---|---|---|"]
    count = Counter((found["phase"], found["rank"]) for found in kills)
    for phase in ("start", "training", "save"):
        lines.append(f"| {phase} | {count[phase, 0]} | {count[phase, 1]} |")
    return "\n".join(lines)


def main() -> int:
    """Kill; status 1 if any run differs from the undisturbed one."""
    parser = argument_parser("tests.faults.kills", __doc__)
    parser.add_argument("--kills", type=int, default=50, help="how many (50)")
    parser.add_argument("--steps", type=int, default=300, help="of each run (300)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a start, at most (20)")
    parser.add_argument("--seed", type=int, default=1, help="of moments and ranks")
    parser.add_argument("--out", type=Path, required=True, help="a .json file")
    parser.add_argument("--set", action="append", default=[], help="as for magnetar train")
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        kills, differences = kill_all(Path(folder), options)
    seconds = round(time.monotonic() - begun)
    result = {
        "command": " ".join(["python -m tests.faults.kills", *sys.argv[1:]]),
        "commit": git_commit(),
        "versions": versions(),
        "kills": len(kills),
        "runs": len(differences),
        "runs_equal_to_the_undisturbed": differences.count(""),
        "seconds": seconds,
        "all": kills,
    }
    write_json(options.out, result)
    print(f"\n{table(kills)}\n")
    print(f"{len(kills)} kills in {len(differences)} runs, {seconds} s")
    print(f"{differences.count('')} of {len(differences)} runs equal the undisturbed one")
    return int(any(differences))


if __name__ == "__main__":
    sys.exit(main())
