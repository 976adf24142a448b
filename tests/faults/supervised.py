"""A run under supervision, to do harm to: its processes, its steps, its checkpoints."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measurement import launch
from magnetar.engine.checkpoint.format import newest_checkpoint
from magnetar.engine.supervise.launched_run import RUN_ID, RunProcess, kill_processes, run_processes

CONFIG = Path(__file__).with_name("supervised.json")
ROOT = CONFIG.parents[2]
TIMED = {"tokens_per_second", "memory_gib", "mfu"}  # what depends on the clock or the machine


class Supervised:
    """A running `magnetar supervise`; as a context manager it leaves nothing behind."""

    def __init__(
        self,
        run_dir: Path,
        settings: Sequence[str] = (),
        arguments: Sequence[str] = ("--num_gpus", "2"),
        prefix: Sequence[str] = (),
        config: Path = CONFIG,
        module: str = "magnetar.launchers.supervise",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it, with words before the command and `module` in place of the launcher."""
        self.run_dir = run_dir
        self.lines: list[str] = []
        texts = [f"magnetar.training.run_dir={run_dir}", *settings]
        own = {text.partition("=")[0]: text for text in texts}
        self.process = subprocess.Popen(
            [
                *prefix,
                *(sys.executable, "-m", module, "-q", "--backoff", "0.2"),
                *arguments,
                *("--deepspeed_config", str(config)),
                *(word for text in own.values() for word in ("--set", text)),
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._run_id = ""

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def __enter__(self) -> "Supervised":
        return self

    def __exit__(self, *_: object) -> None:
        run_id = self._run_id or self._found_id()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if run_id:
            kill_processes(run_id)

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return "\n".join(self.lines)

    def launcher(self) -> int | None:
        """The process id of the launcher at work; None between two."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            children = path.read_text().split()
        except OSError:
            return None
        return int(children[0]) if children else None

    def _found_id(self) -> str:
        try:
            return psutil.Process(self.launcher() or 0).environ().get(RUN_ID, "")
        except (psutil.Error, OSError):
            return ""

    def processes(self) -> list[RunProcess]:
        """All of its processes on this machine, but the supervisor."""
        self._run_id = self._run_id or self._found_id()
        return run_processes(self._run_id) if self._run_id else []

    def ranks(self) -> dict[int, int]:
        """Rank -> process id."""
        return {p.rank: p.pid for p in self.processes() if p.rank is not None}

    def last_step(self) -> int:
        """The last step in metrics.jsonl; 0 before there is one."""
        return max((int(r["step"]) for r in records(self.run_dir)), default=0)

    def wait_for(self, condition: Callable[[], Any], seconds: float = 120.0) -> Any:
        """What a condition gives as soon as it is true."""
        until = time.monotonic() + seconds
        while not (found := condition()):
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}:\n{self.output}")
            if time.monotonic() > until:
                raise AssertionError(f"it did not come about in {seconds} s:\n{self.output}")
            time.sleep(0.02)
        return found

    def wait_for_step(self, step: int, seconds: float = 120.0) -> None:
        """Return when a step is in metrics.jsonl."""
        self.wait_for(lambda: self.last_step() >= step, seconds)

    def end(self, seconds: float = 300.0) -> int:
        """Its status, when it has ended by itself."""
        status = self.process.wait(seconds)
        self._reader.join()
        return status


def train(
    run_dir: Path,
    settings: Sequence[str],
    ranks: int = 2,
    config: Path = CONFIG,
    seconds: float | None = None,
) -> None:
    """Train a run to its end, by the launcher; a later setting of a key replaces an earlier one.

    Raises:
        SystemExit: if it ends otherwise, with its output.
    """
    texts = [f"magnetar.training.run_dir={run_dir}", *settings]
    own = {text.partition("=")[0]: text for text in texts}
    words = [word for text in own.values() for word in ("--set", text)]
    arguments = ["--deepspeed_config", config, *words]
    done = launch("magnetar.launchers.train", ranks, arguments, True, seconds)
    if done.returncode != 0:
        raise SystemExit(f"{run_dir.name} ended with {done.returncode}:\n{done.stdout}")


def records(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock; a line that is being written is left out."""
    try:
        text = (run_dir / "metrics.jsonl").read_text()
    except OSError:
        return []
    lines = text[: text.rfind("\n") + 1].splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [{name: v for name, v in record.items() if name not in TIMED} for record in found]


def weight_hashes(run_dir: Path) -> dict[str, str]:
    """sha256 of each file of the run's last checkpoint: weights and Adam's moments."""
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None
    return {name: about["sha256"] for name, about in checkpoint.manifest["files"].items()}


def difference(run_dir: Path, whole: Path) -> str:
    """How a run differs from an undisturbed one; "" if in no metric and no bit of its weights."""
    ours, theirs = records(run_dir), records(whole)
    if len(ours) != len(theirs):
        return f"{len(ours)} records in place of {len(theirs)}"
    for a, b in zip(ours, theirs, strict=True):
        if a != b:
            names = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
            return f"step {b['step']}: {', '.join(names)}"
    return "" if weight_hashes(run_dir) == weight_hashes(whole) else "the last weights' bits"


def being_saved(run_dir: Path, since: float) -> set[str]:
    """Checkpoints that are being written and were begun after a time, by name."""
    try:
        partial = [*(run_dir / "checkpoints").glob("partial_*")]
        return {path.name for path in partial if path.stat().st_mtime > since}
    except OSError:  # it has just been renamed
        return set()


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal; False if the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
