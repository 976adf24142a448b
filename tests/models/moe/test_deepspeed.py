"""What DeepSpeed sees of a MoE layer, and that a model can be used without DeepSpeed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.moe.sharded_moe import MOELayer

from magnetar.models.config import ModelConfig
from magnetar.models.moe.config import MoELayerConfig
from magnetar.models.moe.deepspeed import PartitionedMoE, moe_class
from magnetar.models.moe.layer import MoE
from magnetar.models.transformer import build_model
from magnetar.models.weights.load_save import save_weights
from tests.ranks import ROOT

CONFIG = {
    "vocab_size": 31,
    "num_layers": 2,
    "d_model": 8,
    "d_ff": 16,
    "num_heads": 2,
    "max_seq_len": 8,
}
STAGES = (0, 3)


def layer(stage: int) -> MoE:
    moe = MoELayerConfig(num_experts=4, shared_d_ff=8, shared_gate=True)
    return moe_class(stage)(8, 16, moe, "gelu", True, 1.0)


@pytest.mark.parametrize("stage", STAGES)
def test_only_the_experts_carry_deepspeeds_marks(stage: int) -> None:
    for name, parameter in layer(stage).named_parameters():
        marks = {key: vars(parameter).get(key) for key in ("allreduce", "num_experts")}
        if ".experts." in name:
            assert marks == {"allreduce": False, "num_experts": 4}, name
            assert vars(parameter)["group_name"] == "ep_size_1"
            assert hasattr(parameter, "ds_zero_placement_family") == (stage == 3)
        else:
            assert marks == {"allreduce": None, "num_experts": None}, name


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeeds_classes_change_neither_names_nor_weights(stage: int) -> None:
    config = ModelConfig.model_validate(CONFIG | {"moe": {"num_experts": 4, "shared_d_ff": 8}})
    plain, trained = build_model(config, 1), build_model(config, 1, moe_class(stage))
    assert isinstance(trained.blocks[1].ffn, moe_class(stage))
    states = plain.state_dict(), trained.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name  # drawn by the same calls


@pytest.mark.parametrize("stage", STAGES)
def test_the_layer_is_timed_when_deepspeed_asks_for_it(stage: int) -> None:
    timed = layer(stage)
    with torch.no_grad():
        for parameter in timed.parameters():
            parameter.fill_(0.1)
    inner = timed.deepspeed_moe
    assert isinstance(inner, MOELayer)  # by which DeepSpeed finds what to time
    timed(torch.ones(1, 3, 8))
    assert inner.time_moe == 0
    inner.wall_clock_breakdown = True
    timed(torch.ones(1, 3, 8))
    assert inner.time_moe > 0


def test_the_layer_for_zero_3_is_the_one_that_deepspeed_divides() -> None:
    assert [moe_class(stage) is PartitionedMoE for stage in range(4)] == [False] * 3 + [True]


@pytest.mark.parametrize("moe", [None, {"num_experts": 4}], ids=["dense", "MoE"])
def test_weights_are_loaded_and_used_where_deepspeed_is_not_installed(
    tmp_path: Path, moe: dict | None
) -> None:
    config = ModelConfig.model_validate(CONFIG | {"moe": moe})
    model = build_model(config, seed=1).eval()
    save_weights(tmp_path / "weights", config, model.state_dict())
    tokens = torch.arange(8).view(1, 8)
    torch.save(model(tokens).logits, tmp_path / "logits.pt")
    program = (
        "import importlib, pathlib, sys\n"
        "sys.modules['deepspeed'] = None\n"  # any import of it is an ImportError
        "for path in sorted(pathlib.Path('models').glob('*.py')):\n"
        "    if path.stem != 'deepspeed_moe': importlib.import_module(f'models.{path.stem}')\n"
        "import torch\n"
        "from magnetar.models.weights.load_save import load_model\n"
        f"logits = load_model(r'{tmp_path / 'weights'}')(torch.arange(8).view(1, 8)).logits\n"
        # Another process may have another number of threads, which add in another order: some 160
        # float32 roundings of 2^-24 before a logit, as logits are of size 1.
        f"expected = torch.load(r'{tmp_path / 'logits.pt'}')\n"
        "torch.testing.assert_close(logits, expected, rtol=0, atol=160 * 2**-24)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
