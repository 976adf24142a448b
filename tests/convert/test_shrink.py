"""Some layers of a model as a shallower one."""

from pathlib import Path

import pytest
import torch

from magnetar.models.layers.norms import Depths, deepnorm_alpha
from magnetar.models.weights.load_save import load_model, load_weights, save_weights, tensor_shapes
from tests.convert.conversions import (
    BOTH,
    Refusal,
    assert_refused,
    contents,
    convert,
    folder_logits,
    pasted,
    save_random,
)

MOE = {"num_experts": 3, "every": 2}


def test_layers_keep_their_order_and_everything_else_stays(tmp_path: Path) -> None:
    save_random(tmp_path / "deep", tie_embeddings=False, attention_positions="relative")
    convert("shrink", tmp_path / "deep", "--out", tmp_path / "small", "--layers", "0,2,3")
    deep, small = (load_weights(tmp_path / name)[1] for name in ("deep", "small"))
    config = load_weights(tmp_path / "small")[0]
    assert config == load_weights(tmp_path / "deep")[0].model_copy(update={"num_layers": 3})
    for name, tensor in small.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[1] = str((0, 2, 3)[int(parts[1])])
        assert torch.equal(tensor, deep[".".join(parts)]), name


def test_all_layers_are_the_same_file(tmp_path: Path) -> None:
    save_random(tmp_path / "deep", moe=MOE)
    convert("shrink", tmp_path / "deep", "--out", tmp_path / "same", "--layers", "0,1,2,3")
    assert contents(tmp_path / "same") == contents(tmp_path / "deep")


@pytest.mark.parametrize("norm", ["pre", "subln", "normformer"])
def test_a_layer_that_adds_nothing_can_go(tmp_path: Path, norm: str) -> None:
    model = save_random(tmp_path / "random", norm=norm)
    with torch.no_grad():
        idle = model.blocks[2]
        for module in (idle.attention.out_proj, idle.ffn.w2):
            module.weight.zero_()
            module.bias.zero_()
        if norm == "normformer":
            idle.attention_residual.output_norm.bias.zero_()
    state = model.state_dict()
    kept = {name: state[name] for name in tensor_shapes(model.config)}
    save_weights(tmp_path / "deep", model.config, kept)
    convert("shrink", tmp_path / "deep", "--out", tmp_path / "small", "--layers", "0,1,3")
    expected = folder_logits(tmp_path / "deep")
    # Exact: what the idle layer adds is 0, and the rest is the same operations in the same order.
    assert torch.equal(folder_logits(tmp_path / "small"), expected)
    assert not torch.equal(folder_logits(tmp_path / "random"), expected)


@pytest.mark.parametrize(
    ("options", "depths"),
    [
        (("--encoder-layers", "1,3"), (2, 3)),
        (("--decoder-layers", "2"), (4, 1)),
        (("--encoder-layers", "0", "--decoder-layers", "0,2"), (1, 2)),
    ],
)
def test_each_stack_of_an_encoder_decoder(
    tmp_path: Path, options: tuple, depths: tuple[int, int]
) -> None:
    save_random(tmp_path / "deep", **BOTH, num_decoder_layers=3, norm="deepnorm")
    convert("shrink", tmp_path / "deep", "--out", tmp_path / "small", *options)
    model = load_model(tmp_path / "small")
    assert (len(model.encoder.blocks), len(model.decoder.blocks)) == depths
    # The residual's scale is that of the student's depth, not the teacher's.
    expected = deepnorm_alpha(Depths(*depths, in_encoder=False))
    assert model.decoder.blocks[0].ffn_residual.alpha == expected
    old = load_weights(tmp_path / "deep")[1]
    last = dict(zip(options[::2], options[1::2], strict=True)).get("--decoder-layers", "2")[-1]
    name = "cross_attention.kv_proj.weight"
    assert torch.equal(
        load_weights(tmp_path / "small")[1][f"decoder.blocks.{depths[1] - 1}.{name}"],
        old[f"decoder.blocks.{last}.{name}"],
    )


def test_experts_move_with_their_layer(tmp_path: Path) -> None:
    save_random(tmp_path / "deep", moe=MOE)
    convert("shrink", tmp_path / "deep", "--out", tmp_path / "small", "--layers", "2,3")
    deep, small = (load_weights(tmp_path / name)[1] for name in ("deep", "small"))
    for part in ("gate.centroids", "experts.deepspeed_experts.2.w1"):
        name = f"ffn.deepspeed_moe.{part}"
        assert torch.equal(small[f"blocks.1.{name}"], deep[f"blocks.3.{name}"])


def test_layers_keep_their_numbers_of_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moe = {"num_experts": [2, 3, 4, 5], "every": 2}
    save_random(tmp_path / "deep", **BOTH, moe=moe)
    layers = ("--encoder-layers", "0,3", "--decoder-layers", "0,1")
    convert("shrink", tmp_path / "deep", "--out", tmp_path / "small", *layers)
    keys = {"num_layers": 2, "num_decoder_layers": 2, "moe": {"num_experts": [3, 4]}}
    assert pasted(capsys.readouterr().out)["magnetar"] == {
        "model": keys,
        "training": {"init_from": str(tmp_path / "small")},
    }
    config, tensors = load_weights(tmp_path / "small")
    assert config.moe is not None
    assert config.moe.num_experts == [3, 4]
    last = "ffn.deepspeed_moe.experts.deepspeed_experts"
    assert f"encoder.blocks.1.{last}.2.w1" in tensors
    assert f"encoder.blocks.1.{last}.3.w1" not in tensors
    assert f"decoder.blocks.1.{last}.3.w1" in tensors


@pytest.mark.parametrize(
    ("model", "options", "messages"),
    [
        ({}, (), ["no layers are named: use --layers, such as 0,2,4"]),
        (BOTH, (), ["use --encoder-layers and --decoder-layers"]),
        (BOTH, ("--layers", "0"), ["--layers: the model is of architecture 'encoder_decoder'"]),
        ({}, ("--encoder-layers", "0"), ["--encoder-layers: the model", "use --layers"]),
        ({}, ("--layers", "0,4"), ["--layers 0,4: there is no layer 4", "from 0 to 3"]),
        ({}, ("--layers", "2,1"), ["--layers 2,1 does not rise"]),
        ({}, ("--layers", "1,1"), ["--layers 1,1 does not rise"]),
        ({}, ("--layers", "0,x"), ["--layers 0,x is no list of layers", "such as 0,2,4"]),
        ({}, ("--layers", ""), ["is no list of layers"]),
        ({}, ("--layers", "0," + "1" * 5000), ["is no list of layers"]),
        (
            {"moe": MOE},
            ("--layers", "0,2"),
            [
                "layer 2, a dense layer, would become layer 1 of the student, where moe.every=2 "
                "wants a MoE layer",
                "magnetar convert densify",
            ],
        ),
        (
            BOTH | {"moe": MOE},
            ("--decoder-layers", "1,2,3"),
            ["layer 1, a MoE layer, would become layer 0 of the student's decoder"],
        ),
        *(
            (
                {"moe": MOE | {"num_experts": num_experts}},
                ("--layers", "0"),
                [
                    "none of the layers that are named is a MoE layer, as 1, 3 are: name one of "
                    "these too, or make the model dense first with `magnetar convert "
                    "densify`"
                ],
            )
            for num_experts in (3, [2, 3])
        ),
    ],
)
def test_layers_that_are_not_there_or_do_not_fit_are_refused(
    tmp_path: Path, model: dict, options: tuple, messages: list[str], refused: Refusal
) -> None:
    assert_refused(refused, "shrink", tmp_path, model, options, messages)
