"""TorchScale's options: their defaults, how they decide each other, what becomes of them."""

import math
from typing import Any

import pytest

from magnetar.convert.torchscale.options import (
    CLASSES,
    DEFAULTS,
    Architecture,
    architecture_named,
    check_belonging,
    check_names,
    model_keys,
    resolve,
)
from magnetar.data.errors import UserError
from magnetar.models.moe.config import MoEConfig

ARCHITECTURES: list[Architecture] = ["encoder", "decoder", "encoder_decoder"]


def keys_of(architecture: Architecture, **given: Any) -> dict[str, Any]:
    return model_keys(architecture, resolve(architecture, given, "o.json"), "o.json").keys


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_options_and_defaults_are_torchscales(architecture: Architecture, torchscale: None) -> None:
    from torchscale.architecture import config

    assert vars(getattr(config, CLASSES[architecture])()) == DEFAULTS[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_options_decide_each_other_as_in_torchscales_constructor(
    architecture: Architecture, torchscale: None
) -> None:
    from torchscale.architecture import config

    before = [name for name in DEFAULTS[architecture] if name.endswith("normalize_before")]
    moe = {"moe_freq": 1, "moe_expert_count": 2, "moe_second_expert_policy": "all"}
    for given in (
        {},
        {"deepnorm": True},
        {"deepnorm": True, "subln": False},
        dict.fromkeys(before, False),
        {"subln": False} | dict.fromkeys(before, False),
        {"use_xmoe": True, **moe},
        {"use_xmoe": False, **moe},
    ):
        theirs = vars(getattr(config, CLASSES[architecture])(**given))
        assert resolve(architecture, given, "o.json") == theirs
        # What the constructor has made of them is taken as it is.
        assert resolve(architecture, theirs, "o.json") == theirs


def test_all_options_together_are_taken_as_they_are() -> None:
    moe = {"moe_freq": 1, "moe_expert_count": 4}
    changed = DEFAULTS["decoder"] | {
        **moe,
        "use_xmoe": True,
        "moe_second_expert_policy": "all",
    }
    assert resolve("decoder", changed, "o.json") == changed
    assert (
        resolve("decoder", changed | {"ddp_rank": None, "lr": 3}, "o.json", final=True) == changed
    )
    few = {**moe, "use_xmoe": True, "moe_second_expert_policy": "all", "deepnorm": True}
    assert resolve("decoder", few, "o.json")["moe_second_expert_policy"] == "random"
    assert resolve("decoder", few, "o.json", final=True)["moe_second_expert_policy"] == "all"


def test_options_name_their_class() -> None:
    assert architecture_named(["encoder_layers", "dropout"]) == "encoder"
    assert architecture_named(["max_target_positions"]) == "decoder"
    assert architecture_named(["encoder_layers", "decoder_layers"]) == "encoder_decoder"
    assert architecture_named(["share_all_embeddings"]) == "encoder_decoder"
    assert architecture_named(["dropout"]) is None


def test_unknown_options_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"o.json: decoder_layer is no option .* decoder_layers$"):
        check_names(["decoder_layer"], "o.json")
    with pytest.raises(UserError, match=r"o.json: encoder_layers is no option of DecoderConfig"):
        check_belonging(["encoder_layers"], "decoder", "o.json")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"decoder_layers": "6"}, "decoder_layers='6' must be a whole number, as in decoder_lay"),
        ({"decoder_layers": True}, "decoder_layers=True must be a whole number"),
        ({"decoder_layers": 6.0}, "decoder_layers=6.0 must be a whole number"),
        ({"dropout": "0.1"}, "dropout='0.1' must be a number"),
        ({"dropout": False}, "dropout=False must be a number"),
        ({"dropout": 10**400}, "dropout=10000000000000000000 must be a finite number"),
        ({"layernorm_eps": math.nan}, "layernorm_eps=nan must be a finite number"),
        ({"moe_eval_capacity_token_fraction": math.inf}, "moe_.*_fraction=inf must be a finite"),
        ({"xpos_scale_base": "512"}, "xpos_scale_base='512' must be a number"),
        ({"subln": 1}, "subln=1 must be true or false"),
        ({"activation_fn": 3}, "activation_fn=3 must be a name"),
    ],
)
def test_values_of_another_type_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"o.json: {message}"):
        resolve("decoder", given, "o.json")


