"""A launcher that does what none may, for tests/faults/test_fuzz.py."""

import sys
import tempfile
import time
from pathlib import Path

# What it does, and what tests.faults.fuzz says of it.
EXPECTED = {
    "traceback": "traceback",
    "hang": "hang",
    "overwrite": "overwrote inputs/text",
    "own": "overwrote case/data",
    "message": "message",
    "silent": "status 2 without a message",
    "status": "status 3",
    "nothing": "done",
}


def main() -> int:
    """Do what the argument says."""
    (what,) = sys.argv[1:]
    if what == "traceback":
        raise ValueError("no message")
    if what == "hang":
        time.sleep(60)
    if what == "overwrite":
        Path("../inputs/text").write_text("other")
    if what == "own":
        Path("data").write_text("other")
    if what == "message":
        print("error: data is damaged", file=sys.stderr)
        return 2
    return {"silent": 2, "status": 3}.get(what, 0)


def verdicts() -> dict[str, str]:
    """What tests.faults.fuzz says of each."""
    from tests.faults.fuzz import outcome
    from tests.faults.fuzz_cases import Case

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        (world / "inputs").mkdir()
        for what in EXPECTED:
            (world / "inputs/text").write_text("text")
            case = Case(what, __name__, [what], {"data": b"data"})
            found[what] = outcome(case, world, limit=1.0).verdict
    return found
