"""A supervised run goes on after every crash that a restart can mend, and after no other."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from magnetar.engine.supervise.launched_run import (
    Death,
    Launched,
    ending,
    kill_processes,
    run_processes,
)
from magnetar.engine.supervise.supervisor import Options, Supervisor
from tests.engine.programs import with_keys
from tests.ranks import ROOT
from tests.runs import TINY, environment, launch, make_corpus, records, write_config

# In place of the launcher: it does at its n-th start what the n-th word of the plan says.
LAUNCHER = """
import os, signal, subprocess, sys, time
plan, folder = sys.argv[1].split(","), sys.argv[2]
starts = os.path.join(folder, "starts")
count = os.path.getsize(starts) if os.path.exists(starts) else 0
open(starts, "a").write(".")
kind, _, value = plan[min(count, len(plan) - 1)].partition(":")
if kind != "elsewhere":
    open(os.path.join(folder, "logbook.md"), "a").write("- **start**\\n")
if kind == "late":
    time.sleep(60)
RANK = '''
import os, signal, sys, time
kind, value, folder = sys.argv[1:]
rank = os.environ["RANK"]
time.sleep(0.5)
if kind == "save" and rank == "0":
    os.makedirs(os.path.join(folder, "checkpoints", f"step_{int(value):08d}"))
    os.kill(os.getpid(), 9)
if kind == "kill" and rank == value:
    os.kill(os.getpid(), 9)
if kind == "status" and rank == "0":
    print("error: what is wrong", file=sys.stderr, flush=True)
    os._exit(int(value))
if kind in ("save", "kill", "status", "abandon", "stop"):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if kind == "stop" and rank == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)
if kind == "listen" and rank == "0":
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(0))
if kind == "listen":
    time.sleep(3)
if kind == "size":
    print("columns", os.get_terminal_size(1).columns)
'''
ranks = [
    subprocess.Popen(
        [sys.executable, "-c", RANK, kind, value, folder],
        env=os.environ | {"RANK": str(rank), "LOCAL_SIZE": "2"},
    )
    for rank in range(2)
]
if kind == "abandon":
    time.sleep(1.0)
    sys.exit(0)
print("begun", flush=True)
while any(rank.poll() is None for rank in ranks):
    failed = [rank.returncode for rank in ranks if rank.poll() not in (None, 0)]
    if failed:
        if kind != "stop":
            [rank.terminate() for rank in ranks]
        sys.exit(failed[0] % 256)
    time.sleep(0.3)
"""


@pytest.fixture
def heard_interrupts() -> Iterator[None]:
    """A shell's background job ignores SIGINT, and a supervisor leaves it so; tests send it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def supervise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard_interrupts: None
) -> Callable[..., Any]:
    """Supervise starts of a plan; the status, the logbook's lines, the number of starts."""
    config = tmp_path / "run.json"
    keys = {"magnetar.training.run_dir": str(tmp_path / "run"), "magnetar.data.path": "x"}
    config.write_text(json.dumps(with_keys(TINY, keys)))

    def command(self: Supervisor, *_: Any) -> list[str]:
        return [sys.executable, "-c", LAUNCHER, plan[0], str(tmp_path / "run")]

    plan: list[str] = []
    monkeypatch.setattr(Supervisor, "_command", command)

    def run(
        *words: str, signals: tuple[int, ...] = (), after: float | None = None, **options: Any
    ) -> tuple[int, str, int]:
        plan[:] = [",".join(words)]
        (tmp_path / "run").mkdir(exist_ok=True)
        supervisor = Supervisor(Options(config, **{"backoff": 0.0} | options))

        def send() -> None:
            if not signals:
                return
            try:
                wait_for(lambda: len(ranks_of(supervisor.run_id)) == 2)
                time.sleep(0.7)
                for number in signals:
                    os.kill(os.getpid(), number)
                    time.sleep(0.3)
                    if number in (signal.SIGINT, signal.SIGTERM):
                        # Two signals that Python has not handled yet are one.
                        wait_for(lambda number=number: supervisor.stopping == number)
            except AssertionError:
                supervisor.stopping = signal.SIGTERM  # otherwise it starts again, for ever
                kill_processes(supervisor.run_id)
                raise

        sender = threading.Thread(target=send)
        if after is not None:
            sender = threading.Timer(after, os.kill, (os.getpid(), signal.SIGTERM))
        sender.start()
        status = supervisor.run()
        sender.join()
        assert run_processes(supervisor.run_id) == []
        starts = (tmp_path / "run" / "starts").stat().st_size
        return status, (tmp_path / "run" / "logbook.md").read_text(), starts

    return run