def test_a_whole_number_is_a_number() -> None:
    assert keys_of("decoder", dropout=0, xpos_rel_pos=True)["xpos_scale_base"] == 512.0
    assert keys_of("decoder", xpos_rel_pos=True, xpos_scale_base=64.5)["xpos_scale_base"] == 64.5


@pytest.mark.parametrize(
    ("given", "norm"),
    [
        ({}, "subln"),
        ({"deepnorm": True}, "deepnorm"),
        ({"subln": False}, "pre"),
        ({"subln": False, "decoder_normalize_before": False}, "post"),
    ],
)
def test_three_options_become_one_norm(given: dict[str, Any], norm: str) -> None:
    assert keys_of("decoder", **given)["norm"] == norm


@pytest.mark.parametrize(
    ("architecture", "given", "message"),
    [
        ("decoder", {"decoder_normalize_before": False}, "subln=true, decoder_normalize_before=fa"),
        ("decoder", {"deepnorm": True}, "deepnorm=true, subln=true: Magnetar has Pre-LN"),
        (
            "decoder",
            {"deepnorm": True, "subln": False},
            "deepnorm=true, decoder_normalize_before=true",
        ),
        (
            "encoder_decoder",
            {"subln": False, "encoder_normalize_before": False},
            "encoder_normalize_before=false, decoder_normalize_before=true: Magnetar has",
        ),
        ("encoder", {"normalize_output": False}, "normalize_output=false leaves out the norm"),
        ("decoder", {"activation_fn": "gelu_fast"}, "activation_fn='gelu_fast' is none of Torch"),
        ("decoder", {"multiway": True}, "multiway=true in a decoder"),
        ("encoder_decoder", {"multiway": True}, "multiway=true in an encoder and its decoder, wh"),
        ("encoder_decoder", {"encoder_embed_dim": 8}, "encoder_embed_dim=8 and decoder_embed_dim="),
        ("encoder_decoder", {"decoder_ffn_embed_dim": 8}, "encoder_ffn_embed_dim=3072 and decoder"),
        ("encoder_decoder", {"decoder_attention_heads": 8}, "encoder_attention_heads=12 and dec"),
        ("decoder", {"moe_freq": 1}, "moe_freq=1, moe_expert_count=0: a MoE model has both at 1"),
        ("decoder", {"moe_freq": -1, "moe_expert_count": 2}, "moe_freq=-1, moe_expert_count=2"),
        (
            "decoder",
            {"moe_freq": 1, "moe_expert_count": 4, "moe_second_expert_policy": "best"},
            "moe_second_expert_policy='best' is none of TorchScale's",
        ),
        (
            "decoder",
            {"moe_freq": 1, "moe_expert_count": 4, "moe_eval_capacity_token_fraction": -1.0},
            "moe_eval_capacity_token_fraction=-1 asks for the capacity of training",
        ),
    ],
)
def test_what_magnetar_has_no_key_for_is_refused_by_name(
    architecture: Architecture, given: dict[str, Any], message: str
) -> None:
    options = resolve(architecture, given, "o.json", final=True)
    with pytest.raises(UserError, match=f"o.json: {message}"):
        model_keys(architecture, options, "o.json")


