"""What can go wrong with a run, done to it, and what must come of it; see tests.faults.faults.

Each case is a function of a Lab. It returns how the run has ended, and raises AssertionError if
that is not how it should end. `@fault` adds it to CASES with its words; of several above one
function the lowest comes first.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.fault_lab import (
    HALF,
    HANG_TIMEOUT,
    NUM_STEPS,
    SAVE_EVERY,
    Fault,
    Lab,
    Outcome,
    SkipError,
    book,
    ends_with,
    finishes_alike,
    finishes_as_undisturbed,
    goes_on,
    resumed_after,
    steps,
)
from tests.faults.hosts import Host, TwoHosts, missing, two_hosts
from tests.faults.supervised import CONFIG, ROOT, Supervised, kill

RESTART = "it starts again from the newest checkpoint"
LEFT = f"the ranks that are left are killed; {RESTART}"
OLDER = "the file is named, and the checkpoint before is taken"
HANG = f"{HANG_TIMEOUT:g} s later (`guards.hang_timeout_seconds`) the rank is named; {RESTART}"
NOT_READ = "the file is named, status 2; there is nothing to restart before it is mended"
SKIPPED = "the step is left out on all ranks"


class Case(NamedTuple):
    """A fault in words, its documented consequence, seconds until that, and the function."""

    fault: str
    documented: str
    within: float
    case: Callable[[Lab], Outcome]


CASES: list[Case] = []


def fault(words: str, documented: str, within: float = 60, **keys: Any) -> Callable[[Any], Any]:
    """Add a function of a Lab and of these keys to CASES."""

    def add(case: Callable[..., Outcome]) -> Callable[..., Outcome]:
        CASES.append(Case(words, documented, within, partial(case, **keys)))
        return case

    return add


# Processes


def recovers(
    lab: Lab, name: str, harm: Callable[[Supervised], object], said: tuple[str, ...] = ("",)
) -> Outcome:
    """A run that is harmed after step 12, says one of some words, and goes on as if nothing was."""
    with lab.run(name) as run:
        run.wait_for_step(12)
        before = Fault.now(run)
        harm(run)
        outcome = goes_on(run, before)
        assert any(words in run.output + book(run) for words in said), run.output
        finishes_as_undisturbed(run, lab)
        return outcome


def signal_rank(run: Supervised, rank: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a rank."""
    kill(run.ranks()[rank], number)


def kill_launcher(run: Supervised, of_node: bool) -> None:
    """SIGKILL for the launcher's first process, or for the one that the ranks are children of."""
    first = run.launcher()
    (second,) = (p.pid for p in run.processes() if p.rank is None and p.pid != first)
    kill(second if of_node else first or 0)


for rank in (0, 1):
    fault(
        f"rank {rank} is killed (SIGKILL)",
        RESTART,
        name=f"kill_{rank}",
        harm=partial(signal_rank, rank=rank),
        said=(f"rank {rank} was killed by SIGKILL",),
    )(recovers)
for rank in (0, 1):
    fault(
        f"rank {rank} is stopped (SIGSTOP)",
        HANG,
        150,
        name=f"stop_{rank}",
        harm=partial(signal_rank, rank=rank, number=signal.SIGSTOP),
        said=(f"rank {rank} does not answer", "rank 0 does not"),
    )(recovers)
for name, of_node in (("`deepspeed`", False), ("`deepspeed.launcher.launch`", True)):
    harm = partial(kill_launcher, of_node=of_node)
    fault(f"{name} is killed", LEFT, name=f"launcher_{of_node}", harm=harm)(recovers)


@fault(
    "the supervisor is killed",
    "the ranks end when rank 0 cannot print its next line, after 10 s at most or a step; the same "
    "command goes on then, and says before that the folder is in use",
)
def kill_supervisor(lab: Lab) -> Outcome:
    """SIGKILL: the ranks end as soon as they cannot print any more; then the same command again."""
    many = "magnetar.training.num_steps=2000"  # it prints every 10 seconds
    with lab.run("supervisor", many) as run:
        run.wait_for_step(12)
        when = time.monotonic()
        run.processes()
        run.process.kill()
        while run.processes():
            assert time.monotonic() - when < 60, "the ranks live on"
            time.sleep(0.1)
        seconds, reached = time.monotonic() - when, run.last_step()
    with lab.run("supervisor", many) as run:
        first = run.wait_for(lambda: resumed_after(run))
        run.wait_for(lambda: run.last_step() > max(first, NUM_STEPS))
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 0, run.output
        whole = steps(lab.whole)
        assert steps(run.run_dir)[: len(whole)] == whole
    return Outcome("the ranks ended", seconds, reached - first)


