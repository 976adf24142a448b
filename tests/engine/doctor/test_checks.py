"""What is concluded from machines' reports; each finding has a report that brings it about."""

from collections.abc import Callable
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


def report() -> dict[str, Any]:
    """Of a machine with nothing wrong."""
    gpu = {"name": "H100", "total": 80.0 * GIB, "used": 0.0}
    return {
        "failed": {},
        "versions": {"python": "3.12.1", "torch": "2.13.0", "nccl": "2.30", "triton": "3.6.0"},
        "code": {"folder": "/code", "commit": "abc", "files": 9, "sha256": "1"},
        "config": "1",
        "data": "1",
        "disk": {"folder": "/runs", "free": 3 * GIB, "problem": ""},
        "gpus": {
            "driver": "580.1",
            "found": [gpu | {"id": "a"}, gpu | {"id": "b"}],
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


def machines(change: Callable[[dict[str, Any]], Any] | None = None, num: int = 3) -> list[Machine]:
    """Machines n0, n1, ..., the last of them changed."""
    marks = [f"m{index}" for index in range(num)]
    found = [
        Machine(f"n{index}", 2, True, report(), marks=list(marks), mark=marks[index])
        for index in range(num)
    ]
    if change is not None:
        change(found[-1].report)
    return found


def only(found: list[Finding]) -> Finding:
    assert len(found) == 1, found
    assert found[0].check in CHECKS
    assert found[0].remedy
    return found[0]


LOCK = {"path": "/c/lock", "seconds": 120.0}


def test_machines_in_order_bring_no_finding() -> None:
    assert findings(machines(), WANTED) == []
    assert findings(machines(), Wanted()) == []


CASES: list[tuple[str, str, str, Callable[[dict[str, Any]], Any]]] = [
    (
        *("problem", "code", "other sources than on n0: commit def against abc"),
        lambda r: r["code"].update(sha256="2", commit="def"),
    ),
    ("problem", "code", "of the same commit", lambda r: r["code"].update(sha256="2")),
    ("problem", "code", "no Magnetar in /code", lambda r: r["code"].update(files=0)),
    (
        *("problem", "versions", "torch 2.11.0, and 2.13.0 on"),
        lambda r: r["versions"].update(torch="2.11.0"),
    ),
    ("problem", "versions", "python 3.11.7, and", lambda r: r["versions"].update(python="3.11.7")),
    ("problem", "versions", "nccl 2.29, and", lambda r: r["versions"].update(nccl="2.29")),
    (
        *("problem", "versions", "mpi4py 4.1, and none on"),
        lambda r: r["versions"].update(mpi4py="4.1"),
    ),
    ("problem", "versions", "triton none, and 3.6.0", lambda r: r["versions"].pop("triton")),
    ("warning", "versions", "driver 570, and 580.1", lambda r: r["gpus"].update(driver="570")),
    ("problem", "JSON", "run.json is not there", lambda r: r.update(config="")),
    ("problem", "JSON", "run.json has other content than on n0", lambda r: r.update(config="2")),
    ("problem", "data", "prepared is not there", lambda r: r.update(data="")),
    ("problem", "data", "prepared holds other data than on n0", lambda r: r.update(data="2")),
    (
        *("problem", "disk", "/runs cannot be written to: Read-only"),
        lambda r: r["disk"].update(problem="Read-only"),
    ),
    (
        *("problem", "disk", "1.0 GiB are free at /runs, and a checkpoint takes 1.0"),
        lambda r: r["disk"].update(free=GIB),
    ),
    ("problem", "GPUs", "slots=2, and 1 GPUs", lambda r: r["gpus"]["found"].pop()),
    (
        *("warning", "GPUs", "GPU 1 has 9.0 of 80 GiB in use by process 7 (python)"),
        lambda r: (
            r["gpus"]["found"][1].update(used=9.0 * GIB),
            r["gpus"]["processes"].append(["b", "7", "python"]),
        ),
    ),
    (
        *("warning", "GPUs", "64 MiB are free in /dev/shm"),
        lambda r: r["machine"].update(shared_memory=2**26),
    ),
    (
        *("warning", "GPUs", "A100, and H100 on n0"),
        lambda r: [g.update(name="A100") for g in r["gpus"]["found"]],
    ),
    (
        *("problem", "JIT", "no ninja, with which DeepSpeed compiles FusedAdam"),
        lambda r: r["machine"]["programs"].update(ninja=None),
    ),
    ("problem", "JIT", "no c++,", lambda r: r["machine"]["programs"].update({"c++": None})),
    (
        *("problem", "JIT", "TORCH_CUDA_ARCH_LIST=9.0a"),
        lambda r: r["machine"]["variables"].update(TORCH_CUDA_ARCH_LIST="9.0a"),
    ),
    (
        *("problem", "JIT", "/c/lock is 2 minutes old and no process holds it"),
        lambda r: r["locks"].append(LOCK | {"holder": None}),
    ),
    (
        *("warning", "JIT", "/c/lock: process 7 compiles"),
        lambda r: r["locks"].append(LOCK | {"holder": 7}),
    ),
    ("problem", "port", "10.0.0.1, port 29500: in use", lambda r: r.update(port="in use")),
    (
        *("problem", "port", "not an address of this machine"),
        lambda r: r.update(port="not an address of this machine"),
    ),
    (
        *("warning", "disk", "OSError: no"),
        lambda r: (r.update(disk=None), r["failed"].update(disk="OSError: no")),
    ),
]


@pytest.mark.parametrize(
    ("severity", "check", "text", "change"), CASES, ids=[case[2][:40] for case in CASES]
)
def test_each_fault_is_found_where_it_is_and_nowhere_else(
    severity: str, check: str, text: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    finding = only(findings(machines(change), WANTED))
    assert (finding.severity, finding.node, finding.check) == (severity, "n2", check)
    assert text in finding.text


def test_of_two_machines_that_differ_the_first_counts() -> None:
    found = only(findings(machines(lambda r: r["code"].update(sha256="2"), num=2), WANTED))
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
        machine.report["locks"] = [LOCK | {"holder": None}]
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
