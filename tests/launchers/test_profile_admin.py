"""From a profile through training to a folded model, as a user does it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from magnetar.engine.checkpoint.format import newest_checkpoint
from magnetar.engine.checkpoint.open_run import load_model
from magnetar.models.weights.load_save import load_model as load_folder
from tests.ranks import ROOT
from tests.runs import environment, launch, launcher_command, make_corpus, write_config

ADMIN = {"magnetar.model.norm": "admin", "magnetar.model.dropout": 0.0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )


def profile(config: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess:
    if ranks == 1:
        program = [sys.executable, "-m", "magnetar.launchers.profile_admin", "--deepspeed_config"]
        return run(*program, str(config), *arguments)
    command = [
        part.replace("magnetar.launchers.train", "magnetar.launchers.profile_admin")
        for part in launcher_command(config, *arguments)
    ]
    return run(*command)


def train_alone(config: Path, *arguments: str) -> subprocess.CompletedProcess:
    program = [sys.executable, "-m", "magnetar.launchers.train", "--deepspeed_config", str(config)]
    return run(*program, *arguments)


@pytest.mark.slow
def test_a_profile_is_made_trained_from_and_folded_away(tmp_path: Path, corpus: Path) -> None:
    config = write_config(tmp_path, corpus, changes=ADMIN | {"magnetar.training.num_steps": 4})
    path = tmp_path / "run" / "admin_profile.json"
    found = {}
    for ranks in (1, 2):
        ep_size = f"magnetar.model.moe.ep_size={ranks}"
        result = profile(config, "--set", ep_size, ranks=ranks)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "omega of the decoder's sublayers: 1.000" in result.stdout
        found[ranks] = json.loads(path.read_text())["variances"]["decoder"]
    assert len(found[1]) == 1 + 2 * 2
    # The same batch in two halves: float32 outputs, double sums.
    assert found[2] == pytest.approx(found[1], rel=1e-5)

    result = launch(config)
    assert result.returncode == 0, result.stdout
    refused = profile(config, "--set", "magnetar.model.moe.ep_size=1")
    assert refused.returncode == 2
    assert "already holds a run, which goes on from its checkpoints" in refused.stderr

    # The checkpoints hold the omegas: the profile is needed no more.
    path.unlink()
    result = launch(config, "--set", "magnetar.training.num_steps=5")
    assert result.returncode == 0, result.stdout

    out = tmp_path / "folded"
    convert = [sys.executable, "-m", "magnetar.launchers.convert", "fold-admin"]
    result = run(*convert, str(tmp_path / "run"), "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert 'norm="post"' in result.stdout
    model, folded = load_model(newest_checkpoint(tmp_path / "run")).eval(), load_folder(out)
    omegas = [p for name, p in model.named_parameters() if name.endswith("omega")]
    assert omegas[0].std() > 0  # it trained
    assert omegas[-1].mean().item() != pytest.approx(1.0, abs=1e-2)  # it started from the profile
    tokens = torch.arange(32).view(1, 32)
    with torch.no_grad():
        expected = model(tokens).logits
        # Logits around 1; a gain that was multiplied before is now multiplied after a sum.
        torch.testing.assert_close(folded(tokens).logits, expected, rtol=0, atol=1e-5)
    again = run(*convert, str(out), "--out", str(tmp_path / "twice"))
    assert again.returncode == 2
    assert "norm='post' has no omega to fold" in again.stderr
    (tmp_path / "empty").mkdir()
    empty = run(*convert, str(tmp_path / "empty"), "--out", str(tmp_path / "twice"))
    assert empty.returncode == 2
    assert "holds no complete checkpoint (looked for checkpoints/step_*), no " in empty.stderr


def test_an_admin_model_without_a_profile_does_not_start(tmp_path: Path, corpus: Path) -> None:
    config = write_config(tmp_path, corpus, changes=ADMIN | {"magnetar.model.moe": None})
    result = train_alone(config)
    assert result.returncode == 2
    assert "magnetar.model.norm='admin' starts from a profile" in result.stderr
    assert "--module magnetar.launchers.profile_admin" in result.stderr
    folder = tmp_path / "run"
    folder.mkdir()
    good = {"seed": 1, "model": {}, "data": {}, "variances": {"decoder": [1.0, 2.0]}}
    for content, message in (
        (b"{", "is no profile (the whole file: Invalid JSON"),
        (b"\xff\xfe", "is no profile"),
        (b"[]", "is no profile"),
        (
            json.dumps(good | {"variances": "wide"}).encode(),
            'is no profile (variances="wide": it should be an object',
        ),
        (
            json.dumps(good | {"seed": 7}).encode(),
            "another seed and another model and another data",
        ),
    ):
        (folder / "admin_profile.json").write_bytes(content)
        result = train_alone(config)
        assert (result.returncode, "Traceback" in result.stderr) == (2, False)
        assert message in result.stderr


def test_a_profile_of_too_few_sublayers_does_not_start(tmp_path: Path, corpus: Path) -> None:
    config = write_config(tmp_path, corpus, changes=ADMIN | {"magnetar.model.moe": None})
    assert profile(config).returncode == 0
    path = tmp_path / "run" / "admin_profile.json"
    made = json.loads(path.read_text())
    made["variances"]["decoder"].pop()
    path.write_text(json.dumps(made))
    result = train_alone(config)
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert "variances: must be {'decoder': 5} numbers for this model" in result.stderr


def test_a_model_of_another_norm_needs_no_profile(tmp_path: Path, corpus: Path) -> None:
    config = write_config(tmp_path, corpus, changes={"magnetar.model.moe": None})
    result = profile(config)
    assert result.returncode == 2
    assert "magnetar.model.norm='subln' needs no profile: start magnetar train" in result.stderr
