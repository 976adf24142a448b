import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.errors import UserError
from engine.checkpoint import (
    MANIFEST,
    Checkpoint,
    check_fits,
    complete_checkpoints,
    load_checkpoint,
    load_model,
    newest_checkpoint,
)
from engine.config import RunConfig, check_config
from models.transformer import empty_model
from tests.engine.programs import BASE, with_keys


def config(**changes: Any) -> RunConfig:
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    result, problems = check_config(with_keys(BASE, keys), 2)
    assert result is not None, problems
    return result


def write_checkpoint(run_dir: Path, step: int, **manifest: Any) -> Path:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "weights.pt").write_bytes(b"12345")
    (folder / MANIFEST).write_text(
        json.dumps({"step": step, "files": {"weights.pt": 5}} | manifest)
    )
    return folder


def test_checkpoints_are_found_oldest_first(tmp_path: Path) -> None:
    for step in (200, 90, 1000):
        write_checkpoint(tmp_path, step)
    assert [found.step for found in complete_checkpoints(tmp_path)] == [90, 200, 1000]


def test_what_is_not_whole_is_not_a_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    (write_checkpoint(tmp_path, 2) / "weights.pt").write_bytes(b"123")
    (write_checkpoint(tmp_path, 3) / "weights.pt").unlink()
    (write_checkpoint(tmp_path, 4) / MANIFEST).unlink()
    write_checkpoint(tmp_path, 5).rename(tmp_path / "checkpoints" / "partial_00000005")
    (write_checkpoint(tmp_path, 6) / MANIFEST).write_text('{"step": 6, "fi')
    assert newest_checkpoint(tmp_path).step == 1


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        newest_checkpoint(tmp_path)


@pytest.fixture
def saved() -> Checkpoint:
    manifest = {
        "step": 5,
        "layout": {"world_size": 2, "ep_size": 1, "zero_stage": 0},
        "config": config().to_dict(),
        "data_fingerprint": "a" * 64,
    }
    return Checkpoint(Path("runs/x/checkpoints/step_00000005"), manifest)


SAME_DATA: Any = SimpleNamespace(fingerprint="a" * 64)


def test_the_same_model_layout_and_data_fit(saved: Checkpoint) -> None:
    check_fits(saved, config(), SAME_DATA, 2)


def test_another_model_is_refused_key_by_key(saved: Checkpoint) -> None:
    with pytest.raises(UserError, match="another model: d_ff 64 there and 32 here") as refused:
        check_fits(saved, config(magnetar__model__d_ff=32), SAME_DATA, 2)
    assert "step_00000005" in str(refused.value)
    assert "training.run_dir" in str(refused.value)


def test_a_model_saved_before_keys_existed_has_their_defaults(saved: Checkpoint) -> None:
    model = saved.manifest["config"]["magnetar"]["model"]
    del model["drop_path"], model["norm_eps"], model["attention_positions"]
    check_fits(saved, config(), SAME_DATA, 2)
    with pytest.raises(
        UserError, match=r"another model: drop_path 0\.0 there and 0\.1 here: go on"
    ):
        check_fits(saved, config(magnetar__model__drop_path=0.1), SAME_DATA, 2)


def test_a_model_with_a_key_given_up_since_is_refused_by_that_key(saved: Checkpoint) -> None:
    saved.manifest["config"]["magnetar"]["model"]["given_up"] = 1
    with pytest.raises(UserError, match="another model: given_up 1 there and absent here"):
        check_fits(saved, config(), SAME_DATA, 2)


def test_another_number_of_ranks_is_refused(saved: Checkpoint) -> None:
    with pytest.raises(UserError, match="another layout: world_size 2 there and 1 here"):
        check_fits(saved, config(), SAME_DATA, 1)


def test_other_data_is_refused(saved: Checkpoint) -> None:
    other: Any = SimpleNamespace(fingerprint="b" * 64)
    with pytest.raises(
        UserError, match="another data set: fingerprint aaaaaaaaaaaa there and bbbb"
    ):
        check_fits(saved, config(), other, 2)


def test_a_damaged_checkpoint_is_named_by_its_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 7)
    checkpoint = newest_checkpoint(tmp_path)
    (folder / "weights.pt").write_bytes(b"123")
    with pytest.raises(UserError, match=r"weights\.pt: missing or not of the size.*another"):
        load_model(checkpoint)


def save_tensors(run_dir: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    folder = write_checkpoint(run_dir, 3, config=config(magnetar__model__moe=None).to_dict())
    torch.save({"module": tensors}, folder / "mp_rank_00_model_states.pt")
    return newest_checkpoint(run_dir)


def refusal(action: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as refused:
        action(*arguments)
    assert refused.value.on_every_rank
    return str(refused.value)


def test_tensors_that_another_version_named_or_ordered_are_refused(tmp_path: Path) -> None:
    model = empty_model(config(magnetar__model__moe=None).model)
    tensors = model.state_dict()
    engine = SimpleNamespace(module=model)
    load_model(save_tensors(tmp_path / "same", tensors))

    first = next(iter(tensors))
    renamed = {f"old_{name}" * (name == first) or name: value for name, value in tensors.items()}
    saved = save_tensors(tmp_path / "renamed", renamed)
    for message in (refusal(load_model, saved), refusal(load_checkpoint, engine, saved)):
        assert "step_00000003 was saved by a version with another model inside" in message
        assert f"1 missing, the first is {first}; 1 unexpected, the first is old_{first}" in message
        assert "train anew in another training.run_dir" in message

    saved = save_tensors(tmp_path / "reordered", dict(reversed(tensors.items())))
    assert "the tensors are in another order" in refusal(load_checkpoint, engine, saved)
