"""magnetar config."""

import json
from pathlib import Path

import pytest

from magnetar.launchers.config import main
from tests.ranks import ROOT

EXAMPLE = str(ROOT / "tests" / "engine" / "config" / "example.json")


def test_check_prints_the_resolved_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", EXAMPLE, "--set", "magnetar.model.d_ff=64", "--world-size", "2"]) == 0
    resolved = json.loads(capsys.readouterr().out)
    assert resolved["magnetar"]["model"]["d_ff"] == 64
    assert resolved["train_micro_batch_size_per_gpu"] == 8


def test_check_exits_2_with_the_problems(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", EXAMPLE, "--set", "magnetar.model.num_layrs=64"])
    assert ended.value.code == 2
    assert "did you mean magnetar.model.num_layers?" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", ["0", "-1", "two"])
def test_check_wants_a_number_of_ranks(ranks: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", EXAMPLE, f"--world-size={ranks}"])
    assert ended.value.code == 2
    assert f"'{ranks}' is not a number of ranks: use 1 or more" in capsys.readouterr().err


def test_docs_writes_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docs", "--check", "--folder", str(tmp_path)]) == 1
    assert "README.md and schema.json out of date" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(["docs", "--folder", str(tmp_path)]) == 0
    assert main(["docs", "--check", "--folder", str(tmp_path)]) == 0
    assert main(["docs", "--check"]) == 0
