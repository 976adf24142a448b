"""What is started and concluded around the machines' reports."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from magnetar.data.errors import MachineError, UserError
from magnetar.engine.cluster.hosts import LaunchOptions
from magnetar.engine.doctor import bandwidth as world
from magnetar.engine.doctor import run as examination
from magnetar.engine.doctor.bandwidth import Link, Sizes
from magnetar.engine.doctor.run import examine
from magnetar.engine.doctor.ssh_probe import Machine, ask
from tests.engine.doctor.test_checks import report
from tests.runs import make_corpus, write_config

MEASURED: dict[str, Any] = {
    "backend": "gloo",
    "num_ranks": 3,
    "sums_right": True,
    "rows_right": True,
    "links": [Link((0, 1), True, 9e9)],
    "missing_types": [{}, {}],
}


@pytest.fixture
def world_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Machines without a fault, and the launches that would have been."""
    launches: list[tuple[Any, ...]] = []

    def asked(machines: list[Machine], *_: object) -> None:
        for index, machine in enumerate(machines):
            machine.report, machine.mark = report(), str(index)
            machine.marks = [str(index) for index in range(len(machines))]

    def launched(command: list[str], sizes: Sizes, seconds: float) -> dict[str, Any]:
        launches.append((command, sizes))
        return MEASURED | {"links": list(MEASURED["links"])}

    monkeypatch.setattr(examination, "ask", asked)
    monkeypatch.setattr(examination, "launch", launched)
    return launches


