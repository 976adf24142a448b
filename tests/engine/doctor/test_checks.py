"""What is concluded from machines' reports; each finding has a report that brings it about."""

from typing import Any

import pytest

from magnetar.engine.doctor.checks import CHECKS, GIB, Finding, Wanted, findings
from magnetar.engine.doctor.ssh_probe import Machine

WANTED = Wanted(
    config="run.json",
    data="prepared",
    run_dir="runs/a",
    checkpoint_bytes=GIB,
    compiles="FusedAdam",
    address="10.0.0.1",
)
VERSIONS = {"python": "3.12.1", "torch": "2.13.0", "nccl": "2.30"}
LEFT = {"path": "/c/lock", "seconds": 120.0, "holder": None}
GPU = {"name": "H100", "total": 80.0 * GIB, "used": 0.0}
OTHER = {"code|sha256": "2"}


def report() -> dict[str, Any]:
    """Of a machine with nothing wrong."""
    return {
        "failed": {},
        "versions": VERSIONS | {"triton": "3.6.0"},
        "code": {"folder": "/code", "commit": "abc", "files": 9, "sha256": "1"},
        "config": "1",
        "data": "1",
        "disk": {"folder": "/runs", "free": 3 * GIB, "problem": ""},
        "gpus": {
            "driver": "580.1",
            "found": [GPU | {"id": "a"}, GPU | {"id": "b"}],
            "processes": [],
        },
        "machine": {
            "cores": 8,
            "shared_memory": 8 * GIB,
            "programs": {"ninja": "/bin/ninja", "c++": "/bin/c++"},
            "variables": {},
        },
        "locks": [],
        "port": "",
    }


def machines(changes: dict[str, Any] | None = None, num: int = 3) -> list[Machine]:
    """Machines n0, n1, ...; in the report of the last, some keys have other values."""
    marks = [f"m{index}" for index in range(num)]
    found = [
        Machine(f"n{i}", 2, True, report(), marks=list(marks), mark=marks[i]) for i in range(num)
    ]
    for path, value in (changes or {}).items():
        *keys, last = path.split("|")
        section = found[-1].report
        for key in keys:
            section = section[key]
        section[last] = value
    return found


def only(found: list[Finding]) -> Finding:
    assert len(found) == 1, found
    assert found[0].check in CHECKS
    assert found[0].remedy
    return found[0]


def test_machines_in_order_bring_no_finding() -> None:
    assert findings(machines(), WANTED) == []
    assert findings(machines(), Wanted()) == []


PROBLEMS: list[tuple[str, str, dict[str, Any]]] = [
    ("code", "other sources than on n0: commit def against abc", OTHER | {"code|commit": "def"}),
    ("code", "of the same commit", OTHER),
    ("code", "no Magnetar in /code", {"code|files": 0}),
    ("versions", "torch 2.11.0, and 2.13.0 on", {"versions|torch": "2.11.0"}),
    ("versions", "python 3.11.7, and", {"versions|python": "3.11.7"}),
    ("versions", "nccl 2.29, and", {"versions|nccl": "2.29"}),
    ("versions", "mpi4py 4.1, and none on", {"versions|mpi4py": "4.1"}),
    ("versions", "triton none, and 3.6.0", {"versions": VERSIONS}),
    ("JSON", "run.json is not there", {"config": ""}),
    ("JSON", "run.json has other content than on n0", {"config": "2"}),
    ("data", "prepared is not there", {"data": ""}),
    ("data", "prepared holds other data than on n0", {"data": "2"}),
    ("disk", "/runs cannot be written to: Read-only", {"disk|problem": "Read-only"}),
    ("disk", "1.0 GiB are free at /runs, and a checkpoint takes 1.0", {"disk|free": GIB}),
    ("GPUs", "slots=2, and 1 GPUs", {"gpus|found": [GPU | {"id": "a"}]}),
    ("JIT", "no ninja, with which DeepSpeed compiles FusedAdam", {"machine|programs|ninja": None}),
    ("JIT", "no c++,", {"machine|programs|c++": None}),
    ("JIT", "TORCH_CUDA_ARCH_LIST=9.0a", {"machine|variables|TORCH_CUDA_ARCH_LIST": "9.0a"}),
    ("JIT", "/c/lock is 2 minutes old and no process holds it", {"locks": [dict(LEFT)]}),
    ("port", "10.0.0.1, port 29500: in use", {"port": "in use"}),
    ("port", "not an address of this machine", {"port": "not an address of this machine"}),
]
WARNINGS: list[tuple[str, str, dict[str, Any]]] = [
    ("versions", "driver 570, and 580.1", {"gpus|driver": "570"}),
    (
        *("GPUs", "GPU 1 has 9.0 of 80 GiB in use by process 7 (python)"),
        {
            "gpus|found": [GPU | {"id": "a"}, GPU | {"id": "b", "used": 9.0 * GIB}],
            "gpus|processes": [["b", "7", "python"]],
        },
    ),
    ("GPUs", "64 MiB are free in /dev/shm", {"machine|shared_memory": 2**26}),
    ("GPUs", "A100, and H100 on n0", {"gpus|found": [GPU | {"name": "A100"}] * 2}),
    ("JIT", "/c/lock: process 7 compiles", {"locks": [LEFT | {"holder": 7}]}),
    ("disk", "OSError: no", {"disk": None, "failed": {"disk": "OSError: no"}}),
]
CASES = [("problem", *case) for case in PROBLEMS] + [("warning", *case) for case in WARNINGS]


