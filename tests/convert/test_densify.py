"""A MoE model as a dense one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from magnetar.models.weights.load_save import load_model, load_weights
from tests.convert.checkpoints import write_checkpoint
from tests.convert.conversions import (
    BOTH,
    assert_refused,
    config,
    contents,
    convert,
    logits,
    pasted,
    refusal,
    save_random,
)

MOE = {"num_experts": 3, "every": 2}
CASES: dict[str, dict[str, Any]] = {
    "decoder": {},
    "gated, no inner norm": {"norm": "pre", "activation": "swiglu"},
    "two stacks": BOTH | {"num_decoder_layers": 2, "norm": "deepnorm"},
    "square": {"d_ff": 16},
}


@pytest.mark.parametrize("choice", [("--expert", 0), ("--expert", 2), ("--mean",)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_dense_layers_compute_what_the_expert_or_the_mean_computes(
    tmp_path: Path, case: str, choice: tuple
) -> None:
    sparse = save_random(tmp_path / "moe", moe=MOE, **CASES[case])
    convert("densify", tmp_path / "moe", "--out", tmp_path / "dense", *choice)
    dense = load_model(tmp_path / "dense")
    assert dense.config == config(**CASES[case])
    # The same by another way: every expert is the one chosen, or the mean of all of them.
    with torch.no_grad():
        for module in sparse.modules():
            if hasattr(module, "num_local_experts") and hasattr(module, "w1"):
                for parameter in module.parameters():
                    chosen = parameter.mean(0) if choice == ("--mean",) else parameter[choice[1]]
                    parameter.copy_(chosen.expand_as(parameter))
    torch.testing.assert_close(logits(dense), logits(sparse), atol=1e-5, rtol=0)


def test_the_line_for_training_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_random(tmp_path / "moe", moe=MOE)
    convert("densify", tmp_path / "moe", "--out", tmp_path / "dense", "--mean")
    assert pasted(capsys.readouterr().out)["magnetar"] == {
        "model": {"moe": None},
        "training": {"init_from": str(tmp_path / "dense")},
    }


@pytest.mark.parametrize("experts", [2, 3, 7])
@pytest.mark.parametrize("choice", [("--expert", 1), ("--mean",)], ids=str)
def test_what_was_upcycled_becomes_the_same_file_again(
    tmp_path: Path, experts: int, choice: tuple
) -> None:
    save_random(tmp_path / "dense", activation="swiglu")
    convert("upcycle", tmp_path / "dense", "--out", tmp_path / "moe", "--num-experts", experts)
    convert("densify", tmp_path / "moe", "--out", tmp_path / "again", *choice)
    assert contents(tmp_path / "again") == contents(tmp_path / "dense")


def test_the_mean_is_summed_in_more_digits_than_it_is_kept_in(tmp_path: Path) -> None:
    sparse = save_random(tmp_path / "moe", torch.bfloat16, moe={"num_experts": 7, "every": 2})
    convert("densify", tmp_path / "moe", "--out", tmp_path / "dense", "--mean")
    experts = sparse.blocks[1].ffn.deepspeed_moe.experts
    tensors = load_weights(tmp_path / "dense")[1]
    expected = experts.b1.double().mean(0).bfloat16()
    assert torch.equal(tensors["blocks.1.ffn.w1.bias"], expected)
    assert not torch.equal(experts.b1.sum(0) / 7, expected), "the test tells the two apart"


def test_layers_with_other_numbers_of_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse = save_random(tmp_path / "moe", moe={"num_experts": [2, 5], "every": 2})
    convert("densify", tmp_path / "moe", "--out", tmp_path / "mean", "--mean")
    tensors = load_weights(tmp_path / "mean")[1]
    for layer in (1, 3):
        b1 = sparse.blocks[layer].ffn.deepspeed_moe.experts.b1
        expected = b1.double().mean(0).float()
        assert torch.equal(tensors[f"blocks.{layer}.ffn.w1.bias"], expected)
    said = refusal(capsys, "densify", tmp_path / "moe", "--out", tmp_path / "a", "--expert", 2)
    assert "are 0 to 1" in said


def test_a_run_is_densified(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "run")
    convert("densify", tmp_path / "run", "--out", tmp_path / "dense", "--expert", 3)
    tensors = load_weights(tmp_path / "dense")[1]
    expert = "blocks.1.ffn.deepspeed_moe.experts.deepspeed_experts.3"
    assert torch.equal(tensors["blocks.1.ffn.w1.weight"], checkpoint.tensor(f"{expert}.w1").t())
    assert torch.equal(tensors["blocks.1.ffn.w2.bias"], checkpoint.tensor(f"{expert}.b2"))
    assert torch.equal(tensors["embedding.weight"], checkpoint.tensor("embedding.weight"))


@pytest.mark.parametrize(
    ("model", "options", "messages"),
    [
        ({}, ("--mean",), ["is dense already"]),
        ({"moe": MOE}, ("--expert", 3), ["--expert 3: the experts of", "are 0 to 2", "--mean"]),
        ({"moe": MOE}, ("--expert", -1), ["--expert -1"]),
        ({"moe": MOE}, (), ["one of the arguments --expert --mean is required"]),
        ({"moe": MOE}, ("--mean", "--expert", 1), ["not allowed with argument"]),
    ],
)
def test_what_is_not_there_is_refused(
    tmp_path: Path,
    model: dict,
    options: tuple,
    messages: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_refused(capsys, "densify", tmp_path, model, options, messages)
