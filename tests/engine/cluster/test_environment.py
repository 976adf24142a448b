"""What launchers and batch systems set, missing, doubled, of another meaning or no number."""

import os
import subprocess
import sys
import time

import pytest

from magnetar.data.errors import UserError
from magnetar.engine.cluster.environment import (
    launched_world_size,
    refuse_other_launchers,
    require_device,
)
from tests.ranks import ROOT, free_port

KINDS = ("RANK", "LOCAL", "WORLD_SIZE", "MASTER_", "OMPI_", "PMI_", "MPI_", "SLURM_")
OURS = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}
OURS |= {"MASTER_ADDR": "127.0.0.1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
OPEN_MPI |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SLURM = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):
    for name in os.environ:
        if name.startswith(KINDS):
            monkeypatch.delenv(name)

    def setenv(variables: dict[str, str]) -> None:
        for name, text in variables.items():
            monkeypatch.setenv(name, text)

    return setenv


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, 1),
        ({"MASTER_ADDR": "elsewhere", "MASTER_PORT": "x"}, 1),  # of a site's profile
        (OURS, 4),
        (OURS | {"LOCAL_SIZE": "2", "CROSS_RANK": "x"}, 4),
        (OURS | {"LOCAL_WORLD_SIZE": "4"}, 4),
        (OPEN_MPI, 4),
        (OPEN_MPI | {"WORLD_SIZE": "4", "MASTER_PORT": "1"}, 4),
        (MPICH, 4),
        (MPICH | OURS, 4),
        # DeepSpeed's launcher on each of two machines, which srun or mpirun started.
        (OURS | {"PMI_RANK": "0", "PMI_SIZE": "2"}, 4),
        (OURS | SLURM | {"SLURM_NTASKS": "2"}, 4),
        (OURS | SLURM, 4),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, 1),  # a batch script, outside any step
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, 1),
    ],
    ids=str,
)
def test_every_launchers_ranks_are_counted(use, variables: dict[str, str], ranks: int) -> None:
    use(variables)
    assert launched_world_size() == ranks