@pytest.mark.parametrize(
    ("severity", "check", "text", "changes"), CASES, ids=[case[2][:40] for case in CASES]
)
def test_each_fault_is_found_where_it_is_and_nowhere_else(
    severity: str, check: str, text: str, changes: dict[str, Any]
) -> None:
    finding = only(findings(machines(changes), WANTED))
    assert (finding.severity, finding.node, finding.check) == (severity, "n2", check)
    assert text in finding.text


def test_of_two_machines_that_differ_the_first_counts() -> None:
    found = only(findings(machines(OTHER, num=2), WANTED))
    assert found.node == "n1"


def test_gpus_that_no_machine_has_are_not_missed() -> None:
    found = machines()
    for machine in found:
        machine.report["gpus"] = {"driver": "", "found": [], "processes": []}
    assert findings(found, WANTED) == []
    found[0].report["gpus"] = report()["gpus"]
    assert {finding.node for finding in findings(found, WANTED)} >= {"n1", "n2"}


def test_a_lock_that_another_machine_holds_is_not_stale() -> None:
    found = machines()
    for machine in found:
        machine.report["locks"] = [dict(LEFT)]
    assert [one.severity for one in findings(found, WANTED)] == ["problem"] * 3
    found[1].report["locks"][0]["holder"] = 7
    texts = [one.text for one in findings(found, WANTED)]
    assert "process of another machine compiles" in texts[0]
    assert "process 7 compiles" in texts[1]
    assert [one.severity for one in findings(found, WANTED)] == ["warning"] * 3


def test_folders_that_are_not_one_are_named_on_both_sides() -> None:
    found = machines()
    found[2].marks = ["m2"]
    for machine in found[:2]:
        machine.marks = ["m0", "m1"]
    texts = {one.node: one.text for one in findings(found, WANTED)}
    assert texts["n2"] == "/runs is not the folder of that name on n0, n1"
    assert texts["n0"] == texts["n1"] == "/runs is not the folder of that name on n2"


@pytest.mark.parametrize(
    ("clock", "severity", "text"),
    [(-2.0, "warning", "2.0 s behind"), (70.0, "problem", "70.0 s ahead of"), (0.5, None, "")],
)
def test_clocks_that_differ_are_found(clock: float, severity: str | None, text: str) -> None:
    found = machines()
    found[1].clock = clock
    told = findings(found, WANTED)
    if severity is None:
        assert told == []
    else:
        assert only(told).severity == severity
        assert text in only(told).text


def test_a_machine_that_does_not_answer_says_what_to_try() -> None:
    found = machines()
    found[1] = Machine("n1", 2, True, problem="No route to host", command="ssh n1 hostname")
    finding = only(findings(found, WANTED))
    assert finding[:4] == ("problem", "n1", "reach", "No route to host")
    assert "`ssh n1 hostname`" in finding.remedy
    found[1].command = ""
    assert "start the interpreter" in only(findings(found, WANTED)).remedy
