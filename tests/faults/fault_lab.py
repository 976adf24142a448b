"""Runs to do harm to, and how to tell whether they end as documented; see tests.faults.faults."""

import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.faults.faulty_train import VARIABLE
from tests.faults.supervised import Supervised, difference, records, train

NUM_STEPS, SAVE_EVERY, HALF = 40, 5, 20
HANG_TIMEOUT = 12.0
LAYOUT_BOUND = 5e-4  # nats: sums in another order, and a router that chooses otherwise for it
RESUMED = re.compile(r"resuming after step (\d+)")


class Outcome(NamedTuple):
    """How a run ended or went on, seconds from the fault until then, and steps trained again."""

    end: str
    seconds: float
    lost: int | None = None


class SkipError(Exception):
    """The reason why a case is impossible on this machine."""


@dataclass
class Lab:
    """A folder of runs, the settings of each, an undisturbed run, and that run after HALF steps."""

    folder: Path
    settings: list[str] = field(default_factory=list)
    whole: Path = Path()
    half: Path = Path()

    def prepare(self) -> None:
        """Train the two runs."""
        keys = {
            "model.dropout": 0.0,  # which draws otherwise in another layout
            "training.num_steps": NUM_STEPS,
            "training.save_every": SAVE_EVERY,
            "training.keep_checkpoints": 3,
            "training.eval_every": "null",
            "training.lr_schedule.total_steps": 100,
            "guards.hang_timeout_seconds": HANG_TIMEOUT,
            "guards.max_bad_steps": 3,
        }
        self.settings = [f"magnetar.{key}={value}" for key, value in keys.items()]
        self.whole, self.half = self.folder / "whole", self.folder / "half"
        train(self.half, [*self.settings, f"magnetar.training.num_steps={HALF}"])
        shutil.copytree(self.half, self.whole)
        train(self.whole, self.settings)
        # The evaluation at the end of the shorter run is none of the longer one's.
        for path in (self.half, self.whole):
            keep_steps(path)

    def run(
        self,
        name: str,
        *settings: str,
        fault: str = "",
        arguments: Sequence[str] = ("--num_gpus", "2"),
        prefix: Sequence[str] = (),
        run_dir: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Supervised:
        """A run under supervision, with a fault put in."""
        return Supervised(
            run_dir or self.folder / name,
            [*self.settings, *settings],
            arguments,
            prefix,
            module="tests.faults.faulty_train" if fault else "magnetar.launchers.supervise",
            environment={VARIABLE: fault, **(environment or {})},
        )


def keep_steps(run_dir: Path) -> None:
    """Leave only what was measured in training in metrics.jsonl."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if '"loss"' in line))


def resumed_after(run: Supervised) -> int | None:
    """The step after which a run was resumed last; None if it was not."""
    found = RESUMED.findall(run.output)
    return int(found[-1]) if found else None


def steps(run_dir: Path) -> list[dict]:
    """Records of training."""
    return [record for record in records(run_dir) if "loss" in record]


def book(run: Supervised) -> str:
    """The run's logbook."""
    file = run.run_dir / "logbook.md"
    return file.read_text() if file.is_file() else ""


def finishes_as_undisturbed(run: Supervised, lab: Lab) -> None:
    """Wait for the end, and compare."""
    status = run.end()
    assert status == 0, f"status {status}:\n{run.output}"
    keep_steps(run.run_dir)
    differs = difference(run.run_dir, lab.whole)
    assert not differs, f"differs in {differs}:\n{run.output}"


def finishes_alike(run: Supervised, lab: Lab) -> None:
    """Wait for the end of a run whose layout has changed, and compare losses."""
    status = run.end()
    assert status == 0, f"status {status}:\n{run.output}"
    ours, theirs = steps(run.run_dir), steps(lab.whole)
    assert len(ours) == len(theirs)
    largest = max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True))
    assert largest < LAYOUT_BOUND, f"a loss differs by {largest}"


def ends_with(run: Supervised, status: int, words: str, since: float) -> Outcome:
    """Check that a run has ended with a message for a person."""
    found = run.end()
    seconds = time.monotonic() - since
    assert found == status, f"status {found} in place of {status}:\n{run.output}"
    assert words in run.output, f"{words!r} is missing:\n{run.output}"
    assert "Traceback" not in run.output, run.output
    return Outcome(f"status {status}", seconds)


class Fault(NamedTuple):
    """A moment of a run: time.monotonic, its last step, how often it had been resumed."""

    when: float
    step: int
    resumed: int

    @classmethod
    def now(cls, run: Supervised) -> "Fault":
        """The current moment of a run."""
        return cls(time.monotonic(), run.last_step(), len(RESUMED.findall(run.output)))


def goes_on(run: Supervised, fault: Fault) -> Outcome:
    """The first new step after a restart."""
    run.wait_for(lambda: len(RESUMED.findall(run.output)) > fault.resumed, 150)
    first = int(RESUMED.findall(run.output)[-1])
    run.wait_for(lambda: run.last_step() > first, 60)
    # Without their launcher ranks can come a little further before they are ended.
    return Outcome("recovered", time.monotonic() - fault.when, max(0, fault.step - first))
