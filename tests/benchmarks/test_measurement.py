"""What every benchmark refuses, and where."""

import importlib
from pathlib import Path

import pytest

from tests.benchmarks import TINY
from tests.ranks import ROOT

CONFIGS = ROOT / "ds_configs"
QUICK = [*TINY, "--config", str(CONFIGS / "quickstart.json"), "--batch", "4"]
NO_FILE = "nowhere.json does not exist: name a file that --out has written"
STEP, SPREAD = "train_step", "expert_parallel"


@pytest.mark.parametrize(
    ("benchmark", "arguments", "message"),
    [
        ("moe_layer", "--out a.txt", "--out a.txt must end in .json: such as --out a.json"),
        (STEP, "--out a.txt", "--out a.txt must end in .json: such as --out a.json"),
        (SPREAD, "--out a.txt", "--out a.txt must end in .json: such as --out a.json"),
        ("scaling", "--out a.txt", "--out a.txt must end in .json: such as --out a.json"),
        ("moe_layer", "--draw nowhere.json", NO_FILE),
        (STEP, "--draw nowhere.json", NO_FILE),
        ("scaling", "--draw nowhere.json", NO_FILE),
        ("moe_layer", "--only dense,nobody", "--only dense,nobody takes names with commas"),
        ("moe_layer", "--profile dense,ours", "takes one name, of: dense, dense_compiled"),
        (STEP, "--only dense,nobody", "takes names with commas between them, of: dense_compiled"),
        (STEP, "--profile dense,ours", "--profile dense,ours takes one name, of: dense_compiled"),
        ("moe_layer", "--experts 6 --tokens 64", "--experts 6 must be a multiple of --top-k 2"),
        ("moe_layer", "--experts 3", "--experts 3 must be a multiple of --top-k 2"),
        ("moe_layer", "--experts 0", "argument --experts"),
        ("moe_layer", "--experts 4,-1", "argument --experts"),
        ("moe_layer", "--experts four", "argument --experts"),
        (STEP, [*QUICK, "--data", "nowhere"], "prepared folder nowhere does not exist: run"),
        (STEP, f"--config {CONFIGS / 'lm_dense.json'}", "the config's model is dense: name"),
        (STEP, f"--config {CONFIGS / 'mlm_xmoe.json'}", "of architecture 'encoder': name a config"),
        (
            STEP,
            [*QUICK, "--experts", "1"],
            "this cannot be measured:\n  magnetar.model.moe.top_k=2",
        ),
        (STEP, [*QUICK, "--micro-batch", "3"], "this cannot be measured:\n  train_batch_size=4"),
        (SPREAD, "--gpus 1 --out a.json", "--gpus 1 shares nothing: use 2 or more"),
        (
            SPREAD,
            f"--cpu --config {CONFIGS / 'quickstart.json'} --batch 3 --out a.json",
            "this cannot be measured:\n  train_batch_size=3, train_micro_batch_size_per_gpu=2",
        ),
        ("scaling", "--cpu", "--out is missing: name a file for the results"),
        ("scaling", "--cpu --gpus 3 --out a.json", "--gpus 3: experts are halved and halved"),
        ("scaling", "--cpu --gpus 1 --out a.json", "so use 2, 4, 8 or 16"),
        ("scaling", "--out a.json --only paper,speed", "'speed' is none of scaling, paper"),
        ("scaling", "--cpu --out a.json --set magnetar.model.d_modl=3", "magnetar.model.d_modl"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_message(
    benchmark: str,
    arguments: str | list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # put back afterwards, whatever --cpu does
    monkeypatch.chdir(tmp_path)
    words = arguments.split() if isinstance(arguments, str) else arguments
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{benchmark}").main(words)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"benchmark": "other"}', '{"benchmark": "moe_layer", "results": []}']
)
def test_only_results_are_drawn(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("benchmarks.moe_layer").main(
            ["--draw", str(tmp_path / "other.json")]
        )
    assert ended.value.code == 2
    assert "other.json is no result of this benchmark: name a file" in capsys.readouterr().err
