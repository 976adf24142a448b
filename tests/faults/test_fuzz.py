"""Broken JSONs and files end in a message or a run; else the command notices."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

from magnetar.engine.config.schema import check_config
from tests.faults.bad_launcher import EXPECTED
from tests.faults.fuzz import Outcome, summary, table
from tests.faults.fuzz_cases import CONFIGS, TRAIN, Case, shrunk
from tests.faults.mutations import as_members, broken_jsons, damaged, drawn, encoded
from tests.ranks import ROOT
from tests.runs import environment


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_whatever_is_broken_ends_in_a_message_or_a_run(tmp_path: Path) -> None:
    out = tmp_path / "fuzz.json"
    number = ("--configs", "60", "--files", "20", "--seed", "7")
    done = run("-m", "tests.faults.fuzz", *number, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["failures"] == []
    total: dict[str, int] = {}
    for counts in found["cases"].values():
        for verdict, number in counts.items():
            total[verdict] = total.get(verdict, 0) + number
    assert sum(total.values()) >= 75
    assert total["message"] > total["trained"] > 0
    assert found["different_messages"] > 20


@pytest.mark.slow
def test_what_none_may_do_is_noticed() -> None:
    program = "import json; from tests.faults.bad_launcher import verdicts as found; "
    program += "print(json.dumps(found()))"
    done = run("-c", program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout) == EXPECTED


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_every_config_that_is_broken_was_sound(path: Path) -> None:
    if path.name == "schema.json":
        return
    config, problems = check_config(shrunk(json.loads(path.read_text())), 1)
    assert config is not None, problems


def test_the_same_seed_breaks_alike() -> None:
    start = json.loads((CONFIGS / "quickstart.json").read_text())
    strategies: dict[str, st.SearchStrategy] = {
        "json": broken_jsons(start, {"bf16.enabled": [True]}, ["auto"]),
        "bytes": damaged(b"0123456789", [b"other"]),
    }
    cases = drawn(strategies, 101, of_seed=3)
    assert cases == drawn(strategies, 101, of_seed=3)
    assert cases != drawn(strategies, 101, of_seed=4)
    assert [case.name for case in cases].count("json") == 51
    sound = encoded(as_members(start)).encode()
    assert json.loads(sound) == start
    assert sum(case.value != sound for case in cases) > 95


def test_a_failure_is_in_the_table_and_can_be_repeated() -> None:
    cases = [
        Case("a.json", TRAIN, [], {}),
        Case("a.json", TRAIN, [], {}),
    ]
    outcomes = [Outcome("message", "error: bad 3", 0.5), Outcome("traceback", "Traceback", 1.0)]
    found = summary(cases, outcomes)
    assert found["cases"] == {"a.json": {"message": 1, "failed": 1}}
    assert [failure["case"] for failure in found["failures"]] == [1]
    assert "| all | 2 | 1 | 0 | 0 | 0 | 1 |" in table(found["cases"])
