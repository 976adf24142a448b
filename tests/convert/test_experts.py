"""A dense model and what it is upcycled to are one function; and MoE models as dense ones."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.open_run import load_model as load_checkpoint_model
from magnetar.engine.checkpoint.starting_weights import (
    load_starting_weights,
    require_starting_weights,
)
from magnetar.models.config import NormName
from magnetar.models.transformer import build_model
from magnetar.models.weights.load_save import load_model, load_weights
from tests.convert.checkpoints import run_config, write_checkpoint
from tests.convert.conversions import (
    BOTH,
    Refusal,
    assert_close,
    assert_refused,
    config,
    contents,
    convert,
    folder_logits,
    logits,
    pasted,
    save_random,
)

NORMS = get_args(NormName)
CASES: dict[str, dict[str, Any]] = (
    {norm: {"norm": norm} for norm in NORMS}
    | {name: {"activation": name} for name in ("relu", "swish", "swiglu")}
    | {
        "pre, gated": {"norm": "pre", "activation": "swiglu"},
        "encoder": {"architecture": "encoder", "norm": "subln"},
        "two stacks": BOTH | {"num_decoder_layers": 2, "share_embeddings": True},
        "two stacks, deepnorm": BOTH | {"norm": "deepnorm", "activation": "swiglu"},
        "square": {"d_ff": 16},
        "rmsnorm without biases": {"norm_type": "rmsnorm", "bias": False, "num_kv_heads": 2},
        "untied": {"tie_embeddings": False, "attention_positions": "xpos_relative"},
    }
)
FOUR = ("--num-experts", 4)


MOE = {"num_experts": 3, "every": 2}
KEYS = {"num_experts": 4, "every": 2, "top_k": 2, "router": "xmoe"}  # of a model upcycled with FOUR


@pytest.mark.parametrize("router", ["xmoe", "linear"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dense_model(tmp_path: Path, case: str, router: str) -> None:
    dense = save_random(tmp_path / "dense", **CASES[case])
    convert("upcycle", tmp_path / "dense", "--out", tmp_path / "moe", *FOUR, "--router", router)
    sparse = load_model(tmp_path / "moe")
    moe = sparse.config.moe
    assert moe is not None
    assert (moe.num_experts, moe.every, moe.top_k, moe.router) == (4, 2, 2, router)
    assert_close(logits(sparse), logits(dense))


@pytest.mark.parametrize(
    ("experts", "every", "top_k"), [(3, 1, 3), (5, 4, 2), (8, 3, 4), (1, 1, 1)]
)
def test_any_number_of_experts_in_any_layers(
    tmp_path: Path, experts: int, every: int, top_k: int
) -> None:
    dense = save_random(tmp_path / "dense")
    keys = ("--num-experts", experts, "--every", every, "--top-k", top_k)
    convert("upcycle", tmp_path / "dense", "--out", tmp_path / "moe", *keys)
    sparse = load_model(tmp_path / "moe")
    is_moe = [hasattr(block.ffn, "num_experts") for block in sparse.blocks]
    assert is_moe == [(index + 1) % every == 0 for index in range(4)]
    assert_close(logits(sparse), logits(dense))


def test_another_function_is_noticed(tmp_path: Path) -> None:
    """The tolerance above tells one changed expert of sixteen."""
    dense = save_random(tmp_path / "dense")
    convert("upcycle", tmp_path / "dense", "--out", tmp_path / "moe", *FOUR)
    sparse = load_model(tmp_path / "moe")
    with torch.no_grad():
        sparse.blocks[1].ffn.deepspeed_moe.experts.w2[2] *= 1.01
    assert (logits(sparse) - logits(dense)).abs().max() > 1e-4


def test_routers_are_those_of_a_new_model_with_the_same_seed(tmp_path: Path) -> None:
    save_random(tmp_path / "dense")
    for seed in (1, 7):
        out = tmp_path / f"moe{seed}"
        convert("upcycle", tmp_path / "dense", "--out", out, *FOUR, "--seed", seed)
        config, tensors = load_weights(out)
        gates = {n: t for n, t in build_model(config, seed).state_dict().items() if ".gate." in n}
        assert len(gates) == 6  # three tensors in two layers
        for name, tensor in gates.items():
            assert torch.equal(tensors[name], tensor), name  # the same draws from one seed


def test_a_16_bit_model_stays_one(tmp_path: Path) -> None:
    dense = save_random(tmp_path / "dense", torch.bfloat16)
    convert("upcycle", tmp_path / "dense", "--out", tmp_path / "moe", *FOUR)
    assert {t.dtype for t in load_weights(tmp_path / "moe")[1].values()} == {torch.bfloat16}
    # A rounding to bf16 is off by 2^-9; a logit is at the end of 4 layers, each with two of them.
    spread = 8 * 2**-9 * logits(dense).abs().max()
    torch.testing.assert_close(
        folder_logits(tmp_path / "moe"), logits(dense), atol=float(spread), rtol=0
    )


def test_a_run_is_upcycled_from_its_newest_checkpoint(tmp_path: Path) -> None:
    dense = {"magnetar.model.moe": None}
    write_checkpoint(tmp_path / "run", 3, changes=dense, seed=3)
    newest = write_checkpoint(tmp_path / "run", 5, changes=dense, seed=5)
    convert("upcycle", tmp_path / "run", "--out", tmp_path / "moe", *FOUR, "--shard-size", "20KB")
    assert len(list((tmp_path / "moe").glob("model-*.safetensors"))) > 3
    expected = logits(load_checkpoint_model(newest).eval())
    assert_close(folder_logits(tmp_path / "moe"), expected)


@pytest.mark.parametrize("options", [(), ("--shard-size", "20KB")], ids=str)
def test_a_run_starts_from_it(tmp_path: Path, options: tuple) -> None:
    dense = write_checkpoint(tmp_path / "run", changes={"magnetar.model.moe": None})
    convert("upcycle", tmp_path / "run", "--out", tmp_path / "moe", *FOUR, *options)
    moe = KEYS | {"aux_loss_weight": 0.1}
    changes = {"magnetar.model.moe": moe, "magnetar.training.init_from": str(tmp_path / "moe")}
    run = run_config(tmp_path / "tuned", changes=changes)
    require_starting_weights(run)
    model = build_model(run.model, seed=2).eval()
    load_starting_weights(model, Path(run.training.init_from or ""))
    expected = logits(load_checkpoint_model(dense).eval())
    assert_close(logits(model), expected)
    other = changes | {"magnetar.model.moe": moe | {"router": "linear"}}
    with pytest.raises(UserError, match=r"moe\.router: xmoe there, linear here"):
        require_starting_weights(run_config(tmp_path / "tuned", changes=other))


DENSIFIED: dict[str, dict[str, Any]] = {
    "decoder": {},
    "gated, no inner norm": {"norm": "pre", "activation": "swiglu"},
    "two stacks": BOTH | {"num_decoder_layers": 2, "norm": "deepnorm"},
    "square": {"d_ff": 16},
}


@pytest.mark.parametrize("choice", [("--expert", 0), ("--expert", 2), ("--mean",)], ids=str)
@pytest.mark.parametrize("case", DENSIFIED)
def test_dense_layers_compute_what_the_expert_or_the_mean_computes(
    tmp_path: Path, case: str, choice: tuple
) -> None:
    sparse = save_random(tmp_path / "moe", moe=MOE, **DENSIFIED[case])
    convert("densify", tmp_path / "moe", "--out", tmp_path / "dense", *choice)
    dense = load_model(tmp_path / "dense")
    assert dense.config == config(**DENSIFIED[case])
    # The same by another way: every expert is the one chosen, or the mean of all of them.
    with torch.no_grad():
        for module in sparse.modules():
            if hasattr(module, "num_local_experts") and hasattr(module, "w1"):
                for parameter in module.parameters():
                    chosen = parameter.mean(0) if choice == ("--mean",) else parameter[choice[1]]
                    parameter.copy_(chosen.expand_as(parameter))
    assert_close(logits(dense), logits(sparse))


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
    # A float64 holds the sum of seven bf16 numbers exactly, so its order does not matter.
    expected = experts.b1.double().mean(0).bfloat16()
    assert torch.equal(tensors["blocks.1.ffn.w1.bias"], expected)
    assert not torch.equal(experts.b1.sum(0) / 7, expected), "the test tells the two apart"


def test_layers_with_other_numbers_of_experts(tmp_path: Path, refused: Refusal) -> None:
    sparse = save_random(tmp_path / "moe", moe={"num_experts": [2, 5], "every": 2})
    convert("densify", tmp_path / "moe", "--out", tmp_path / "mean", "--mean")
    tensors = load_weights(tmp_path / "mean")[1]
    for layer in (1, 3):
        b1 = sparse.blocks[layer].ffn.deepspeed_moe.experts.b1
        expected = b1.double().mean(0).float()  # exact as above, and rounded once
        assert torch.equal(tensors[f"blocks.{layer}.ffn.w1.bias"], expected)
    said = refused("densify", tmp_path / "moe", "--out", tmp_path / "a", "--expert", 2)
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
    ("command", "source", "options", "model"),
    [
        ("upcycle", {}, FOUR, {"moe": KEYS}),
        ("densify", {"moe": MOE}, ("--mean",), {"moe": None}),
    ],
)
def test_the_line_for_training_can_be_pasted(
    command: str,
    source: dict,
    options: tuple,
    model: dict,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_random(tmp_path / "source", **source)
    convert(command, tmp_path / "source", "--out", tmp_path / "a folder", *options)
    training = {"init_from": str(tmp_path / "a folder")}
    assert pasted(capsys.readouterr().out)["magnetar"] == {"model": model, "training": training}


@pytest.mark.parametrize(
    ("command", "model", "options", "messages"),
    [
        (
            "upcycle",
            {},
            (*FOUR, "--top-k", 1),
            ["--top-k 1 multiplies an expert's output by its probability", "use --top-k 2 or more"],
        ),
        (
            "upcycle",
            {"architecture": "encoder", "multiway": True},
            FOUR,
            ["multiway=true and moe contradict each other"],
        ),
        ("upcycle", {"moe": {"num_experts": 2}}, FOUR, ["has 2 experts", "convert densify"]),
        *(
            ("upcycle", {}, (*FOUR, *options), [message])
            for options, message in [
                (("--top-k", 5), "top_k=5 must not exceed num_experts=4: use top_k 4"),
                (("--every", 5), "moe.every=5 exceeds num_layers=4"),
                (("--num-experts", 0), "--num-experts 0 must be at least 1"),
                (("--top-k", 0), "--top-k 0 must be at least 1"),
                (("--every", -1), "--every -1 must be at least 1"),
                (("--seed", -1), "--seed -1 must be at least 0"),
                (("--shard-size", "5XB"), "--shard-size 5XB is no size of a file: give bytes"),
                (("--shard-size", "0"), "--shard-size 0 is no size"),
                (("--shard-size", "9" * 400), "is no size of a file"),
            ]
        ),
        ("densify", {}, ("--mean",), ["is dense already"]),
        *(
            ("densify", {"moe": MOE | {f"{key}_d_ff": 8}}, ("--mean",), [f"moe.{key}_d_ff=8"])
            for key in ("shared", "expert")
        ),
        *(
            ("densify", {"moe": MOE}, options, [message])
            for options, message in [
                (("--expert", 3), "are 0 to 2: use one of these, or --mean"),
                (("--expert", -1), "--expert -1: the experts of"),
                ((), "one of the arguments --expert --mean is required"),
                (("--mean", "--expert", 1), "not allowed with argument"),
            ]
        ),
    ],
    ids=str,
)
def test_what_would_be_another_function_or_no_model_is_refused(
    command: str, tmp_path: Path, model: dict, options: tuple, messages: list[str], refused: Refusal
) -> None:
    assert_refused(refused, command, tmp_path, model, options, messages)
