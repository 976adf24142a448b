"""Whether a checkpoint fits a run, and its model without an engine.

test_resume.py saves and continues with real engines."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.format import Checkpoint, newest_checkpoint
from magnetar.engine.checkpoint.open_run import load_model
from magnetar.engine.checkpoint.save_load import check_fits, load_checkpoint
from tests.convert.checkpoints import run_config, small_model, write_checkpoint

SAME_DATA: Any = SimpleNamespace(fingerprint="b" * 64)


def config(tmp_path: Path, **changes: Any) -> Any:
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    return run_config(tmp_path, changes=keys)


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoint:
    return write_checkpoint(tmp_path, 5)


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        newest_checkpoint(tmp_path)


def test_the_same_model_and_data_fit_in_any_layout(saved: Checkpoint, tmp_path: Path) -> None:
    check_fits(saved, config(tmp_path), SAME_DATA)
    changes = {"zero_optimization.stage": 2, "magnetar.model.moe.ep_size": 4}
    check_fits(saved, run_config(tmp_path, 4, changes), SAME_DATA)


def test_another_model_is_refused_key_by_key(saved: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another model: d_ff 64 there and 32 here") as refused:
        check_fits(saved, config(tmp_path, magnetar__model__d_ff=32), SAME_DATA)
    assert "step_00000005" in str(refused.value)
    assert "training.run_dir" in str(refused.value)


def test_a_model_saved_before_keys_existed_has_their_defaults(
    saved: Checkpoint, tmp_path: Path
) -> None:
    model = saved.manifest["config"]["magnetar"]["model"]
    del model["drop_path"], model["norm_eps"], model["attention_positions"]
    check_fits(saved, config(tmp_path), SAME_DATA)
    with pytest.raises(
        UserError, match=r"another model: drop_path 0\.0 there and 0\.1 here: go on"
    ):
        check_fits(saved, config(tmp_path, magnetar__model__drop_path=0.1), SAME_DATA)


def test_a_model_with_a_key_given_up_since_is_refused_by_that_key(
    saved: Checkpoint, tmp_path: Path
) -> None:
    saved.manifest["config"]["magnetar"]["model"]["given_up"] = 1
    with pytest.raises(UserError, match="another model: given_up 1 there and absent here"):
        check_fits(saved, config(tmp_path), SAME_DATA)


def test_other_data_is_refused(saved: Checkpoint, tmp_path: Path) -> None:
    other: Any = SimpleNamespace(fingerprint="c" * 64)
    with pytest.raises(
        UserError, match="another data set: fingerprint bbbbbbbbbbbb there and cccc"
    ):
        check_fits(saved, config(tmp_path), other)


@pytest.mark.parametrize("tied", [True, False])
def test_the_whole_model_is_loaded_in_one_process(tmp_path: Path, tied: bool) -> None:
    changes = {"magnetar.model.tie_embeddings": tied, "magnetar.model.moe.ep_size": 2}
    checkpoint = write_checkpoint(tmp_path, 3, changes=changes)
    model = load_model(checkpoint).state_dict()
    for name, tensor in small_model(run_config(tmp_path, changes=changes), 1).items():
        assert torch.equal(model[name], tensor), name
    assert torch.equal(model["output.weight"], model["embedding.weight"]) == tied


def test_tensors_that_another_version_named_are_refused_on_every_rank(
    saved: Checkpoint, tmp_path: Path
) -> None:
    tensors = saved.manifest["tensors"]
    first = next(iter(tensors))
    tensors["old_name"] = tensors.pop(first)
    attempts = (
        lambda: load_model(saved),
        lambda: load_checkpoint(SimpleNamespace(), config(tmp_path), saved),
    )
    for attempt in attempts:
        with pytest.raises(UserError) as refused:
            attempt()
        assert refused.value.on_every_rank
        message = str(refused.value)
        assert "step_00000005 was saved by a version with another model inside" in message
        assert f"1 missing, the first is {first}; 1 unexpected, the first is old_name" in message
        assert "train anew in another training.run_dir" in message
