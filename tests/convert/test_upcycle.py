"""A dense model and what it is upcycled to are one function."""

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
    assert_refused,
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
        "untied": {"tie_embeddings": False, "attention_positions": "xpos_relative"},
    }
)
FOUR = ("--num-experts", 4)


@pytest.mark.parametrize("router", ["xmoe", "linear"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dense_model(tmp_path: Path, case: str, router: str) -> None:
    dense = save_random(tmp_path / "dense", **CASES[case])
    convert("upcycle", tmp_path / "dense", "--out", tmp_path / "moe", *FOUR, "--router", router)
    sparse = load_model(tmp_path / "moe")
    moe = sparse.config.moe
    assert moe is not None
    assert (moe.num_experts, moe.every, moe.top_k, moe.router) == (4, 2, 2, router)
    # The same sums in float32 in another order.
    torch.testing.assert_close(logits(sparse), logits(dense), atol=1e-5, rtol=0)


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
    torch.testing.assert_close(logits(sparse), logits(dense), atol=1e-5, rtol=0)


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
            assert torch.equal(tensors[name], tensor), name


def test_a_16_bit_model_stays_one(tmp_path: Path) -> None:
    dense = save_random(tmp_path / "dense", torch.bfloat16)
    convert("upcycle", tmp_path / "dense", "--out", tmp_path / "moe", *FOUR)
    assert {t.dtype for t in load_weights(tmp_path / "moe")[1].values()} == {torch.bfloat16}
    # bf16 keeps eight binary digits.
    spread = 2**-6 * logits(dense).abs().max()
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
    torch.testing.assert_close(folder_logits(tmp_path / "moe"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("model", "options", "messages"),
    [
        (
            {},
            (*FOUR, "--top-k", 1),
            ["--top-k 1 multiplies an expert's output by its probability", "use --top-k 2 or more"],
        ),
        ({}, (*FOUR, "--top-k", 5), ["top_k=5 must not exceed num_experts=4", "use top_k 4"]),
        ({}, (*FOUR, "--every", 5), ["moe.every=5 exceeds num_layers=4", "use at most 4"]),
        ({}, ("--num-experts", 0), ["--num-experts 0 must be at least 1"]),
        ({}, (*FOUR, "--top-k", 0), ["--top-k 0 must be at least 1"]),
        ({}, (*FOUR, "--every", -1), ["--every -1 must be at least 1"]),
        ({}, (*FOUR, "--seed", -1), ["--seed -1 must be at least 0"]),
        (
            {"architecture": "encoder", "multiway": True},
            FOUR,
            ["multiway=true and moe contradict each other"],
        ),
        ({"moe": {"num_experts": 2}}, FOUR, ["has 2 experts", "magnetar convert densify"]),
        ({}, (*FOUR, "--shard-size", "5XB"), ["--shard-size 5XB is no size", "such as 5GB"]),
        ({}, (*FOUR, "--shard-size", "0"), ["--shard-size 0 is no size"]),
    ],
)
def test_what_would_be_another_function_or_no_model_is_refused(
    tmp_path: Path,
    model: dict,
    options: tuple,
    messages: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_refused(capsys, "upcycle", tmp_path, model, options, messages)


def test_the_line_for_training_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_random(tmp_path / "dense")
    convert("upcycle", tmp_path / "dense", "--out", tmp_path / "a moe", *FOUR)
    keys = pasted(capsys.readouterr().out)
    moe = {"num_experts": 4, "every": 2, "top_k": 2, "router": "xmoe"}
    assert keys["magnetar"] == {
        "model": {"moe": moe},
        "training": {"init_from": str(tmp_path / "a moe")},
    }


@pytest.mark.parametrize("options", [(), ("--shard-size", "20KB")], ids=str)
def test_a_run_starts_from_it(tmp_path: Path, options: tuple) -> None:
    dense = write_checkpoint(tmp_path / "run", changes={"magnetar.model.moe": None})
    convert("upcycle", tmp_path / "run", "--out", tmp_path / "moe", *FOUR, *options)
    moe = {"num_experts": 4, "every": 2, "top_k": 2, "router": "xmoe", "aux_loss_weight": 0.1}
    changes = {"magnetar.model.moe": moe, "magnetar.training.init_from": str(tmp_path / "moe")}
    run = run_config(tmp_path / "tuned", changes=changes)
    require_starting_weights(run)
    model = build_model(run.model, seed=2).eval()
    load_starting_weights(model, Path(run.training.init_from or ""))
    expected = logits(load_checkpoint_model(dense).eval())
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    other = changes | {"magnetar.model.moe": moe | {"router": "linear"}}
    with pytest.raises(UserError, match=r"moe\.router: xmoe there, linear here"):
        require_starting_weights(run_config(tmp_path / "tuned", changes=other))
