"""The benchmark of rows between nodes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import exchange
from tests.ranks import ROOT
from tests.runs import environment


@pytest.mark.slow
def test_ranks_of_named_nodes_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.exchange", "--here", "--slots", "2"]
    command += ["--rows", "8", "--rounds", "1", "--warm-up", "1", "--out", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["nodes"] == [0, 0, 2, 2]
    flat, by_nodes = found["results"]
    assert (flat["messages_between"], by_nodes["messages_between"]) == (16, 8)
    assert flat["bytes_between"] == by_nodes["bytes_between"]
    assert "| 8 | 2, 4 |" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--slots", "1", "--out", "x.json"], "--slots 1 has no inside of a node"),
        (["--out", "x.txt"], "--out x.txt must end in .json"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        exchange.main(arguments)
    assert caught.value.code == 2
    assert shown in capsys.readouterr().err
