"""The doctor's command: on this machine, and between two hosts."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from magnetar.launchers.doctor import main
from tests.faults.hosts import TwoHosts, two_hosts
from tests.ranks import ROOT, free_port
from tests.runs import environment, make_corpus, write_config

needs_two_hosts = pytest.mark.needs("two hosts")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    folder = tmp_path_factory.mktemp("hosts")
    exports = {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    with two_hosts(folder, slots=1, exports=exports) as found:
        yield found


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, make_corpus(tmp_path / "corpus"))


def doctor(two: TwoHosts | None, *arguments: str) -> tuple[int, str]:
    """Status and what is printed; on the first of two hosts, or here."""
    command = [sys.executable, "-m", "magnetar.launchers.doctor", *arguments]
    process = subprocess.Popen(
        command if two is None else two.hosts[0].command(command),
        cwd=ROOT,
        env=(environment() if two is None else dict(two.environment)) | {"COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@pytest.mark.slow
@needs_two_hosts
def test_two_hosts_in_order_are_measured_and_nothing_is_left(
    two: TwoHosts, config: Path, tmp_path: Path
) -> None:
    before = set(tmp_path.rglob("*"))
    status, output = doctor(two, "--hostfile", str(two.hostfile), "--deepspeed_config", str(config))
    assert status == 0, output
    assert output.splitlines()[-1] == "All well: a run can start."
    for line in ("gloo, 2 ranks", "all-reduce of gradients", "all-to-all of 2 ranks"):
        assert line in output
    assert "1 pair between machines, each way" in output
    assert "DS_ACCELERATOR=cpu" in output
    assert "10.77.0.2: MASTER_ADDR=10.77.0.1 MASTER_PORT=29500 WORLD_SIZE=2 CROSS_RANK=1" in output
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.slow
@needs_two_hosts
def test_what_is_wrong_with_a_host_is_found_before_anything_starts(
    two: TwoHosts, config: Path, tmp_path: Path
) -> None:
    other = two.hosts[1]
    changed = tmp_path / "changed"
    changed.write_text("{}")
    for covered in (ROOT / "launchers/plot.py", config):
        other.run(["mount", "--bind", str(changed), str(covered)], check=True)
    other.run(["mount", "-t", "tmpfs", "none", str(tmp_path / "corpus/prepared")], check=True)
    disk = tmp_path / "disk"
    disk.mkdir()
    other.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], check=True)
    lock = Path(two.hostfile.parent, "extensions/py311_cpu/fused_adam/lock")
    lock.parent.mkdir(parents=True)
    lock.write_text("")
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(two.hostfile.read_text() + "10.77.0.9 slots=2\n")
    try:
        status, output = doctor(
            two,
            *("--hostfile", str(hostfile), "--deepspeed_config", str(config)),
            *("--set", f"magnetar.training.run_dir={disk / 'run'}"),
        )
    finally:
        lock.unlink()
        for covered in (ROOT / "launchers/plot.py", config):
            other.run(["umount", str(covered)], check=True)
    assert status == 1, output
    lines = output.splitlines()

    def remedy_of(found: str) -> str:
        return lines[next(i for i, line in enumerate(lines) if line.startswith(found)) + 1]

    assert "10.77.0.9 hostname" in remedy_of("problem  10.77.0.9, reach: ")
    assert "of the same commit" in next(line for line in lines if "10.77.0.2, code: " in line)
    assert "copy it from 10.77.0.1" in remedy_of(
        f"problem  10.77.0.2, JSON: {config} has other content"
    )
    assert "copy it from 10.77.0.1" in remedy_of("problem  10.77.0.2, data: ")
    for host, stranger in (("10.77.0.1", "10.77.0.2"), ("10.77.0.2", "10.77.0.1")):
        text = f"problem  {host}, disk: {disk} is not the folder of that name on {stranger}"
        assert "share" in remedy_of(text)
        assert f"-> rm {lock}" in remedy_of(f"problem  {host}, JIT: {lock} is 0 minutes old")
    assert "GiB are free" in output
    assert "Collectives were not measured: mend the problems above first" in output


@pytest.mark.slow
def test_this_machine_alone_is_measured(config: Path) -> None:
    arguments = ("--num_gpus", "2", "--master_port", str(free_port()))
    status, output = doctor(None, *arguments)
    assert status == 0, output
    assert "1 pair inside a machine, each way" in output
    assert "All that is set here, and" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_gpus", "0"], "0 is no whole number from 1 to 9999"),
        (["--master_port", "70000"], "70000 is no whole number from 1 to 65535"),
        (["--include", "a", "--exclude", "b"], "--include and --exclude contradict each other"),
        (["--set", "a=b"], "--set overrides keys of a JSON: give --deepspeed_config"),
    ],
)
def test_contradictory_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_a_bad_hostfile_is_refused_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node-1 slots=8\nnode-2 8\n")
    with pytest.raises(SystemExit, match="2"):
        main(["--hostfile", str(hostfile)])
    assert f"{hostfile}, line 2: 'node-2 8' is not `host slots=N`" in capsys.readouterr().err
    hostfile.write_text("node-1 slots=0\n")
    with pytest.raises(SystemExit, match="2"):
        main(["--hostfile", str(hostfile)])
    assert f"--hostfile {hostfile} has no slots: write slots=8" in capsys.readouterr().err
