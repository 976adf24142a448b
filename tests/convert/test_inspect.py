"""What `inspect` says of checkpoints and folders of weights, and what it warns of."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from magnetar.convert.inspect import group_of, inspect
from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.format import MANIFEST
from magnetar.engine.checkpoint.open_run import open_run
from magnetar.launchers.convert import main
from magnetar.models.config import ModelConfig
from magnetar.models.transformer import build_model
from magnetar.models.weights.files import digest
from magnetar.models.weights.load_save import save_weights, tensor_shapes
from tests.convert.checkpoints import run_config, small_model, write_checkpoint
from tests.convert.conversions import flip_bit

EXPERT = "blocks.1.ffn.deepspeed_moe.experts.deepspeed_experts"

# Sums in float64 of at most 34,401 squares, in another order.
EXACT = 34_401 * 2**-53


def rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def test_a_checkpoint_is_described(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "run")
    weights = small_model(run_config(tmp_path / "run"), seed=1)
    contents = inspect(tmp_path / "run")
    assert contents.path == str(checkpoint.path)
    assert contents.step == 5
    assert contents.layout == {"world_size": 2, "ep_size": 1, "zero_stage": 0}
    assert contents.about == {
        "holds": "step 5 of a run, in format 2",
        "model": "decoder, 2 layers, d_model 32, subln",
        "size": "34,401 parameters, 25,249 a token",
        "experts": "4 in every 2nd layer, xmoe router, top-2, dropless",
        "layout": "2 ranks, ep_size 1, ZeRO 0",
    }
    assert contents.num_parameters == sum(t.numel() for t in weights.values()) == 34_401
    assert [file.name for file in contents.files] == [
        "rank_00000.safetensors",
        "rank_00001.safetensors",
    ]
    assert contents.damaged == contents.warnings == []
    assert [tensor.name for tensor in contents.tensors] == list(weights)
    for tensor in contents.tensors:
        assert tensor.shape == list(weights[tensor.name].shape)
        assert tensor.states == ["weight", "exp_avg", "exp_avg_sq"]
        assert tensor.sha256 == digest(weights[tensor.name])
        assert tensor.rms == pytest.approx(rms(weights[tensor.name]), rel=EXACT)


def test_the_numbers_of_groups_and_layers_are_those_of_the_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run")
    weights = small_model(run_config(tmp_path / "run"), seed=1)
    contents = inspect(tmp_path / "run" / "checkpoints" / "step_00000005")
    assert sum(group.num_parameters for group in contents.groups) == contents.num_parameters
    for group in contents.groups:
        values = torch.cat([t.flatten() for n, t in weights.items() if group_of(n) == group.name])
        assert group.num_parameters == values.numel()
        assert group.rms == pytest.approx(rms(values), rel=EXACT)
    (layer,) = contents.layers
    assert (layer.name, layer.num_experts) == ("blocks.1.ffn", 4)
    temperature = weights["blocks.1.ffn.deepspeed_moe.gate.temperature"]
    assert layer.temperature == float(temperature)
    norms = []
    for index in range(4):
        mine = [t for n, t in weights.items() if n.startswith(f"{EXPERT}.{index}.")]
        norms.append(math.sqrt(sum(float(t.double().square().sum()) for t in mine)))
    assert layer.expert_norms == pytest.approx((min(norms), sum(norms) / 4, max(norms)), rel=EXACT)


@pytest.mark.parametrize(
    "keys",
    [
        {"norm": "admin", "stable_embedding": True, "tie_embeddings": False},
        {"norm": "normformer", "qk_norm": True, "attention_positions": "relative"},
        {"norm": "deepnorm", "moe": {"num_experts": 4, "router": "linear"}},
        {"architecture": "encoder_decoder", "attention_positions": "xpos_relative"},
        {"architecture": "encoder", "multiway": True},
    ],
)
def test_every_tensor_of_every_model_belongs_to_a_group(keys: dict[str, Any]) -> None:
    sizes = {"num_layers": 2, "d_model": 16, "d_ff": 16, "num_heads": 2, "max_seq_len": 8}
    config = ModelConfig.model_validate({"vocab_size": 20, **sizes, **keys})
    groups = {name: group_of(name) for name in tensor_shapes(config)}
    assert "other" not in groups.values()
    for name, group in groups.items():
        if group == "norms":
            assert name.rpartition(".")[2] in {"weight", "bias", "omega", "head_scale"}
        if name.endswith(("qkv_proj.weight", "relative_bias.weight")):
            assert group == "attention", name
        if name.endswith(("ffn.w1.weight", "ffn.w2.bias")):
            assert group == "feed-forward", name


def test_a_folder_of_weights_is_described(tmp_path: Path) -> None:
    config = run_config(tmp_path, changes={"magnetar.model.moe": None}).model
    model = build_model(config, seed=1)
    save_weights(tmp_path / "weights", config, model.state_dict())
    contents = inspect(tmp_path / "weights")
    assert (contents.step, contents.layout, contents.layers) == (None, None, [])
    assert contents.about["holds"] == "weights"
    assert [file.name for file in contents.files] == ["model.safetensors"]
    assert {tuple(tensor.files) for tensor in contents.tensors} == {("model.safetensors",)}
    assert {tuple(tensor.states) for tensor in contents.tensors} == {("weight",)}
    found = {tensor.name: tensor.sha256 for tensor in contents.tensors}
    assert found["blocks.0.ffn.w1.weight"] == digest(model.state_dict()["blocks.0.ffn.w1.weight"])


def replaced(run_dir: Path, **values: torch.Tensor) -> list[str]:
    """The warnings of a checkpoint with other weights."""
    write_checkpoint(run_dir, tensors={name.replace("__", "."): t for name, t in values.items()})
    return inspect(run_dir).warnings


def test_identical_experts_are_named_by_layer_and_index(tmp_path: Path) -> None:
    weights = small_model(run_config(tmp_path), seed=1)
    twin = {
        name.replace(f"{EXPERT}.0.", f"{EXPERT}.2."): tensor
        for name, tensor in weights.items()
        if name.startswith(f"{EXPERT}.0.")
    }
    names = "blocks.1.ffn expert 0, blocks.1.ffn expert 2"
    assert replaced(tmp_path / "twins", **twin) == [f"identical experts: {names}"]
    almost = dict(twin)
    almost[f"{EXPERT}.2.b2"] = twin[f"{EXPERT}.2.b2"] + 1e-6
    assert replaced(tmp_path / "almost", **almost) == []


def test_many_identical_experts_are_one_warning(tmp_path: Path) -> None:
    changes = {"magnetar.model.moe.num_experts": 12}
    weights = small_model(run_config(tmp_path, changes=changes), seed=1)
    twins = {
        f"{EXPERT}.{index}.{name.removeprefix(f'{EXPERT}.0.')}": tensor
        for name, tensor in weights.items()
        if name.startswith(f"{EXPERT}.0.")
        for index in range(1, 12)
    }
    write_checkpoint(tmp_path / "run", changes=changes, tensors=twins)
    (warning,) = inspect(tmp_path / "run").warnings
    assert warning.endswith("blocks.1.ffn expert 7 and 4 more")


def test_zeros_and_values_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    broken = torch.ones(97, 32)
    broken[3, 4:7] = torch.tensor([math.nan, math.inf, -math.inf])
    warnings = replaced(
        tmp_path, embedding__weight=broken, blocks__0__ffn__w2__weight=torch.zeros(32, 64)
    )
    assert warnings == [
        "embedding.weight: 3 of 3,104 values are not finite",
        "blocks.0.ffn.w2.weight is all zeros",
    ]
    text = json.dumps(inspect(tmp_path).to_dict(with_tensors=True), allow_nan=False)
    assert json.loads(text)["tensors"][0]["rms"] is None


def test_moments_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, moments={"final_norm.bias": torch.full((32,), math.nan)})
    assert inspect(tmp_path).warnings == [
        "final_norm.bias (exp_avg): 32 of 32 values are not finite",
        "final_norm.bias (exp_avg_sq): 32 of 32 values are not finite",
    ]


def run_command(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `inspect`."""
    status = 0
    try:
        main(["inspect", *arguments])
    except SystemExit as ended:
        status = int(str(ended.code))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_tables_say_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_checkpoint(tmp_path / "run", tensors={"blocks.0.ffn.w2.weight": torch.zeros(32, 64)})
    status, out, _ = run_command(capsys, str(tmp_path / "run"))
    assert status == 0
    for text in ("step 5 of a run", "34,401 parameters", "2 ranks, ep_size 1", "blocks.1.ffn"):
        assert text in out
    assert "states   weight, exp_avg, exp_avg_sq" in out
    assert "warning: blocks.0.ffn.w2.weight is all zeros" in out
    assert "sha256" in out
    assert f"{EXPERT}.3.norm_weight" not in out
    _, out, _ = run_command(capsys, str(tmp_path / "run"), "--tensors")
    line = next(line for line in out.splitlines() if f"{EXPERT}.3.norm_weight" in line)
    assert "64" in line
    assert "weight, exp_avg, exp_avg_sq  rank_00000, rank_00001" in line


