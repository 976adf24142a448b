"""Faults done to runs under supervision, and how each ends: a page and its numbers.

    python -m tests.faults.faults --out docs/faults.md [--only SIGSTOP]

Every fault is really done: to processes, files, disks, a cable between two hosts (network
namespaces), or put into the numbers by a program around launchers.train. A run that goes on is
compared with an undisturbed one, to the last bit of its metrics and weights; where it goes
on in another layout, its losses are, to 5e-4. Text: the speeches of `make train`. Some need root,
and are left out without.
"""

import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measurement import argument_parser
from tests.faults.fault_cases import CASES, Case
from tests.faults.fault_lab import NUM_STEPS, SAVE_EVERY, Lab, SkipError

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


def done(case: Case, lab: Lab) -> tuple[str, bool]:
    """A case's line of the table, and whether it ended as documented."""
    line = f"| {case.fault} | {case.documented} | "
    try:
        outcome = case.case(lab)
    except SkipError as reason:
        return f"{line}left out: {reason} | | |", True
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return f"{line}**NOT SO** | | |", False
    lost = "" if outcome.lost is None else outcome.lost
    is_so = outcome.seconds <= case.within and (outcome.lost or 0) <= 2 * SAVE_EVERY
    line += f"{outcome.end} | {outcome.seconds:.0f} ({case.within:g}) | {lost} |"
    return line + " **too much**" * (not is_so), is_so


def merged(page: str, lines: list[str]) -> list[str]:
    """The new lines, and those of a page about other faults, in the order of CASES."""
    of_fault = {line.split(" | ")[0]: line for line in [*page.splitlines(), *lines]}
    return [of_fault[key] for case in CASES if (key := f"| {case.fault}") in of_fault]


def main() -> int:
    """Do them all; status 1 if one did not end as documented."""
    parser = argument_parser("tests.faults.faults", __doc__)
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
