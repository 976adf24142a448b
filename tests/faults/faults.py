"""Faults done to runs under supervision, and how each ends: a page and its numbers.

    python -m tests.faults.faults --out docs/faults.md [--only SIGSTOP]

Every fault is really done: to processes, files, disks, a cable between two hosts (network
namespaces), or put into the numbers by a program around launchers.train. A run that goes on is
compared with an undisturbed one, to the last bit of its metrics and weights; where it goes
on in another layout, its losses are, to 5e-4. Text: the speeches of `make train`. Some need root,
and are left out without.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.faults import fault_cases as cases
from tests.faults.fault_lab import HANG_TIMEOUT, NUM_STEPS, SAVE_EVERY, Lab, Outcome, SkipError


class Case(NamedTuple):
    """A fault.

    Attributes:
        fault: the fault in words.
        documented: the documented consequence.
        within: time limit of the consequence in seconds.
        case: function that does it.
    """

    fault: str
    documented: str
    within: float
    case: Callable[[Lab], Outcome]


RESTART = "it starts again from the newest checkpoint"
OLDER = "the file is named, and the checkpoint before is taken"
HANG = f"{HANG_TIMEOUT:g} s later (`guards.hang_timeout_seconds`) the rank is named; {RESTART}"
NOT_READ = "the file is named, status 2; there is nothing to restart before it is mended"

CASES = (
    Case("rank 0 is killed (SIGKILL)", RESTART, 60, partial(cases.kill_rank, rank=0)),
    Case("rank 1 is killed (SIGKILL)", RESTART, 60, partial(cases.kill_rank, rank=1)),
    Case("rank 0 is stopped (SIGSTOP)", HANG, 150, partial(cases.stop_rank, rank=0)),
    Case("rank 1 is stopped (SIGSTOP)", HANG, 150, partial(cases.stop_rank, rank=1)),
    Case(
        "`deepspeed` is killed",
        f"the ranks that are left are killed; {RESTART}",
        60,
        partial(cases.kill_launcher, of_node=False),
    ),
    Case(
        "`deepspeed.launcher.launch` is killed",
        f"the ranks that are left are killed; {RESTART}",
        60,
        partial(cases.kill_launcher, of_node=True),
    ),
    Case(
        "the supervisor is killed",
        "the ranks end when rank 0 cannot print its next line, after 10 s at most or a step; the "
        "same command goes on then, and says before that the folder is in use",
        60,
        cases.kill_supervisor,
    ),
    Case(
        "the supervisor gets SIGTERM",
        "a checkpoint after the step, status 0; the same command goes on",
        60,
        cases.ask_to_stop,
    ),
    Case(
        "a checkpoint's file is cut in half",
        OLDER,
        60,
        lambda lab: cases.damage(lab, "truncated", cases.truncate),
    ),
    Case(
        "a bit of a checkpoint flips",
        OLDER,
        60,
        lambda lab: cases.damage(lab, "flipped", cases.flip_bit),
    ),
    Case(
        "a checkpoint's manifest is gone",
        OLDER,
        60,
        lambda lab: cases.damage(lab, "no_manifest", cases.lose_manifest),
    ),
    Case(
        "one of a checkpoint's two files is gone",
        OLDER,
        60,
        lambda lab: cases.damage(lab, "no_file", cases.lose_half),
    ),
    Case(
        "the disk is full when it saves",
        "status 2, and what to do; older checkpoints are as they were, and the same command goes "
        "on from them once there is space",
        60,
        partial(cases.fill_disk, of_checkpoints=True),
    ),
    Case(
        "the disk is full when it writes metrics.jsonl",
        "status 2, and what to do; a line that was cut off is ignored",
        60,
        partial(cases.fill_disk, of_checkpoints=False),
    ),
    Case(
        "the folder of checkpoints becomes read-only",
        "status 2, and what to do; the same command goes on when it can be written again",
        60,
        cases.forbid_writing,
    ),
    Case(
        "the network is down for 10 s",
        "TCP waits, and so does the run",
        60,
        lambda lab: cases.on_two_hosts(lab, "cable", cases.unplug_for_10_s),
    ),
    Case(
        "the network is down for good",
        f"the hang is found after {HANG_TIMEOUT:g} s; the host that does not answer ssh is left "
        "out, and the run goes on without",
        150,
        lambda lab: cases.on_two_hosts(lab, "no_cable", cases.unplug_for_good),
    ),
    Case(
        "a host is switched off",
        "as if the network were down for good",
        150,
        lambda lab: cases.on_two_hosts(lab, "off", cases.switch_off),
    ),
    Case(
        "the hostfile has a slot less, and that rank is killed",
        "the same batch on the ranks that are left",
        60,
        cases.shrink_hostfile,
    ),
    Case(
        "a gradient is NaN in one step",
        "the step is left out on all ranks",
        60,
        lambda lab: cases.put_in(lab, "nan", "nan:13", "skip"),
    ),
    Case(
        "gradients are NaN in three steps in a row",
        "with `guards.max_bad_steps` 3 it goes back to the newest checkpoint, and leaves out the "
        "batches between",
        60,
        lambda lab: cases.put_in(lab, "nans", "nan:13:3", "rollback"),
    ),
    Case(
        "the loss is infinite in one step",
        "the step is left out on all ranks",
        60,
        lambda lab: cases.put_in(lab, "infinite", "infinite:13", "skip"),
    ),
    Case(
        "the loss is ten times as large in one step",
        "with `guards.spike_deviations` 6 the step is left out on all ranks",
        60,
        lambda lab: cases.put_in(
            lab,
            "spike",
            "spike:30",
            "skip",
            "magnetar.guards.spike_deviations=6",
            "magnetar.guards.spike_window=10",
        ),
    ),
    Case(
        "a bit of one rank's weights flips",
        "with `guards.replica_check_every` 5 the run ends with status 3, naming tensor and rank; "
        + RESTART,
        60,
        cases.flip_weight,
    ),
    Case("the clock jumps back by an hour", "nothing", 60, cases.set_clock_back),
    Case(
        "bytes of the tokens flip, beyond the vocabulary",
        NOT_READ,
        60,
        lambda lab: cases.spoil_data(lab, "bytes", cases.flip_bytes, "error: "),
    ),
    Case(
        "the file of tokens is cut in half",
        NOT_READ,
        60,
        lambda lab: cases.spoil_data(lab, "cut", cases.cut_off, "error: "),
    ),
    Case(
        "the file of tokens is removed, and later a rank killed",
        f"the run goes on with the open file; the restart says what is missing: {NOT_READ}",
        60,
        cases.lose_data,
    ),
    Case(
        "the JSON is edited to nonsense, and a rank killed",
        "the restart names line and column, status 2",
        60,
        cases.edit_to_nonsense,
    ),
    Case(
        "the JSON is edited sensibly, and a rank killed",
        "the restart goes on with it, and the logbook lists the keys that changed",
        60,
        cases.edit_sensibly,
    ),
)

PAGE = f"""# What happens when something goes wrong

