"""Runs that start from other weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.format import newest_checkpoint
from magnetar.engine.checkpoint.open_run import load_model
from magnetar.engine.checkpoint.starting_weights import require_starting_weights
from magnetar.engine.config.schema import load_config
from magnetar.models.weights.load_save import save_weights
from tests.ranks import ROOT
from tests.runs import environment, launch, make_corpus, records, write_config

ALONE = ("--set", "magnetar.model.moe.ep_size=1")
SHORT = {"magnetar.training.num_steps": 4, "magnetar.model.dropout": 0.0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def train_alone(config: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "magnetar.launchers.train", "--deepspeed_config", str(config)]
    return subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_run_goes_on_from_anothers_weights_with_its_router_frozen(
    tmp_path: Path, corpus: Path
) -> None:
    first = write_config(tmp_path, corpus, "first", SHORT)
    result = launch(first)
    assert result.returncode == 0, result.stdout
    source = newest_checkpoint(tmp_path / "first")
    learned = load_model(source)
    folder = tmp_path / "folder"
    save_weights(folder, learned.config, learned.state_dict())
    after = records(tmp_path / "first")[-1]["valid_loss"]

    tuning = {"magnetar.model.moe.frozen": "router", "magnetar.model.drop_path": 0.1}
    for name, init_from, ranks in (("run", tmp_path / "first", 2), ("weights", folder, 1)):
        changes = SHORT | tuning | {"magnetar.training.init_from": str(init_from)}
        config = write_config(tmp_path, corpus, name, changes)
        result = launch(config) if ranks == 2 else train_alone(config, *ALONE)
        assert result.returncode == 0, result.stdout
        before = records(tmp_path / name)[0]
        # The same weights, on other ranks too: float32 sums in another order.
        assert before["valid_loss"] == pytest.approx(after, abs=1e-5)
        tuned = load_model(newest_checkpoint(tmp_path / name)).state_dict()
        for key, tensor in learned.state_dict().items():
            if ".gate." in key:
                assert torch.equal(tuned[key], tensor), f"{key} was frozen"
            elif key.endswith((".w1", "qkv_proj.weight", "embedding.weight")):
                assert not torch.equal(tuned[key], tensor), f"{key} did not train"
    # Once it has a checkpoint of its own a run needs the others no more.
    for file in folder.iterdir():
        file.unlink()
    again = train_alone(config, *ALONE, "--set", "magnetar.training.num_steps=5")
    assert again.returncode == 0, again.stderr


def test_weights_of_another_model_are_refused_by_key(tmp_path: Path, corpus: Path) -> None:
    missing = write_config(tmp_path, corpus, "a", {"magnetar.training.init_from": str(tmp_path)})
    result = train_alone(missing, *ALONE)
    assert result.returncode == 2
    assert f"{tmp_path}: holds no complete checkpoint (looked for" in result.stderr
    assert "and no model.safetensors" in result.stderr

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").write_text("")
    config = write_config(tmp_path, corpus, "b", {"magnetar.training.init_from": str(folder)})
    result = train_alone(config, *ALONE)
    assert result.returncode == 2
    assert (
        f"{folder / 'config.json'} is missing, so {folder} is not a folder of weights"
        in result.stderr
    )

    resolved = subprocess.run(
        [sys.executable, "-m", "magnetar.launchers.config", "check", str(config)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    model = json.loads(resolved)["magnetar"]["model"]
    model |= {"norm": "deepnorm", "dropout": 0.3, "vocab_size": 300}
    model["moe"] |= {"top_k": 1, "ep_size": 1}
    (folder / "config.json").write_text(json.dumps({"model": model}))
    result = train_alone(config, *ALONE)
    assert result.returncode == 2
    assert "magnetar.model.moe.top_k: 1 there, 2 here" in result.stderr
    assert "magnetar.model.norm: deepnorm there, subln here" in result.stderr
    assert "dropout" not in result.stderr


def test_weights_saved_before_a_key_existed_have_its_default(tmp_path: Path, corpus: Path) -> None:
    source = tmp_path / "folder"
    changes = {"magnetar.training.init_from": str(source), "magnetar.model.vocab_size": 300}
    config = write_config(tmp_path, corpus, "run", changes)
    run = load_config(config, [], 2)
    saved = run.model.model_dump(mode="json")
    del saved["norm_eps"], saved["qk_norm"], saved["moe"]["normalize_weights"]
    source.mkdir()
    (source / "model.safetensors").write_text("")
    (source / "config.json").write_text(json.dumps({"model": saved}))
    require_starting_weights(run)
    other = load_config(config, ["magnetar.model.qk_norm=true"], 2)
    with pytest.raises(UserError, match=r"model\.qk_norm: False there, True here"):
        require_starting_weights(other)


def test_weights_of_another_vocabulary_of_the_same_size_are_refused(
    tmp_path: Path, corpus: Path
) -> None:
    source = tmp_path / "folder"
    changes = {"magnetar.training.init_from": str(source), "magnetar.model.vocab_size": 300}
    config = write_config(tmp_path, corpus, "run", changes)
    run = load_config(config)
    source.mkdir()
    (source / "model.safetensors").write_text("")
    about = {"model": run.model.model_dump(mode="json")}
    (source / "config.json").write_text(json.dumps(about))
    require_starting_weights(run, "a" * 64)  # imported weights know of no vocabulary
    about["run"] = {
        "step": 4,
        "config": run.to_dict(),
        "tokenizer_fingerprint": "b" * 64,
        "data_fingerprint": "",
        "trainer": {},
        "optimizer": {"schedule_step": 4, "skipped_steps": 0, "loss_scaler": {}},
    }
    (source / "config.json").write_text(json.dumps(about))
    require_starting_weights(run, "b" * 64)
    rule = r"of another vocabulary \(sha256 b{12}\) than that of .*\(a{12}\).*--tokenizer"
    with pytest.raises(UserError, match=rule):
        require_starting_weights(run, "a" * 64)
