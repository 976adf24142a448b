"""How long a run is away when a rank dies: from SIGKILL to the first new step, part by part.

    python -m tests.faults.restart --out benchmarks/results/restart_cpu.json

The quickstart (2 ranks, benchmarks as `make train` has them, but a checkpoint every 20 steps and a
record of every step) trains under `magnetar supervise`; rank 1 is killed so often. The parts of a
start are those of the logbook's `going` lines.
"""

import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measurement import argument_parser, git_commit, versions, write_json
from magnetar.engine.cluster.start_times import parsed_times
from tests.faults.fault_lab import Fault, book, goes_on
from tests.faults.supervised import ROOT, Supervised, kill

CONFIG = ROOT / "ds_configs" / "quickstart.json"
BOUND = 40.0
BACKOFF = 0.2  # of tests.faults.supervised; a user's is 5 seconds, unless --backoff says otherwise
_GOING = re.compile(r"\*\*going\*\* first step after (.*)")


def restart(run: Supervised) -> dict[str, float]:
    """Kill a rank; the seconds of each part of coming back, in their order."""
    launcher, fault, num_starts = run.launcher(), Fault.now(run), len(_GOING.findall(book(run)))
    kill(run.ranks()[1])
    run.wait_for(lambda: run.launcher() != launcher)
    noticed = time.monotonic() - fault.when
    outcome = goes_on(run, fault)
    parts = run.wait_for(lambda: _GOING.findall(book(run))[num_starts:])
    found = {"notice, and end what is left": noticed, "back-off": BACKOFF}
    found |= parsed_times(parts[-1])
    rest = outcome.seconds - sum(found.values())
    return {**found, "rest": max(0.0, rest), "all": outcome.seconds}


def main() -> int:
    """Kill and measure; status 1 if a restart takes longer than the bound."""
    parser = argument_parser("tests.faults.restart", __doc__)
    parser.add_argument("--kills", type=int, default=3, help="how many (3)")
    parser.add_argument("--out", type=Path, help="a .json file")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        settings = ["magnetar.training.save_every=20", "magnetar.training.log_every=1"]
        with Supervised(Path(folder, "run"), settings, config=CONFIG) as run:
            for number in range(options.kills):
                run.wait_for_step(run.last_step() + 30)
                found.append(restart(run))
                print(f"kill {number + 1}: {found[-1]['all']:.1f} s", flush=True)
    names = list(found[0])
    middle = {name: round(statistics.median(f.get(name, 0.0) for f in found), 1) for name in names}
    print(f"\n| part | seconds (median of {len(found)}) |\n|---|---|")
    for name, seconds in middle.items():
        print(f"| {name} | {seconds} |")
    if options.out is not None:
        result = {
            "command": " ".join(["python -m tests.faults.restart", *sys.argv[1:]]),
            "commit": git_commit(),
            "cpus": os.cpu_count(),
            "versions": versions(),
            "median_seconds": middle,
            "all": found,
        }
        write_json(options.out, result)
    worst = max(f["all"] for f in found)
    print(f"slowest {worst:.1f} s, bound {BOUND:g} s")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