@pytest.mark.parametrize(
    "given", [{}, {"moe_expert_count": 4}, {"moe_freq": 2}, {"moe_freq": 0, "moe_expert_count": 4}]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_x_moe_without_experts_is_refused_as_in_torchscales_constructor(
    architecture: Architecture, given: dict[str, int], torchscale: None
) -> None:
    from torchscale.architecture import config

    with pytest.raises(AssertionError):
        getattr(config, CLASSES[architecture])(use_xmoe=True, **given)
    with pytest.raises(UserError, match=r"o.json: use_xmoe=true, moe_freq=\d, moe_expert_count=\d"):
        resolve(architecture, {"use_xmoe": True, **given}, "o.json")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_without_effect_are_left_at_their_defaults(architecture: Architecture) -> None:
    keys = keys_of(architecture, xpos_scale_base=64, rel_pos_buckets=16)
    assert not [name for name in keys if name.startswith(("relative_", "xpos_"))]
    moe = {"moe_freq": 1, "moe_expert_count": 4}
    single = keys_of(architecture, **moe, moe_top1_expert=True)["moe"]
    assert "normalize_weights" not in single
    assert single["second_expert"] == "all"
    assert keys_of(architecture, **moe)["moe"]["normalize_weights"] == "after_dropping"


def test_a_post_ln_encoder_has_no_norm_at_its_end_to_leave_out() -> None:
    keys = keys_of("encoder", deepnorm=True, normalize_output=False)
    assert keys["norm"] == "deepnorm"


def test_every_kind_of_noise_in_training_has_its_key() -> None:
    given = {
        "dropout": 0.1,
        "attention_dropout": 0.2,
        "activation_dropout": 0.3,
        "drop_path_rate": 0.4,
    }
    keys = keys_of("decoder", **given)
    names = ("dropout", "attention_dropout", "activation_dropout", "drop_path")
    assert [keys[name] for name in names] == [0.1, 0.2, 0.3, 0.4]


def test_relative_positions_need_both_of_their_options() -> None:
    assert keys_of("decoder", rel_pos_buckets=32)["attention_positions"] == "none"
    keys = keys_of("decoder", rel_pos_buckets=16, max_rel_pos=64)
    assert (keys["relative_buckets"], keys["relative_max_distance"]) == (16, 64)
    assert keys["relative_bidirectional"]
    assert "relative_bidirectional" not in keys_of("encoder", rel_pos_buckets=16, max_rel_pos=64)


def test_a_model_whose_moe_layers_would_come_after_its_last_is_dense() -> None:
    assert "moe" not in keys_of("decoder", decoder_layers=3, moe_freq=4, moe_expert_count=2)
    assert keys_of("decoder", decoder_layers=3, moe_freq=3, moe_expert_count=2)["moe"]["every"] == 3


@pytest.mark.parametrize("num_experts", [2, 3, 7, 10, 49, 64, 107])
def test_the_capacity_of_training_in_evaluation_is_a_share_with_one_expert_a_token(
    num_experts: int,
) -> None:
    keys = keys_of(
        "decoder",
        moe_freq=1,
        moe_expert_count=num_experts,
        moe_top1_expert=True,
        moe_eval_capacity_token_fraction=0,
    )
    share = keys["moe"]["eval_capacity_fraction"]
    for num_tokens in range(1, 3000):
        assert math.ceil(share * num_tokens) == -(-num_tokens // num_experts)


def test_where_every_expert_has_room_for_all_tokens_nothing_is_dropped() -> None:
    for given in (
        {"moe_expert_count": 4, "moe_eval_capacity_token_fraction": 1.0},
        {"moe_expert_count": 4, "moe_eval_capacity_token_fraction": 2},
        {"moe_expert_count": 2, "moe_eval_capacity_token_fraction": -1},
        {"moe_expert_count": 1, "moe_eval_capacity_token_fraction": -1, "moe_top1_expert": True},
    ):
        assert keys_of("decoder", moe_freq=1, **given)["moe"]["eval_capacity_fraction"] is None


def test_departures_from_the_papers_become_keys_and_notes() -> None:
    given = {"moe_freq": 1, "moe_expert_count": 4, "use_xmoe": True}
    options = resolve("encoder_decoder", given, "o.json")
    keys, notes = model_keys("encoder_decoder", options, "o.json")
    assert keys["cross_attention_inner_norm"] is False
    moe = keys["moe"]
    assert (moe["normalize_tokens"], moe["learned_temperature"], moe["d_router"]) == (
        False,
        False,
        16,
    )
    assert moe["route_padding"]
    assert moe["time_major"]
    assert (moe["dispatch"], moe["capacity_factor"]) == ("capacity", 1.0)
    assert moe["second_expert"] == "random"
    assert MoEConfig.model_validate(moe).normalize_weights == "before_dropping"
    for name in ("cross_attention_inner_norm", "normalize_tokens", "route_padding", "time_major"):
        assert any(f"{name}=" in note for note in notes)
    decoder = keys_of("decoder", **given)
    assert "time_major" not in decoder["moe"]
    assert "cross_attention_inner_norm" not in decoder