def without(variables: dict[str, str], name: str) -> dict[str, str]:
    return {other: text for other, text in variables.items() if other != name}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        *((without(OURS, name), f"{name} is not set, and ") for name in OURS),
        ({"WORLD_SIZE": "1"}, "RANK is not set, and WORLD_SIZE=1 is: a launcher sets both"),
        ({"LOCAL_RANK": "0"}, "or unset LOCAL_RANK"),
        *(
            (OURS | {name: text}, f"{name}={text} must be a whole number from ")
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
            for text in ("", "x", "-1", "1.5", " 1", "9" * 30)
        ),
        (OURS | {"RANK": "4"}, "RANK=4 must be a whole number from 0 to 3, since WORLD_SIZE=4"),
        (OURS | {"LOCAL_RANK": "4"}, "LOCAL_RANK=4 must be a whole number from 0 to 3"),
        (
            OURS | {"LOCAL_SIZE": "1"},
            "LOCAL_RANK=1 must be a whole number from 0 to 0, since LOCAL",
        ),
        (OURS | {"LOCAL_SIZE": "5"}, "LOCAL_SIZE=5 must be a whole number from 1 to 4"),
        (OURS | {"LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}, "say the same, and differ"),
        (OURS | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0 must be a whole number from 1"),
        (OURS | {"MASTER_PORT": "0"}, "MASTER_PORT=0 must be a whole number from 1 to 65535"),
        (OURS | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536 must be a whole number"),
        *(
            (OURS | {"MASTER_ADDR": text}, f"MASTER_ADDR={text} is not known here (")
            for text in ("", "tcp://10.0.0.1", "no one", "a" * 70)
        ),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is not set beside O"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK is not set beside O"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK=4 must be a whole number"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE=x must be a whole number"),
        (MPICH | {"MPI_LOCALRANKID": "4"}, "MPI_LOCALRANKID=4 must be a whole number from 0 to 3"),
        (MPICH | {"MASTER_PORT": "x"}, "MASTER_PORT=x must be a whole number from 1 to 65535"),
        (OPEN_MPI | {"WORLD_SIZE": "2"}, "WORLD_SIZE=2, and mpirun or srun has started 4 ranks"),
        (OPEN_MPI | {"WORLD_SIZE": "8"}, "WORLD_SIZE=8 and OMPI_COMM_WORLD_SIZE=4 say the same"),
        (OPEN_MPI | OURS | {"RANK": "0"}, "RANK=0 and OMPI_COMM_WORLD_RANK=1 say the same"),
        (SLURM, "srun has started 4 tasks, and RANK is not set: start launchers/slurm.sh"),
        (SLURM | {"SLURM_NTASKS": "four"}, "SLURM_NTASKS=four must be a whole number"),
        (SLURM | OURS | {"RANK": "0", "WORLD_SIZE": "1"}, "unset what is left of another run"),
        (SLURM | OURS | {"RANK": "0"}, "RANK=0 and SLURM_PROCID=1 say the same, and differ: unset"),
        ({"LOCAL_SIZE": "1.0"}, "LOCAL_SIZE=1.0 must be a whole number from 1 to 1"),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": ""}, "OMPI_COMM_WORLD_LOCAL_RANK= must be a whole number"),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "this process is local rank 0: unset it"),
        (OURS | {"OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "this process is local rank 1: unset it"),
        ({"GLOO_SOCKET_IFNAME": "lo,nowhere9"}, "names nowhere9, which is no network interface"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused_by_the_rank_that_has_it(
    use, variables: dict[str, str], words: str
) -> None:
    use(variables)
    with pytest.raises(UserError) as raised:
        launched_world_size()
    assert words in str(raised.value)
    assert "LOCAL_RANK" not in os.environ, "or only the first rank of a machine would print"


def test_unsetting_what_is_left_of_mpirun_is_a_way_out(use) -> None:
    use({"PMI_RANK": "1"})
    message = "PMI_SIZE is not set beside PMI_RANK: unset PMI_RANK, or"
    with pytest.raises(UserError, match=message):
        launched_world_size()
    with pytest.raises(UserError, match=message):  # by the command itself, too
        refuse_other_launchers("magnetar train")
    del os.environ["PMI_RANK"]
    assert launched_world_size() == 1
    refuse_other_launchers("magnetar train")


def test_a_rank_without_a_gpu_is_refused(use) -> None:
    use(OURS | {"CUDA_VISIBLE_DEVICES": "3"})
    require_device(2)
    with pytest.raises(UserError, match=r"LOCAL_RANK=1 needs .* sees 1 \(CUDA_VISIBLE_DEVICES=3\)"):
        require_device(1)


def test_a_launcher_is_not_started_by_another(use) -> None:
    refuse_other_launchers("magnetar train")
    use({"SLURM_STEP_NUM_TASKS": "4", "PMI_SIZE": "1"})
    refuse_other_launchers("magnetar train")  # a batch script
    use({"SLURM_STEP_ID": "0"})
    with pytest.raises(UserError, match=r"SLURM_STEP_NUM_TASKS=4: .* starts `magnetar train` 4 ti"):
        refuse_other_launchers("magnetar train")


def start(variables: dict[str, str]) -> subprocess.Popen[str]:
    environment = {n: t for n, t in os.environ.items() if not n.startswith(KINDS)} | variables
    program = [sys.executable, "-m", "magnetar.launchers.train", "quickstart"]
    return subprocess.Popen(
        program,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_the_command_ends_at_once_and_says_why() -> None:
    process = start(OURS | {"RANK": "4"})
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert printed.startswith(
        "error: RANK=4 must be a whole number from 0 to 3, since WORLD_SIZE=4"
    )


MEET = """
import sys, threading
from datetime import timedelta
from magnetar.engine.cluster import rendezvous
from magnetar.launchers.terminal.user_errors import user_errors
with user_errors():
    next(rendezvous._meet("magnetar://", timeout=timedelta(seconds=60)))
"""


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "RANK=1 is that of another process, too: start all ranks with one launcher"),
        ({"RANK": "2", "WORLD_SIZE": "5"}, "WORLD_SIZE=5 on rank 2 and 4 on rank 0"),
    ],
)
def test_a_doubled_rank_and_two_numbers_of_ranks_are_found_at_once(
    variables: dict[str, str], words: str
) -> None:
    ours, processes = OURS | {"MASTER_PORT": str(free_port())}, []
    for own in ({"RANK": "0", "LOCAL_RANK": "0"}, {}, variables):
        environment = os.environ | ours | own
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", MEET], cwd=ROOT, env=environment, stderr=subprocess.PIPE
            )
        )
    try:
        began = time.monotonic()
        while not (ended := [p for p in processes if p.poll() == 2]):
            assert time.monotonic() - began < 60
            time.sleep(0.1)
        assert words.encode() in ended[0].stderr.read()
    finally:
        for process in processes:
            process.kill()
            process.wait()