def test_sizes_are_those_of_the_runs_gradients_and_tokens(
    world_of: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    config = write_config(tmp_path, make_corpus(tmp_path / "corpus"))
    assert examine(LaunchOptions(config=config, num_gpus=2)).num_problems == 0
    ((command, sizes),) = world_of
    assert command[-4:] == ["--master_port", "29500", "--num_gpus", "2"]
    # 2 sequences of 32 tokens, to 2 experts each, of 32 float32 numbers
    assert (sizes.all_to_all_bytes, sizes.ep_size) == (2 * 32 * 2 * 32 * 4, 2)
    # All of the model's, which training prints, but those of 4 experts: two matrices, their biases,
    # the inner LayerNorm.
    experts = 4 * (2 * 32 * 64 + 64 + 32 + 2 * 64)
    assert sizes.all_reduce_bytes == 4 * (41_409 - experts)


def test_a_single_remote_host_is_not_where_the_launcher_starts(
    world_of: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("no-such-host.invalid slots=2\n")
    found = examine(LaunchOptions(hostfile=hostfile))
    (finding,) = found.findings
    assert finding.text.startswith("the launcher starts a hostfile's only machine here, on ")
    assert "--force_multi" in finding.remedy
    assert (found.num_problems, world_of, found.skipped) == (1, [], "mend the problems above first")
    hostfile.write_text("127.0.0.1 slots=2\n")
    assert examine(LaunchOptions(hostfile=hostfile)).num_problems == 0


@pytest.mark.parametrize(
    "chosen", [{"include": "c@a:1"}, {"exclude": "b@a:0"}, {"include": "a:1@c:0,1"}]
)
def test_machines_and_slots_are_chosen_as_the_launcher_chooses_them(
    world_of: list[tuple[Any, ...]], tmp_path: Path, chosen: dict[str, str]
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=2\nb slots=2\nc slots=2\n")
    found = examine(LaunchOptions(hostfile=hostfile, master_addr="10.0.0.1", **chosen))  # type: ignore[arg-type]
    assert [(one.name, one.slots, one.is_remote) for one in found.machines] == [
        *(("a", 1, True), ("c", 2, True))
    ]
    assert [added["RANK"] for added in found.added] == ["0 to 0", "1 to 2"]
    ((command, _),) = world_of
    assert command[command.index("--include") + 1] == "a:1@c:0,1"


def test_slots_of_this_machine_are_chosen_without_a_hostfile(
    world_of: list[tuple[Any, ...]],
) -> None:
    options = LaunchOptions(include="localhost:0")
    (machine,) = examine(options).machines
    assert machine.slots == 1
    ((command, _),) = world_of
    assert command[-2:] == ["--include", "localhost:0"]
    with pytest.raises(UserError, match="no host 'a' is there: name some of localhost"):
        examine(replace(options, include="a"))


def test_wrong_numbers_and_slow_links_are_findings(
    world_of: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=2\nb slots=2\nc slots=2\n")
    links = [((0, 2), False, 9e9), ((0, 4), False, 9e9), ((2, 4), False, 1e9)]
    links += [((0, 1), True, 9e10), ((2, 3), True, 9e10), ((4, 5), True, 1e10)]
    told = {"sums_right": False, "rows_right": False, "links": [Link(*link) for link in links]}
    monkeypatch.setattr(examination, "launch", lambda *_: MEASURED | told)
    found = examine(LaunchOptions(hostfile=hostfile, master_addr="10.0.0.1"))
    assert found.num_problems == 2
    assert [(one.severity, one.node, one.text) for one in found.findings] == [
        ("problem", "", "all-reduce gives wrong numbers"),
        ("problem", "", "all-to-all gives wrong numbers"),
        ("warning", "b", "slow link: b and c: 1.00 GB/s each way, others 9.00"),
        ("warning", "c", "slow link: ranks 4 and 5 of c: 10.00 GB/s each way, others 90.00"),
    ]
    assert found.command.startswith("deepspeed --master_port 29500 --hostfile ")


def test_a_machine_whose_device_lacks_the_type_of_the_weights_is_a_problem(
    world_of: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"fp16": {"enabled": True}}
    config = write_config(tmp_path, make_corpus(tmp_path / "corpus"), changes=changes)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=1\nb slots=1\n")
    missing = {"fp16": "the CPU of b does not compute in fp16: use bf16.enabled=true"}
    told = {"links": [], "missing_types": [{}, missing]}
    monkeypatch.setattr(examination, "launch", lambda *_: MEASURED | told)
    options = LaunchOptions(config=config, hostfile=hostfile, master_addr="10.0.0.1")
    (finding,) = examine(options).findings
    assert finding[:3] == ("problem", "b", "GPUs")
    assert finding.text == "fp16.enabled=true, and the CPU of b does not compute in fp16"
    assert finding.remedy == "use bf16.enabled=true"
    settings = ("fp16.enabled=false", "bf16.enabled=true")  # the way out
    assert examine(replace(options, settings=settings)).findings == []


def test_ranks_that_cannot_work_together_are_a_problem(
    world_of: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MachineError("the launcher ended with status 1:\nValueError: x")

    monkeypatch.setattr(examination, "launch", fail)
    found = examine(LaunchOptions(num_gpus=1))
    (finding,) = found.findings
    assert finding.text == (
        "the ranks cannot work together: the launcher ended with status 1:\nValueError: x"
    )
    assert found.skipped == "the ranks failed before the measurement"


def test_what_a_failed_launcher_printed_is_handed_on(tmp_path: Path) -> None:
    program = tmp_path / "launcher.py"
    program.write_text("import sys\nprint('hello')\nprint('a: error: no way')\nsys.exit(5)\n")
    command = [sys.executable, str(program)]
    with pytest.raises(
        MachineError, match=r"^the launcher ended with status 5:\na: error: no way$"
    ):
        world.launch(command, Sizes(4, 4, 4), 5.0)
    program.write_text("import time\nprint('waiting', flush=True)\ntime.sleep(60)\n")
    with pytest.raises(MachineError, match=r"^the ranks were not done within 1 s:\nwaiting$"):
        world.launch(command, Sizes(4, 4, 4), -59.0)


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("echo welcome; echo denied >&2; exit 9", "denied"),
        ("exit 3", "it ended with status 3"),
        ("exec sleep 60", "no answer within 1 s"),
    ],
)
def test_a_machine_that_says_nothing_of_ours_is_a_problem(
    program: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(f"#!/bin/sh\n{program}\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("magnetar.engine.doctor.ssh_probe._SECONDS", 1.0)
    about = dict.fromkeys(("config", "data", "run_dir", "address", "port"))
    machine = Machine("a", 1, True)
    ask([machine], about, {})
    assert machine.problem == problem
    assert machine.command.endswith("a hostname")