def ranks_of(run_id: str) -> list[int]:
    return [process.pid for process in run_processes(run_id) if process.rank is not None]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.05)
    return found


CASES: dict[str, tuple[list[str], dict[str, Any], tuple[int, int], list[str]]] = {
    # name -> plan, options, (status, number of starts), what the logbook says
    "a run that finishes is started once": (["finish"], {}, (0, 1), ["**exit** finished\n"]),
    "ranks that have trained in another folder have not finished": (
        *(["elsewhere"], {}, (1, 1)),
        ["**give-up** the ranks have ended with status 0, and none has written into "],
    ),
    "the rank that was killed is named and the run starts again": (
        *(["kill:1", "kill:0", "finish"], {}, (0, 3)),
        [
            "**restart** rank 1 was killed by SIGKILL. Going on after step 0 in 0 s",
            "**restart** rank 0 was killed by SIGKILL.",
            *("(restart 2 of 10 without a new checkpoint)", "**exit** finished"),
        ],
    ),
    "restarts without progress are limited and progress counts": (
        *(["kill:0", "save:4", "kill:0", "kill:0"], {"max_restarts": 2}, (1, 4)),
        [
            "after step 0 in 0 s (restart 1 of 2",
            "after step 4 in 0 s (restart 1 of 2",
            "**give-up** rank 0 was killed by SIGKILL. 2 restarts made no checkpoint beyond",
            "step 4: mend the cause",
        ],
    ),
    "bad input is not tried again": (
        *(["status:2"], {}, (2, 1)),
        ["**give-up** rank 0 ended with status 2: error: what is wrong. A restart"],
    ),
    "another status is a crash with its message": (
        *(["status:3", "status:1", "finish"], {}, (0, 3)),
        [
            "**restart** rank 0 ended with status 3: error: what is wrong",
            "**restart** rank 0 ended with status 1: error: what is wrong",
        ],
    ),
    "ranks without a launcher are killed and the run starts again": (
        *(["abandon", "finish"], {}, (0, 2)),
        ["**restart** the launcher has ended before its ranks"],
    ),
    "a signal reaches the ranks and ends the supervision": (
        *(["kill:nobody"], {"signals": (signal.SIGTERM,)}, (0, 1)),
        ["**exit** stopped by SIGTERM\n"],
    ),
    "a second interrupt stops at once": (
        *(["stop"], {"signals": (signal.SIGINT, signal.SIGINT)}, (130, 1)),
        ["stopped at once by SIGINT: it came twice"],
    ),
    "a signal before there are ranks stops the start": (
        *(["late"], {"after": 0.7}, (128 + signal.SIGTERM, 1)),
        ["**exit** stopped at once by SIGTERM: no rank has begun"],
    ),
    "a signal while waiting ends the supervision": (
        *(["kill:0"], {"backoff": 60.0, "after": 2.0}, (128 + signal.SIGTERM, 1)),
        ["**exit** stopped by SIGTERM while waiting to restart"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_end_of_a_start_has_its_consequence(
    name: str, supervise: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "no number")  # of a batch system around it
    plan, options, ends, said = CASES[name]
    status, book, starts = supervise(*plan, **options)
    assert (status, starts) == ends
    for text in said:
        assert text in book
    assert ("**exit** finished" in book) == (plan[-1] == "finish")


def test_a_warning_reaches_the_ranks_that_listen_and_ends_no_other(
    supervise: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    status, book, starts = supervise("listen", signals=(signal.SIGUSR1,))
    assert (status, starts) == (0, 1)
    assert "SIGUSR1 goes to 1 ranks" in capfd.readouterr().err
    assert "**exit** finished" in book


def test_a_hostfile_that_becomes_wrong_is_bad_input(
    supervise: Callable[..., Any], tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    timer = threading.Timer(0.3, hosts.write_text, ("localhost\n",))
    timer.start()
    status, book, starts = supervise("kill:0", hostfile=hosts)
    timer.join()
    assert (status, starts) == (2, 1)
    assert "**give-up** --hostfile" in book


def test_a_terminal_is_passed_on_and_so_is_its_width(tmp_path: Path) -> None:
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 123, 0, 0))
    program = (
        "import os, sys\nfrom magnetar.engine.supervise.launched_run import Launched\n"
        f"launched = Launched([sys.executable, '-c', {LAUNCHER!r}, 'size', sys.argv[1]], 'x',"
        " os.pipe()[0])\n"
        "while launched.watch(1.0): pass\n"
        "launched.close()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=theirs, stderr=theirs
    )
    assert process.wait(60) == 0
    os.close(theirs)
    assert os.read(ours, 65536).decode().replace("\r\n", "\n").count("columns 123\n") == 2
    os.close(ours)


def test_statuses_are_told_in_words() -> None:
    assert ending(-9) == ending(247) == ending(137) == "was killed by SIGKILL"
    assert ending(1) == "ended with status 1"
    assert ending(255) == "ended with status 255"
    assert ending(None) == "ended"


@pytest.mark.parametrize(
    ("deaths", "code", "cause"),
    [
        # Rank 1 was killed, and its launcher waited for it before we could look. Rank 0 noticed.
        ([("rank 1", None), ("rank 0", 3)], 247, "a rank was killed by SIGKILL"),
        ([("rank 0", 3), ("rank 1", None)], 247, "a rank was killed by SIGKILL"),
        ([("rank 1", None), ("rank 0", -15)], 1, "a rank ended with status 1"),
        # We saw the death ourselves, and the launcher stopped the other rank.
        ([("rank 1", -9), ("rank 0", None)], 247, "rank 1 was killed by SIGKILL"),
        ([("rank 1", -9), ("rank 0", 3)], 3, "rank 1 was killed by SIGKILL"),
    ],
)
def test_a_rank_whose_status_the_launcher_took_is_not_blamed_on_another(
    deaths: list[tuple[str, int | None]], code: int, cause: str
) -> None:
    run = Launched.__new__(Launched)
    run.deaths = [Death(name, status, float(when)) for when, (name, status) in enumerate(deaths)]
    run.process = SimpleNamespace(returncode=code)  # type: ignore[assignment]
    run.lines = deque()
    assert run.cause() == cause
    assert ending(run.status) in cause


@pytest.mark.slow
def test_a_run_goes_on_by_itself_to_exactly_the_same_metrics(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    changes = {"magnetar.training.num_steps": 40, "magnetar.training.save_every": 10}
    whole = write_config(tmp_path, corpus, "whole", changes)
    assert launch(whole).returncode == 0
    config = write_config(tmp_path, corpus, "run", changes)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "magnetar.launchers.supervise", "--backoff", "0"),
            *("--num_gpus", "2", "--deepspeed_config", str(config)),
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and '"step": 15,' in metrics.read_text())
    (run_id,) = {
        word.removeprefix("PYTHON_MAGNETAR_RUN=")
        for path in Path("/proc").glob("[0-9]*/environ")
        if str(config) in (path.parent / "cmdline").read_text()
        for word in path.read_text().split("\0")
        if word.startswith("PYTHON_MAGNETAR_RUN=")
    }
    os.kill(ranks_of(run_id)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "was killed by SIGKILL. Going on after step 10" in output
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    book = (tmp_path / "run" / "logbook.md").read_text()
    assert "**exit** finished; the newest checkpoint is of step 40" in book
