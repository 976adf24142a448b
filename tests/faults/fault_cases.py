"""What can go wrong with a run, done to it, and what must come of it; see tests.faults.faults.

Each case is a function of a Lab. It returns how the run has ended, and raises AssertionError if
that is not how it should end.
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
from pathlib import Path

from tests.faults.fault_lab import (
    HALF,
    NUM_STEPS,
    RESUMED,
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
    steps,
)
from tests.faults.hosts import TwoHosts, missing, two_hosts
from tests.faults.supervised import CONFIG, ROOT, Supervised, kill

# Processes


def kill_rank(lab: Lab, rank: int) -> Outcome:
    """SIGKILL."""
    with lab.run(f"kill_{rank}") as run:
        run.wait_for_step(12)
        fault = Fault.now(run)
        kill(run.ranks()[rank])
        outcome = goes_on(run, fault)
        assert f"rank {rank} was killed by SIGKILL" in book(run), book(run)
        finishes_as_undisturbed(run, lab)
        return outcome


def stop_rank(lab: Lab, rank: int) -> Outcome:
    """SIGSTOP."""
    with lab.run(f"stop_{rank}") as run:
        run.wait_for_step(12)
        fault = Fault.now(run)
        kill(run.ranks()[rank], signal.SIGSTOP)
        outcome = goes_on(run, fault)
        assert f"rank {rank} does not answer" in run.output or "rank 0 does not" in run.output
        finishes_as_undisturbed(run, lab)
        return outcome


def kill_launcher(lab: Lab, of_node: bool) -> Outcome:
    """SIGKILL for the launcher's first process, or for the one that the ranks are children of."""
    with lab.run(f"launcher_{of_node}") as run:
        run.wait_for_step(12)
        fault = Fault.now(run)
        first = run.launcher()
        (second,) = (p.pid for p in run.processes() if p.rank is None and p.pid != first)
        kill(second if of_node else first or 0)
        outcome = goes_on(run, fault)
        finishes_as_undisturbed(run, lab)
        return outcome


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
        run.wait_for(lambda: RESUMED.search(run.output))
        first = int(RESUMED.findall(run.output)[-1])
        run.wait_for(lambda: run.last_step() > max(first, NUM_STEPS))
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 0, run.output
        whole = steps(lab.whole)
        assert steps(run.run_dir)[: len(whole)] == whole
    return Outcome("the ranks ended", seconds, reached - first)


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
        first = int(RESUMED.findall(run.output)[-1])
    assert first == reached, f"resumed after {first} in place of {reached}"
    return Outcome("saved, status 0", seconds, 0)


# Checkpoints and disks


def newest(run_dir: Path) -> Path:
    """The folder of the last checkpoint."""
    return sorted((run_dir / "checkpoints").glob("step_*"))[-1]


def damage(lab: Lab, name: str, harm: Callable[[Path], None]) -> Outcome:
    """Harm the newest checkpoint of a run, and start it."""
    run_dir = lab.folder / name
    shutil.copytree(lab.half, run_dir)
    harm(newest(run_dir))
    when = time.monotonic()
    with lab.run(name, run_dir=run_dir) as run:
        run.wait_for(lambda: RESUMED.search(run.output), 60)
        first = int(RESUMED.findall(run.output)[-1])
        assert first == HALF - SAVE_EVERY, run.output
        run.wait_for(lambda: run.last_step() > first)
        seconds = time.monotonic() - when
        finishes_as_undisturbed(run, lab)
    return Outcome("recovered", seconds, HALF - first)


def truncate(folder: Path) -> None:
    """Cut a file in half."""
    file = folder / "rank_00001.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def flip_bit(folder: Path) -> None:
    """Change one bit of a file."""
    file = folder / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    file.write_bytes(content)


def lose_manifest(folder: Path) -> None:
    """Remove what says which files there are."""
    (folder / "manifest.json").unlink()


def lose_half(folder: Path) -> None:
    """Remove one of two files."""
    (folder / "rank_00000.safetensors").unlink()


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


def fill_disk(lab: Lab, of_checkpoints: bool) -> Outcome:
    """A disk with room for a few checkpoints, which is then filled.

    Args:
        lab: lab of the case.
        of_checkpoints: whether the disk holds only checkpoints, so that a save meets it full.
    """
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
            first = int(RESUMED.findall(run.output)[-1])
    assert first >= step - SAVE_EVERY, f"resumed after {first}, the disk was full at {step}"
    return outcome._replace(lost=SAVE_EVERY)


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


# Numbers


def put_in(lab: Lab, name: str, fault: str, event: str, *settings: str) -> Outcome:
    """A fault of numbers that the run deals with by itself, without a restart."""
    with lab.run(name, *settings, fault=fault) as run:
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