def test_json_is_the_same_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_checkpoint(tmp_path / "run")
    contents = inspect(tmp_path / "run")
    status, out, _ = run_command(capsys, str(tmp_path / "run"), "--json")
    assert status == 0
    assert json.loads(out) == json.loads(json.dumps(contents.to_dict(with_tensors=False)))
    assert "tensors" not in json.loads(out)
    _, out, _ = run_command(capsys, str(tmp_path / "run"), "--json", "--tensors")
    assert len(json.loads(out)["tensors"]) == contents.num_tensors


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_a_damaged_file_is_named_with_status_2(
    arguments: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = write_checkpoint(tmp_path / "run")
    file = checkpoint.path / "rank_00001.safetensors"
    flip_bit(file, -5)
    status, out, error = run_command(capsys, str(tmp_path / "run"), *arguments)
    assert status == 2
    assert f"{file} is not what was saved (its sha256 differs); it holds" in error
    assert "use another checkpoint" in error
    if arguments:
        assert json.loads(out)["damaged"] == inspect(tmp_path / "run").damaged
    else:
        assert "damaged" in next(x for x in out.splitlines() if file.name in x)
        assert "whole" in next(x for x in out.splitlines() if "rank_00000" in x)


def test_of_a_run_the_newest_checkpoint_is_looked_at_even_if_it_is_not_complete(
    tmp_path: Path,
) -> None:
    write_checkpoint(tmp_path, step=5)
    newest = write_checkpoint(tmp_path, step=10)
    (newest.path / "rank_00000.safetensors").unlink()
    (damaged,) = inspect(tmp_path).damaged
    assert f"{newest.path}/rank_00000.safetensors is missing" in damaged
    assert inspect(tmp_path / "checkpoints" / "step_00000005").damaged == []


@pytest.mark.parametrize("name", ["rank_00000.safetensors", MANIFEST])
def test_of_a_truncated_checkpoint_the_newest_complete_one_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folders = [write_checkpoint(tmp_path, step).path for step in (3, 5, 8, 10)]
    for folder, file in ((folders[2], MANIFEST), (folders[3], name)):
        (folder / file).write_bytes((folder / file).read_bytes()[:100])
    status, _, error = run_command(capsys, str(tmp_path))
    assert status == 2
    assert str(folders[3] / name) in error
    assert error.endswith(f"use another checkpoint: the newest complete one is {folders[1]}\n")
    for folder in folders[:2]:
        (folder / MANIFEST).unlink()
    _, _, error = run_command(capsys, str(tmp_path))
    assert error.endswith("use another checkpoint\n"), "there is none"


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        inspect(path)
    return str(refused.value)


def test_what_is_nothing_of_the_kind_is_refused(tmp_path: Path) -> None:
    assert f"run folder {tmp_path / 'nowhere'} does not exist" in refusal(tmp_path / "nowhere")
    assert (
        "holds no complete checkpoint (looked for checkpoints/step_*), no manifest.json (of"
        in refusal(tmp_path)
    )
    (tmp_path / "checkpoints").mkdir()
    assert "holds no checkpoint yet" in refusal(tmp_path)
    with pytest.raises(UserError, match=r"holds no complete checkpoint .*: name a run"):
        open_run(tmp_path)
    checkpoint = write_checkpoint(tmp_path)
    (checkpoint.path / "rank_00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"rank_00000\.safetensors is missing"):
        open_run(tmp_path)
    (checkpoint.path / MANIFEST).write_text("{")
    assert f"{checkpoint.path / MANIFEST} cannot be read" in refusal(checkpoint.path)


def test_a_model_of_another_version_is_refused_by_its_key(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "key", manifest_model={"given_up": 1})
    message = refusal(tmp_path / "key")
    assert "step_00000005: its model is not one that this version can read" in message
    assert "magnetar.model.given_up" in message
    write_checkpoint(tmp_path / "tensors", manifest_model={"norm": "deepnorm"})
    message = refusal(tmp_path / "tensors")
    assert "was saved by a version with another model inside" in message
    assert "unexpected, the first is blocks.0.attention.inner_norm" in message