@fault(
    "the supervisor gets SIGTERM",
    "a checkpoint after the step, status 0; the same command goes on",
)
def ask_to_stop(lab: Lab) -> Outcome:
    """SIGTERM for the supervisor, and the same command again."""
    with lab.run("sigterm") as run:
        run.wait_for_step(12)
        when = time.monotonic()
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 0, run.output
        seconds, reached = time.monotonic() - when, run.last_step()
        assert "**exit** stopped by SIGTERM" in book(run)
    with lab.run("sigterm") as run:
        finishes_as_undisturbed(run, lab)
        first = resumed_after(run)
    assert first == reached, f"resumed after {first} in place of {reached}"
    return Outcome("saved, status 0", seconds, 0)


# Checkpoints and disks


def truncate(folder: Path, name: str = "rank_00001.safetensors") -> None:
    """Cut a file in half."""
    os.truncate(folder / name, (folder / name).stat().st_size // 2)


def flip_bit(folder: Path) -> None:
    """Change one bit of a file."""
    file = folder / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    file.write_bytes(content)


def lose(folder: Path, name: str) -> None:
    """Remove a file."""
    (folder / name).unlink()


@fault(
    "one of a checkpoint's two files is gone",
    OLDER,
    name="no_file",
    harm=partial(lose, name="rank_00000.safetensors"),
)
@fault(
    "a checkpoint's manifest is gone",
    OLDER,
    name="no_manifest",
    harm=partial(lose, name="manifest.json"),
)
@fault("a bit of a checkpoint flips", OLDER, name="flipped", harm=flip_bit)
@fault("a checkpoint's file is cut in half", OLDER, name="truncated", harm=truncate)
def damage(lab: Lab, name: str, harm: Callable[[Path], None]) -> Outcome:
    """Harm the newest checkpoint of a run, and start it."""
    run_dir = lab.folder / name
    shutil.copytree(lab.half, run_dir)
    harm(max((run_dir / "checkpoints").glob("step_*")))
    when = time.monotonic()
    with lab.run(name, run_dir=run_dir) as run:
        first = run.wait_for(lambda: resumed_after(run), 60)
        assert first == HALF - SAVE_EVERY, run.output
        run.wait_for(lambda: run.last_step() > first)
        seconds = time.monotonic() - when
        finishes_as_undisturbed(run, lab)
    return Outcome("recovered", seconds, HALF - first)


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A disk of so much space."""
    folder.mkdir(exist_ok=True)
    options = f"size={mebibytes}m"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        raise SkipError("a disk of its own needs root, and leave to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


@fault(
    "the disk is full when it writes metrics.jsonl",
    "status 2, and what to do; a line that was cut off is ignored",
    of_checkpoints=False,
)
@fault(
    "the disk is full when it saves",
    "status 2, and what to do; older checkpoints are as they were, and the same command goes on "
    "from them once there is space",
    of_checkpoints=True,
)
def fill_disk(lab: Lab, of_checkpoints: bool) -> Outcome:
    """A disk with room for a few checkpoints, or only for those, which is then filled."""
    name = f"disk_{of_checkpoints}"
    run_dir = lab.folder / name / "run"
    run_dir.mkdir(parents=True)
    words = "could not write the checkpoint" if of_checkpoints else "No space left on device"
    with small_disk(run_dir / "checkpoints" if of_checkpoints else run_dir, 64) as disk:
        with lab.run(name, run_dir=run_dir) as run:
            run.wait_for_step(11)
            with suppress(OSError), (disk / "others").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 12))
            step = run.last_step()
            outcome = ends_with(run, 2, words, time.monotonic())
        (disk / "others").unlink()
        with lab.run(name, run_dir=run_dir) as run:
            finishes_as_undisturbed(run, lab)
            first = resumed_after(run)
    assert first >= step - SAVE_EVERY, f"resumed after {first}, the disk was full at {step}"
    return outcome._replace(lost=SAVE_EVERY)


@fault(
    "the folder of checkpoints becomes read-only",
    "status 2, and what to do; the same command goes on when it can be written again",
)
def forbid_writing(lab: Lab) -> Outcome:
    """The folder of checkpoints becomes read-only while the run trains."""
    with lab.run("readonly") as run:
        run.wait_for_step(11)
        folder = run.run_dir / "checkpoints"
        mounts = ["mount --bind {0} {0}", "mount -o remount,ro,bind {0}"]
        for command in mounts:  # root writes whatever the permissions say
            if subprocess.run(command.format(folder).split(), capture_output=True).returncode:
                raise SkipError("a read-only folder needs root, and leave to mount")
        try:
            outcome = ends_with(run, 2, "could not write the checkpoint", time.monotonic())
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    with lab.run("readonly") as run:
        finishes_as_undisturbed(run, lab)
    return outcome._replace(lost=SAVE_EVERY)


# Hosts


def on_two_hosts(
    lab: Lab, name: str, harm: Callable[[Lab, TwoHosts, Supervised], Outcome]
) -> Outcome:
    """A run with a rank on each of two hosts, and a fault in it."""
    if reason := missing():
        raise SkipError(reason)
    with two_hosts(lab.folder / f"{name}_hosts", slots=1) as two:
        arguments = ("--hostfile", str(two.hostfile), "--master_addr", two.hosts[0].address)
        first = {"prefix": two.hosts[0].command([]), "environment": two.environment}
        with lab.run(name, arguments=arguments, **first) as run:
            run.wait_for_step(12, 180)
            return harm(lab, two, run)


def between_hosts(words: str, documented: str, within: float = 60) -> Callable[[Any], Any]:
    """Like `fault`, of what is done to a run on two hosts."""

    def add(harm: Callable[..., Outcome]) -> Callable[..., Outcome]:
        fault(words, documented, within, name=harm.__name__, harm=harm)(on_two_hosts)
        return harm

    return add


@between_hosts("the network is down for 10 s", "TCP waits, and so does the run")
def unplug_for_10_s(lab: Lab, two: TwoHosts, run: Supervised) -> Outcome:
    """The cable is out for a while: TCP waits."""
    when = time.monotonic()
    two.hosts[1].unplug()
    time.sleep(10)
    step = run.last_step()
    two.hosts[1].plug()
    run.wait_for(lambda: run.last_step() > step, 60)
    seconds = time.monotonic() - when
    finishes_alike(run, lab)
    assert "**restart**" not in book(run), book(run)
    return Outcome("went on", seconds, 0)


@between_hosts(
    "the network is down for good",
    f"the hang is found after {HANG_TIMEOUT:g} s; the host that does not answer ssh is left out, "
    "and the run goes on without",
    150,
)
def unplug_for_good(
    lab: Lab, two: TwoHosts, run: Supervised, harm: Callable[[Host], None] = Host.unplug
) -> Outcome:
    """The cable stays out: the first host goes on alone."""
    before = Fault.now(run)
    harm(two.hosts[1])
    outcome = goes_on(run, before)
    finishes_alike(run, lab)
    assert "1 of 2 ranks are there" in book(run), book(run)
    return outcome._replace(end="recovered on one host")


@between_hosts("a host is switched off", "as if the network were down for good", 150)
def switch_off(lab: Lab, two: TwoHosts, run: Supervised) -> Outcome:
    """The second host is switched off; no connection is closed."""
    return unplug_for_good(lab, two, run, Host.switch_off)


@fault(
    "the hostfile has a slot less, and that rank is killed",
    "the same batch on the ranks that are left",
)
def shrink_hostfile(lab: Lab) -> Outcome:
    """A slot is taken out of the hostfile, and the rank on it is killed."""
    hostfile = lab.folder / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    with lab.run("shrunk", arguments=("--hostfile", str(hostfile))) as run:
        run.wait_for_step(12)
        hostfile.write_text("localhost slots=1\n")
        before = Fault.now(run)
        kill(run.ranks()[1])
        outcome = goes_on(run, before)
        finishes_alike(run, lab)
        assert "going on with 1 rank, ep_size 1" in book(run), book(run)
    return outcome._replace(end="recovered on one rank")


# Numbers


@fault(
    "the loss is ten times as large in one step",
    "with `guards.spike_deviations` 6 the step is left out on all ranks",
    name="spike:30",
    event="skip",
    settings=("magnetar.guards.spike_deviations=6", "magnetar.guards.spike_window=10"),
)
@fault("the loss is infinite in one step", SKIPPED, name="infinite:13", event="skip")
@fault(
    "gradients are NaN in three steps in a row",
    "with `guards.max_bad_steps` 3 it goes back to the newest checkpoint, and leaves out the "
    "batches between",
    name="nan:13:3",
    event="rollback",
)
@fault("a gradient is NaN in one step", SKIPPED, name="nan:13", event="skip")
def put_in(lab: Lab, name: str, event: str, settings: tuple[str, ...] = ()) -> Outcome:
    """A fault of numbers that the run deals with by itself, without a restart."""
    with lab.run(name.replace(":", "_"), *settings, fault=name) as run:
        run.wait_for(lambda: f"**{event}**" in book(run))
        when, step = time.monotonic(), run.last_step()
        run.wait_for(lambda: run.last_step() > step or run.last_step() == NUM_STEPS, 60)
        seconds = time.monotonic() - when
        assert run.end() == 0, run.output
        found = steps(run.run_dir)
        assert [record["step"] for record in found] == list(range(1, NUM_STEPS + 1))
        assert all(abs(record["loss"]) < 1e9 for record in found[-5:]), found[-5:]
        assert "**restart**" not in book(run)
    back = re.search(r"back from step (\d+) .* to step (\d+);", book(run))
    lost = int(back[1]) - int(back[2]) if back else 0
    return Outcome("went on by itself", seconds, lost)


@fault(
    "a bit of one rank's weights flips",
    "with `guards.replica_check_every` 5 the run ends with status 3, naming tensor and rank; "
    + RESTART,
)
def flip_weight(lab: Lab) -> Outcome:
    """One bit of one rank's weights."""
    settings = ("zero_optimization.stage=0", f"magnetar.guards.replica_check_every={SAVE_EVERY}")
    with lab.run("replica", *settings, fault="flip:13") as run:
        run.wait_for_step(13)
        before = Fault.now(run)
        outcome = goes_on(run, before)
        assert "are no longer those of rank 0" in run.output, run.output
        assert run.end() == 0, run.output
    return outcome


@fault("the clock jumps back by an hour", "nothing")
def set_clock_back(lab: Lab) -> Outcome:
    """By an hour, in the ranks."""
    with lab.run("clock", fault="clock:12") as run:
        run.wait_for_step(12)
        when = time.monotonic()
        run.wait_for_step(13)
        seconds = time.monotonic() - when
        finishes_as_undisturbed(run, lab)
    return Outcome("went on", seconds, 0)


# Data and JSON


def copied_data(lab: Lab, name: str) -> Path:
    """A copy of the prepared folder, to do harm to."""
    path = json.loads(CONFIG.read_text())["magnetar"]["data"]["path"]
    return shutil.copytree(ROOT / path, lab.folder / f"{name}_data")


def flip_bytes(folder: Path) -> None:
    """Ids beyond the vocabulary, in many places."""
    file = folder / "train.bin"
    content = bytearray(file.read_bytes())
    for place in range(0, len(content) - 1, 2000):
        content[place : place + 2] = b"\xff\xff"
    file.write_bytes(content)


@fault(
    "the file of tokens is cut in half",
    NOT_READ,
    name="cut",
    harm=partial(truncate, name="train.bin"),
)
@fault("bytes of the tokens flip, beyond the vocabulary", NOT_READ, name="bytes", harm=flip_bytes)
def spoil_data(lab: Lab, name: str, harm: Callable[[Path], None]) -> Outcome:
    """Harm a copy of the data before a start."""
    data = copied_data(lab, name)
    harm(data)
    when = time.monotonic()
    with lab.run(name, f"magnetar.data.path={data}") as run:
        outcome = ends_with(run, 2, "error: ", when)
        assert "train.bin" in run.output, run.output
    return outcome


@fault(
    "the file of tokens is removed, and later a rank killed",
    f"the run goes on with the open file; the restart says what is missing: {NOT_READ}",
)
def lose_data(lab: Lab) -> Outcome:
    """The file is removed while the run reads it, and later a rank is killed."""
    data = copied_data(lab, "lost")
    with lab.run("lost", f"magnetar.data.path={data}") as run:
        run.wait_for_step(8)
        (data / "train.bin").rename(data / "elsewhere")
        run.wait_for_step(14)  # a file that is open stays
        when, step = time.monotonic(), run.last_step()
        kill(run.ranks()[0])
        outcome = ends_with(run, 2, "train.bin", when)
    (data / "elsewhere").rename(data / "train.bin")
    with lab.run("lost", f"magnetar.data.path={data}") as run:
        finishes_as_undisturbed(run, lab)
        first = resumed_after(run)
    return outcome._replace(lost=step - first)


@fault(
    "the JSON is edited sensibly, and a rank killed",
    "the restart goes on with it, and the logbook lists the keys that changed",
    edit=('"log_every": 1', '"log_every": 2'),
    said="",
)
@fault(
    "the JSON is edited to nonsense, and a rank killed",
    "the restart names line and column, status 2",
    edit=('"seq_len": 64', '"seq_len": 64,,'),
    said="JSON",
)
def change_json(lab: Lab, edit: tuple[str, str], said: str) -> Outcome:
    """Edit the JSON while the run trains, and kill a rank."""
    config = lab.folder / "edited.json"
    config.write_text(CONFIG.read_text())
    text = CONFIG.read_text().replace(*edit)
    assert text != CONFIG.read_text()
    with Supervised(lab.folder / f"edited_{said}", lab.settings, config=config) as run:
        run.wait_for_step(12)
        before = Fault.now(run)
        config.write_text(text)
        kill(run.ranks()[1])
        if said:
            return ends_with(run, 2, said, before.when)
        outcome = goes_on(run, before)
        assert "**change** the JSON:" in book(run), book(run)
        assert "training.log_every: 1 -> 2" in book(run), book(run)
        assert run.end() == 0, run.output
    return outcome
