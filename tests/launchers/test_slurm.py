"""launchers/slurm.sh between a Slurm of a few lines and a Python that tells its environment."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT
from tests.runs import environment

SCRIPT = ROOT / "launchers/slurm.sh"
TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
TOLD = (*TOLD, "MASTER_ADDR", "MASTER_PORT")
JOB = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "a,b,c", "SLURM_NNODES": "3"}
# The first of two tasks of the third node; the nodes have 2, 2 and 1 tasks.
TASK = JOB | {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "MASTER_ADDR": "10.0.0.1",
}


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """scontrol, srun and `told`, which stands for Python."""
    bodies = {
        "scontrol": "print(*'abc', sep='\\n')",
        "srun": "print('srun', *sys.argv[1:])",
        "told": (
            "pairs = zip(sys.argv, sys.argv[1:])\n"
            "hosts = [open(path).read() for name, path in pairs if name == '--hostfile']\n"
            f"told = {{name: os.environ.get(name) for name in {TOLD}}}\n"
            "print(json.dumps({'arguments': sys.argv[1:], 'hosts': hosts} | told))"
        ),
    }
    for name, body in bodies.items():
        file = tmp_path / name
        file.write_text(f"#!{sys.executable}\nimport json, os, sys\n{body}\n")
        file.chmod(0o755)
    return tmp_path


def slurm(
    programs: Path, variables: dict[str, str], cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    own = {name: text for name, text in environment().items() if not name.startswith("SLURM_")}
    own |= {"PATH": f"{programs}:{own['PATH']}", "PYTHON": "told"} | variables
    command = [str(SCRIPT), "--deepspeed_config", "run.json"]
    return subprocess.run(
        command, cwd=cwd, env=own, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_task_is_a_rank(programs: Path) -> None:
    done = slurm(programs, TASK)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["arguments"] == [
        "-u",
        "-m",
        "magnetar.launchers.train",
        "--deepspeed_config",
        "run.json",
    ]
    assert [told[name] for name in TOLD] == ["4", "0", "5", "1", "2", "3", "10.0.0.1", "20345"]


def test_one_task_a_node_starts_deepspeeds_launcher(programs: Path) -> None:
    one = {"SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURM_NTASKS": "3", "SLOTS": "8"}
    told = json.loads(slurm(programs, TASK | one).stdout)
    assert told["hosts"] == ["a slots=8\nb slots=8\nc slots=8\n"]
    words = " ".join(told["arguments"])
    assert "--no_ssh --node_rank 2 --master_addr 10.0.0.1 --master_port 20345 --module" in words
    assert told["RANK"] is None


def test_a_batch_job_starts_its_tasks_and_one_node_needs_no_network(programs: Path) -> None:
    done = slurm(programs, JOB | {"MASTER_ADDR": "10.0.0.1"})
    assert done.stdout == "srun --wait=60 launchers/slurm.sh --deepspeed_config run.json\n"
    alone = {name: text for name, text in TASK.items() if name != "MASTER_ADDR"}
    alone |= {"SLURM_NNODES": "1", "SLURM_STEP_TASKS_PER_NODE": "5", "SLURM_NODEID": "0"}
    assert json.loads(slurm(programs, alone).stdout)["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("SLURM_JOB_ID", "job", "SLURM_JOB_ID=job must be a whole number from 0"),
        ("SLURM_NNODES", "3.0", "SLURM_NNODES=3.0 must be a whole number from 1"),
        ("SLURM_NNODES", "2", "SLURM_NNODES=2 must be a whole number from 3"),
        ("SLURM_NODEID", "3", "SLURM_NODEID=3 must be a whole number from 0 to 2"),
        ("SLURM_NTASKS", "", "SLURM_NTASKS= must be a whole number from 5"),
        ("SLURM_NTASKS", "4", "SLURM_NTASKS=4 must be a whole number from 5 to 5"),
        ("SLURM_PROCID", "-1", "SLURM_PROCID=-1 must be a whole number from 0"),
        ("SLURM_PROCID", "5", "SLURM_PROCID=5 must be a whole number from 0 to 4"),
        ("SLURM_LOCALID", "1", "SLURM_LOCALID=1 must be a whole number from 0 to 0"),
        ("SLURM_STEP_TASKS_PER_NODE", "2(x", "is not tasks of nodes, such as 8(x2),4"),
        ("SLURM_STEP_TASKS_PER_NODE", "2(x99999999999)", "is not tasks of nodes"),
        ("MASTER_PORT", "no", "MASTER_PORT=no must be a whole number from 1"),
        ("MASTER_PORT", "65536", "MASTER_PORT=65536 must be a whole number from 1 to 65535"),
        ("SLOTS", "8x", "SLOTS=8x must be a whole number from 1"),
    ],
)
def test_a_variable_that_is_no_number_of_its_kind_is_refused(
    programs: Path, name: str, text: str, words: str
) -> None:
    done = slurm(programs, TASK | {name: text})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert words in done.stderr


def test_what_cannot_work_is_refused(programs: Path) -> None:
    done = slurm(programs, {})
    assert (done.returncode, done.stderr) == (
        2,
        "error: this is no Slurm job: start it with sbatch or srun\n",
    )
    done = slurm(programs, TASK, cwd=programs)
    assert done.returncode == 2
    assert "start it in Magnetar's folder" in done.stderr
    done = slurm(programs, TASK | {"PYTHON": "no-such-python"})
    assert done.returncode == 2
    assert "no no-such-python in PATH" in done.stderr
    done = slurm(programs, TASK | {"CUDA_VISIBLE_DEVICES": "3", "SLURM_NODEID": "1"})
    assert done.returncode == 2
    assert "a task sees GPUs 3, and the node has 2 tasks" in done.stderr
    assert slurm(programs, TASK | {"CUDA_VISIBLE_DEVICES": "3"}).returncode == 0