def flip_weight(lab: Lab) -> Outcome:
    """One bit of one rank's weights."""
    settings = ("zero_optimization.stage=0", f"magnetar.guards.replica_check_every={SAVE_EVERY}")
    with lab.run("replica", *settings, fault="flip:13") as run:
        run.wait_for_step(13)
        fault = Fault.now(run)
        outcome = goes_on(run, fault)
        assert "are no longer those of rank 0" in run.output, run.output
        assert run.end() == 0, run.output
    return outcome


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


def spoil_data(lab: Lab, name: str, harm: Callable[[Path], None], words: str) -> Outcome:
    """Harm a copy of the data before a start."""
    path = json.loads(CONFIG.read_text())["magnetar"]["data"]["path"]
    data = lab.folder / f"{name}_data"
    shutil.copytree(ROOT / path, data)
    harm(data / "train.bin")
    when = time.monotonic()
    with lab.run(name, f"magnetar.data.path={data}") as run:
        outcome = ends_with(run, 2, words, when)
        assert "train.bin" in run.output, run.output
    return outcome


def flip_bytes(file: Path) -> None:
    """Ids beyond the vocabulary, in many places."""
    content = bytearray(file.read_bytes())
    for place in range(0, len(content) - 1, 2000):
        content[place : place + 2] = b"\xff\xff"
    file.write_bytes(content)


def cut_off(file: Path) -> None:
    """Half of the tokens."""
    os.truncate(file, file.stat().st_size // 2)


def lose_data(lab: Lab) -> Outcome:
    """The file is removed while the run reads it, and later a rank is killed."""
    path = json.loads(CONFIG.read_text())["magnetar"]["data"]["path"]
    data = lab.folder / "lost_data"
    shutil.copytree(ROOT / path, data)
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
        first = int(RESUMED.findall(run.output)[-1])
    return outcome._replace(lost=step - first)


def change_json(lab: Lab, text: str, words: str) -> Outcome:
    """Edit the JSON while the run trains, and kill a rank."""
    config = lab.folder / "edited.json"
    config.write_text(CONFIG.read_text())
    run_dir = lab.folder / f"edited_{len(text)}"
    settings = [*lab.settings]
    with Supervised(run_dir, settings, config=config) as run:
        run.wait_for_step(12)
        fault = Fault.now(run)
        config.write_text(text)
        kill(run.ranks()[1])
        if words:
            return ends_with(run, 2, words, fault.when)
        outcome = goes_on(run, fault)
        assert "**change** the JSON:" in book(run), book(run)
        assert "training.log_every: 1 -> 2" in book(run), book(run)
        assert run.end() == 0, run.output
    return outcome


def edit_to_nonsense(lab: Lab) -> Outcome:
    """A comma too many."""
    return change_json(lab, CONFIG.read_text().replace('"seq_len": 64', '"seq_len": 64,,'), "JSON")


def edit_sensibly(lab: Lab) -> Outcome:
    """Another log_every."""
    text = CONFIG.read_text().replace('"log_every": 1', '"log_every": 2')
    assert text != CONFIG.read_text()
    return change_json(lab, text, "")


# Hosts


def on_two_hosts(
    lab: Lab, name: str, harm: Callable[[Lab, TwoHosts, Supervised], Outcome]
) -> Outcome:
    """A run with a rank on each of two hosts, and a fault in it."""
    if reason := missing():
        raise SkipError(reason)
    with two_hosts(lab.folder / f"{name}_hosts", slots=1) as two:
        arguments = ("--hostfile", str(two.hostfile), "--master_addr", two.hosts[0].address)
        with lab.run(
            name,
            arguments=arguments,
            prefix=two.hosts[0].command([]),
            environment=two.environment,
        ) as run:
            run.wait_for_step(12, 180)
            return harm(lab, two, run)


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


def unplug_for_good(lab: Lab, two: TwoHosts, run: Supervised) -> Outcome:
    """The cable stays out: the first host goes on alone."""
    fault = Fault.now(run)
    two.hosts[1].unplug()
    outcome = goes_on(run, fault)
    finishes_alike(run, lab)
    assert "1 of 2 ranks are there" in book(run), book(run)
    return outcome._replace(end="recovered on one host")


def switch_off(lab: Lab, two: TwoHosts, run: Supervised) -> Outcome:
    """The second host is switched off; no connection is closed."""
    fault = Fault.now(run)
    two.hosts[1].switch_off()
    outcome = goes_on(run, fault)
    finishes_alike(run, lab)
    return outcome._replace(end="recovered on one host")


def shrink_hostfile(lab: Lab) -> Outcome:
    """A slot is taken out of the hostfile, and the rank on it is killed."""
    hostfile = lab.folder / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    with lab.run("shrunk", arguments=("--hostfile", str(hostfile))) as run:
        run.wait_for_step(12)
        hostfile.write_text("localhost slots=1\n")
        fault = Fault.now(run)
        kill(run.ranks()[1])
        outcome = goes_on(run, fault)
        finishes_alike(run, lab)
        assert "going on with 1 rank, ep_size 1" in book(run), book(run)
    return outcome._replace(end="recovered on one rank")