Made by `python -m tests.faults.faults --out docs/faults.md`: two ranks on two CPU cores train
tests/faults/supervised.json for {NUM_STEPS} steps under `magnetar supervise`, with a checkpoint
every {SAVE_EVERY} steps, and one thing goes wrong. A run that goes on ends with the metrics of
an undisturbed run and the bits of its weights and Adam's moments (the one whose supervisor is
killed: with its metrics); on fewer ranks, with its losses to 5e-4. Not compared are runs that
leave out batches, the one with a flipped weight (ZeRO 0), and the one with another JSON.
"Seconds" are from the fault to the first new step or to the end of the command, with the bound
that the command holds them to; most of them are the start of two ranks on two cores. "Steps
again" are those between the newest checkpoint and the fault.

| what goes wrong | what happens | ends | seconds (at most) | steps again |
|---|---|---|---|---|
"""


def row(case: Case, outcome: Outcome) -> str:
    """A line of the table."""
    lost = "" if outcome.lost is None else str(outcome.lost)
    seconds = f"{outcome.seconds:.0f} ({case.within:g})"
    return f"| {case.fault} | {case.documented} | {outcome.end} | {seconds} | {lost} |"


def done(case: Case, lab: Lab) -> tuple[str, bool]:
    """The line of one case, and whether it ended as documented."""
    try:
        outcome = case.case(lab)
    except SkipError as reason:
        return f"| {case.fault} | {case.documented} | left out: {reason} | | |", True
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return f"| {case.fault} | {case.documented} | **NOT SO** | | |", False
    lost = outcome.lost or 0
    is_so = outcome.seconds <= case.within and lost <= 2 * SAVE_EVERY
    return row(case, outcome) + ("" if is_so else " **too much**"), is_so


def merged(page: str, lines: list[str]) -> list[str]:
    """The new lines, and those of a page about other faults, in the order of CASES."""
    of_fault = {line.split(" | ")[0]: line for line in [*page.splitlines(), *lines]}
    return [of_fault[key] for case in CASES if (key := f"| {case.fault}") in of_fault]


def main() -> int:
    """Do them all; status 1 if one did not end as documented."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--out", type=Path, help="the page, a .md file; with --only, its other lines stay"
    )
    parser.add_argument("--only", action="append", help="faults with these words; may be repeated")
    options = parser.parse_args()
    words = options.only or [""]
    if unknown := [word for word in words if not any(word in case.fault for case in CASES)]:
        parser.error(f"--only {unknown[0]}: no fault has these words, see docs/faults.md")
    chosen = [case for case in CASES if any(word in case.fault for word in words)]
    failed = 0
    if options.out is not None and not options.only:
        options.out.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        lab.prepare()
        for case in chosen:
            begun = time.monotonic()
            line, is_so = done(case, lab)
            failed += not is_so
            print(f"{line}  [{time.monotonic() - begun:.0f} s in all]", flush=True)
            if options.out is not None:
                page = options.out.read_text() if options.out.is_file() else ""
                options.out.write_text(PAGE + "\n".join(merged(page, [line])) + "\n")
    print(f"{len(chosen) - failed} of {len(chosen)} ended as documented")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
