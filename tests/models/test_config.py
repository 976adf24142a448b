"""Each contradiction of a model is refused, and what its message proposes is accepted."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from magnetar.models.config import ModelConfig
from magnetar.models.layers.positions import Rotary
from magnetar.models.moe.config import MoEConfig
from magnetar.models.moe.layer import MoE
from magnetar.models.transformer import empty_model

TWO_STACKS = {"architecture": "encoder_decoder"}
DENSE = {"num_layers": 4, "d_model": 12, "d_ff": 8, "num_heads": 3, "max_seq_len": 16}


def model_message(**keys: object) -> str:
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(DENSE | keys)
    return str(caught.value)


def moe_message(**keys: object) -> str:
    with pytest.raises(ValidationError) as caught:
        MoEConfig.model_validate(keys)
    return str(caught.value)


@settings(max_examples=60, deadline=None)
@given(d_model=st.integers(2, 64), num_heads=st.integers(1, 70))
def test_heads_that_do_not_divide_the_width_are_refused_with_ways_out(
    d_model: int, num_heads: int
) -> None:
    keys = {"d_model": d_model, "num_heads": num_heads}
    if d_model % num_heads == 0:
        ModelConfig.model_validate(DENSE | keys)
        return
    message = model_message(**keys)
    found = re.search(
        rf"d_model={d_model} must be a multiple of num_heads={num_heads}: "
        r"use (\d+) heads, or d_model (\d+)",
        message,
    )
    assert found
    ModelConfig.model_validate(DENSE | keys | {"num_heads": int(found[1])})
    ModelConfig.model_validate(DENSE | keys | {"d_model": int(found[2])})


@pytest.mark.parametrize(
    ("keys", "shown", "way_out"),
    [
        (
            {"num_heads": 6, "num_kv_heads": 4},
            "num_kv_heads=4 must divide num_heads=6: use one of 1, 2, 3, 6",
            {"num_kv_heads": 3},
        ),
        (
            {"attention_positions": "rotary", "head_dim": 5},
            "attention_positions='rotary' turns pairs of numbers, but head_dim=5 is odd: use 6",
            {"head_dim": 6},
        ),
        (
            {"rope_theta": 5e5},
            "rope_theta=500000.0 belongs to attention_positions 'rotary', but",
            {"attention_positions": "rotary"},
        ),
        (
            {"rope_scaling": {"factor": 2.0}},
            "rope_scaling belongs to attention_positions 'rotary', but attention_positions is ",
            {"attention_positions": "rotary"},
        ),
        (
            {
                "attention_positions": "rotary",
                "rope_scaling": {
                    "factor": 2.0,
                    "original_max_seq_len": 9,
                    "low_freq_factor": 5.0,
                },
            },
            "high_freq_factor=4.0 must exceed low_freq_factor=5.0: use 10.0, say",
            {"rope_scaling": {"factor": 2.0, "original_max_seq_len": 9}},
        ),
        (
            {
                "attention_positions": "rotary",
                "rope_scaling": {"factor": 2.0, "low_freq_factor": 0.5},
            },
            "low_freq_factor=0.5 belongs to original_max_seq_len, which is null: leave it out",
            {"rope_scaling": {"factor": 2.0}},
        ),
        (
            {"qk_norm_over": "all_heads"},
            "qk_norm_over='all_heads' belongs to qk_norm true: leave it out, or use qk_norm true",
            {"qk_norm": True},
        ),
        (
            {"moe": {"num_experts": 4, "first_dense_layers": 4}},
            "moe.first_dense_layers=4 leaves no MoE layer among 4, of which moe.every=2 chooses: "
            "use 3 or fewer, or moe null",
            {"moe": {"num_experts": 4, "first_dense_layers": 3}},
        ),
        (
            {"moe": {"num_experts": 4, "shared_gate": True}},
            "shared_gate=true belongs to shared experts, and shared_d_ff is null: leave it out",
            {"moe": {"num_experts": 4, "shared_gate": True, "shared_d_ff": 3}},
        ),
    ],
)
def test_keys_of_attention_and_experts_that_do_not_fit_are_refused(
    keys: dict, shown: str, way_out: dict
) -> None:
    assert shown in model_message(**keys)
    ModelConfig.model_validate(DENSE | keys | way_out)


def test_a_width_of_its_own_frees_heads_from_the_models() -> None:
    found = ModelConfig.model_validate(DENSE | {"num_heads": 5, "head_dim": 4})
    assert (found.d_model, found.head_width) == (12, 4)
    assert ModelConfig.model_validate(DENSE).head_width == 4


def test_dense_first_layers_have_no_number_of_experts() -> None:
    moe = {"num_experts": [2, 4], "every": 1, "first_dense_layers": 2}
    model = empty_model(ModelConfig.model_validate(DENSE | {"vocab_size": 9, "moe": moe}))
    layers = [block.ffn for block in model.blocks]
    assert [isinstance(layer, MoE) for layer in layers] == [False, False, True, True]
    assert [layer.num_experts for layer in layers[2:]] == [2, 4]


def test_a_vocabulary_that_no_memory_holds_is_refused() -> None:
    assert "less than or equal to 16777216" in model_message(vocab_size=(1 << 24) + 1)
    ModelConfig.model_validate(DENSE | {"vocab_size": 1 << 24})


def test_a_model_without_any_moe_layer_is_refused_with_a_way_out() -> None:
    message = model_message(moe={"num_experts": 4, "every": 5})
    assert "moe.every=5 exceeds num_layers=4" in message
    assert "use at most 4, or moe null" in message
    assert ModelConfig.model_validate(DENSE | {"moe": {"num_experts": 4, "every": 4}}).moe
    assert ModelConfig.model_validate(DENSE | {"moe": None}).moe is None


def test_both_contradictions_of_a_model_are_listed_at_once() -> None:
    message = model_message(num_heads=5, moe={"num_experts": 4, "every": 5})
    assert "num_heads=5" in message
    assert "moe.every=5" in message


@settings(max_examples=60, deadline=None)
@given(num_experts=st.integers(2, 24), ep_size=st.integers(1, 30))
def test_an_ep_size_that_does_not_divide_the_experts_is_refused_with_ways_out(
    num_experts: int, ep_size: int
) -> None:
    if num_experts % ep_size == 0:
        MoEConfig(num_experts=num_experts, ep_size=ep_size)
        return
    message = moe_message(num_experts=num_experts, ep_size=ep_size)
    found = re.search(r"use (\d+) experts, or one of the ep_size \[([\d, ]+)\]", message)
    assert found
    assert f"num_experts={num_experts} must be a multiple of ep_size={ep_size}" in message
    MoEConfig(num_experts=int(found[1]), ep_size=ep_size)
    for size in found[2].split(", "):
        MoEConfig(num_experts=num_experts, ep_size=int(size))


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        ({"placement": "across_nodes"}, "placement=across_nodes belongs to ep_size > 1"),
        ({"placement": "", "ep_size": 2}, "'within_nodes' or 'across_nodes'"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(keys: dict, shown: str) -> None:
    assert shown in moe_message(**({"num_experts": 8} | keys))


@pytest.mark.parametrize("exchange", ["auto", "flat"])
@pytest.mark.parametrize("chunks", [None, 1])
def test_a_stored_section_with_retired_keys_is_read(exchange: str, chunks: int | None) -> None:
    section = {"num_experts": 8, "ep_size": 2, "exchange": exchange, "exchange_chunks": chunks}
    assert MoEConfig.model_validate(section) == MoEConfig(num_experts=8, ep_size=2)


@pytest.mark.parametrize("keys", [{"exchange": "hierarchical"}, {"exchange_chunks": 2}])
def test_a_retired_key_that_asks_for_more_is_refused(keys: dict) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        MoEConfig.model_validate({"num_experts": 8, "ep_size": 2} | keys)


def test_more_choices_than_experts_are_refused_with_a_way_out() -> None:
    message = moe_message(num_experts=1, top_k=2)
    assert "top_k=2 must not exceed num_experts=1: use top_k 1, or more experts" in message
    MoEConfig(num_experts=1, top_k=1)
    MoEConfig(num_experts=2, top_k=2)


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        ({"dispatch": "capacity"}, "capacity_factor=null does not fit dispatch='capacity'"),
        ({"capacity_factor": 1.5}, "capacity_factor=1.5 does not fit dispatch='dropless'"),
    ],
)
def test_capacity_factor_belongs_to_capacity(keys: dict, shown: str) -> None:
    assert shown in moe_message(num_experts=4, **keys)
    MoEConfig(num_experts=4, dispatch="capacity", capacity_factor=1.0)
    MoEConfig(num_experts=4)


@pytest.mark.parametrize(
    ("num_experts", "expected"),
    [
        ([4, 8, 8], "of which moe.every=2 makes 2, not 3: give as many, or one number for all"),
        (
            [4, 6],
            "num_experts=[4, 6] must be a multiple of ep_size=4 (6 is not): use 8 experts, or",
        ),
        ([4, 1], "top_k=2 must not exceed num_experts=[4, 1]: use top_k 1"),
        ([], "num_experts=[] has no layer: give one number for each MoE layer"),
    ],
)
def test_layers_of_different_numbers_of_experts_are_all_checked(
    num_experts: list[int], expected: str
) -> None:
    ep_size = 4 if 6 in num_experts else 1
    assert expected in model_message(moe={"num_experts": num_experts, "ep_size": ep_size})


def test_each_moe_layer_has_the_number_of_experts_of_its_place() -> None:
    keys = DENSE | {"architecture": "encoder_decoder", "num_decoder_layers": 2}
    moe = {"num_experts": [4, 8, 32]}  # two of the encoder, one of the decoder
    model = empty_model(ModelConfig.model_validate(keys | {"vocab_size": 9, "moe": moe}))
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    by_place = {name: m.num_experts for name, m in model.named_modules() if isinstance(m, MoE)}
    assert by_place == {
        "encoder.blocks.1.ffn": 4,
        "encoder.blocks.3.ffn": 8,
        "decoder.blocks.1.ffn": 32,
    }
    widths = {m.num_experts: m.deepspeed_moe.gate.projection.out_features for m in layers}
    assert widths == {4: 8, 8: 8, 32: 16}


@pytest.mark.parametrize(
    ("num_experts", "d_router", "width"), [(32, None, 16), (8, None, 8), (4, None, 8), (32, 5, 5)]
)
def test_the_router_is_half_as_wide_as_there_are_experts(
    num_experts: int, d_router: int | None, width: int
) -> None:
    assert MoEConfig(num_experts=num_experts, d_router=d_router).of_layer(0).router_width == width


@pytest.mark.parametrize(("every", "sparse"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (4, [3])])
def test_every_nth_layer_is_a_moe_layer(every: int, sparse: list[int]) -> None:
    config = ModelConfig.model_validate(DENSE | {"moe": {"num_experts": 4, "every": every}})
    assert [i for i in range(4) if config.is_moe_layer(i)] == sparse
    assert not any(ModelConfig.model_validate(DENSE).is_moe_layer(i) for i in range(4))


@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("num_decoder_layers", 3, "3"),
        ("max_target_len", 7, "7"),
        ("share_embeddings", True, "true"),
    ],
)
def test_what_two_stacks_have_is_refused_in_one(
    architecture: str, key: str, value: object, shown: str
) -> None:
    message = model_message(**{"architecture": architecture, key: value})
    assert (
        f"{key}={shown} belongs to architecture 'encoder_decoder', but architecture is "
        f"'{architecture}': leave it out"
    ) in message
    accept(architecture=architecture)
    accept(**TWO_STACKS, **{key: value})


def accept(**keys: object) -> ModelConfig:
    return ModelConfig.model_validate(DENSE | keys)


@pytest.mark.parametrize(
    ("architecture", "norm"),
    [("decoder", "subln"), ("encoder", "subln"), ("encoder_decoder", "deepnorm")],
)
def test_sub_lns_choice_in_cross_attention_is_refused_elsewhere(
    architecture: str, norm: str
) -> None:
    keys = {"architecture": architecture, "norm": norm}
    message = model_message(cross_attention_inner_norm=False, **keys)
    assert (
        "cross_attention_inner_norm=false belongs to norm 'subln' in architecture "
        f"'encoder_decoder', not to norm '{norm}' in '{architecture}': leave it out"
    ) in message
    accept(**keys)
    accept(**TWO_STACKS, norm="subln", cross_attention_inner_norm=False)


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_multiway_belongs_to_an_encoder(architecture: str) -> None:
    message = model_message(architecture=architecture, multiway=True)
    assert (
        "multiway=true belongs to architecture 'encoder', but architecture is "
        f"'{architecture}': leave it out"
    ) in message
    accept(architecture=architecture)
    accept(architecture="encoder", multiway=True)


def test_multiway_and_moe_contradict_each_other() -> None:
    keys = {"architecture": "encoder", "multiway": True, "moe": {"num_experts": 4}}
    message = model_message(**keys)
    assert "multiway=true and moe contradict each other" in message
    assert "keep one of them" in message
    accept(**keys | {"multiway": False})
    accept(**keys | {"moe": None})


def test_nothing_is_tied_to_an_output_that_is_not_there() -> None:
    message = model_message(output_projection=False)
    assert "output_projection=false leaves nothing to tie, and magnetar train" in message
    assert "set tie_embeddings false as well for a model that is not trained" in message
    accept(output_projection=False, tie_embeddings=False)
    accept(tie_embeddings=False)


@pytest.mark.parametrize("kind", ["rotary", "xpos", "xpos_relative"])
def test_turning_needs_heads_of_even_width(kind: str) -> None:
    message = model_message(attention_positions=kind, num_heads=4)  # 12 / 4 = 3
    assert (
        f"attention_positions='{kind}' turns pairs of numbers, but a head has d_model / num_heads "
        "= 3: use a num_heads among 1, 2, 3, 6"
    ) in message
    accept(attention_positions=kind, num_heads=3)
    accept(attention_positions="relative", num_heads=4)


@pytest.mark.parametrize("kind", ["xpos", "xpos_relative"])
def test_factors_of_xpos_fit_float32(kind: str) -> None:
    keys = {"attention_positions": kind, "d_model": 6}
    for more, positions in (({"max_seq_len": 131072}, 131072), ({"max_target_len": 70000}, 70000)):
        keys |= more
        keys["architecture"] = "encoder_decoder" if "max_target_len" in more else "decoder"
        keys["max_seq_len"] = more.get("max_seq_len", 8)
        message = model_message(**keys)
        found = re.search(
            rf"xpos_scale_base=512.0 is too small for {positions} positions, whose products reach "
            r"3.5\^\(positions / xpos_scale_base\) and leave float32: use at least ([\d.]+), or "
            "fewer positions",
            message,
        )
        assert found
        base = float(found[1])
        accept(**keys, xpos_scale_base=base)
        accept(**keys | {"attention_positions": "rotary"})
        rotary = Rotary(2, positions, base)
        q, k = torch.tensor([[1.0, 2.0], [3.0, -4.0]]).view(2, 1, 1, 1, 2)
        for position in (0, positions - 1):
            turned_q, turned_k = rotary(q, k, position)
            assert (turned_q * turned_k).sum().item() == pytest.approx(-5.0, rel=1e-4)


@pytest.mark.parametrize(
    ("keys", "fitting"),
    [
        ({"relative_buckets": 7}, {"attention_positions": "relative"}),
        ({"relative_max_distance": 99}, {"attention_positions": "xpos_relative"}),
        ({"relative_bidirectional": True}, {"attention_positions": "relative"}),
        ({"xpos_scale_base": 64.0}, {"attention_positions": "xpos"}),
    ],
    ids=str,
)
def test_what_shapes_positions_belongs_to_positions_of_that_kind(keys: dict, fitting: dict) -> None:
    keys, fitting = keys | {"num_heads": 3}, fitting | {"num_heads": 3}
    (name, value), *_ = keys.items()
    message = model_message(**keys)
    assert f"{name}={str(value).lower()} belongs to " in message
    assert "but attention_positions is 'none': leave it out" in message
    accept(**keys | fitting)


def test_a_single_expert_is_weighed_by_softmax() -> None:
    message = moe_message(num_experts=1, top_k=1, gate="sigmoid")
    assert "gate='sigmoid' would weigh a single expert by its score" in message
    MoEConfig(num_experts=1, top_k=1)


@pytest.mark.parametrize(
    ("keys", "exact"),
    [
        ({}, 16),
        ({"relative_bidirectional": True}, 8),
        ({"architecture": "encoder"}, 8),
        (TWO_STACKS, 16),
        ({"attention_positions": "xpos_relative"}, 16),
    ],
    ids=str,
)
def test_the_largest_distance_lies_beyond_the_exact_buckets(keys: dict, exact: int) -> None:
    keys = {"attention_positions": "relative", "relative_buckets": 32} | keys
    for distance in (2, exact):
        message = model_message(relative_max_distance=distance, **keys)
        found = re.search(
            rf"relative_max_distance={distance} must exceed {exact}: of relative_buckets=32, so "
            r"many hold one small distance each: use (\d+) or more, or fewer buckets",
            message,
        )
        assert found
        assert int(found[1]) == exact + 1
        few = keys | {"relative_buckets": 4}
        assert accept(relative_max_distance=max(distance, 3), **few)
    accept(relative_max_distance=exact + 1, **keys)


@pytest.mark.parametrize("kind", ["sinusoidal", "sinusoidal_fairseq"])
@pytest.mark.parametrize("d_model", [2, 9])
def test_sinusoids_need_an_even_width(kind: str, d_model: int) -> None:
    keys = {"d_model": d_model, "num_heads": 1}
    message = model_message(positions=kind, **keys)
    assert (
        f"positions='{kind}' needs an even d_model of at least 4, not {d_model}: use another "
        "d_model, or positions 'learned'"
    ) in message
    accept(positions="learned", **keys)
    accept(positions=kind, num_heads=1, d_model=4)


def test_all_contradictions_of_two_sections_are_listed_at_once() -> None:
    message = model_message(
        multiway=True,
        output_projection=False,
        max_target_len=3,
        relative_buckets=7,
    )
    for key in ("multiway=true", "output_projection=false", "max_target_len=3", "buckets=7"):
        assert key in message


@pytest.mark.parametrize(
    ("key", "value", "other", "kind", "given"),
    [
        ("capacity_order", "batch_prioritized", "dispatch", "capacity", "dropless"),
        ("capacity_order", "random", "dispatch", "capacity", "dropless"),
        ("capacity_scope", "rank", "dispatch", "capacity", "dropless"),
        ("d_router", 8, "router", "xmoe", "linear"),
        ("normalize_tokens", False, "router", "xmoe", "linear"),
        ("learned_temperature", False, "router", "xmoe", "linear"),
    ],
)
def test_a_key_of_a_kind_is_refused_without_it(
    key: str, value: object, other: str, kind: str, given: str
) -> None:
    keys = {"num_experts": 4, other: given}
    message = moe_message(**keys, **{key: value})
    assert (
        f"{key}={repr(value).lower()} belongs to {other} '{kind}', but {other} is '{given}': leave "
        f"it out, or use {other} '{kind}'"
    ) in message
    assert ("with a capacity_factor" in message) == (kind == "capacity")
    MoEConfig.model_validate(keys)
    factor = {"capacity_factor": 1.0} if kind == "capacity" else {}
    MoEConfig.model_validate({"num_experts": 4, other: kind, key: value} | factor)


def test_a_balance_of_the_whole_batch_does_not_go_with_dropping_in_parts_of_it() -> None:
    keys = {"num_experts": 4, "balance_scope": "batch"}
    message = moe_message(**keys, dispatch="capacity", capacity_factor=1.0)
    assert (
        "balance_scope='batch' does not go with dispatch 'capacity', where each accumulation step "
        "drops its own tokens: use balance_scope 'micro_step', or dispatch 'dropless'"
    ) in message
    MoEConfig.model_validate(keys)


@pytest.mark.parametrize("policy", ["sampled", "random"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_policies_for_a_second_expert_need_two(policy: str, top_k: int) -> None:
    message = moe_message(num_experts=4, second_expert=policy, top_k=top_k)
    assert (
        f"second_expert='{policy}' needs top_k 2, not {top_k}: use second_expert 'all', or top_k 2"
    ) in message
    MoEConfig(num_experts=4, second_expert="all", top_k=top_k)
    MoEConfig(num_experts=4, second_expert=policy, top_k=2)


def test_a_second_expert_by_its_weight_needs_probabilities() -> None:
    message = moe_message(num_experts=4, second_expert="random", gate="sigmoid")
    assert (
        "second_expert='random' needs gate 'softmax', whose weights are probabilities: use "
        "second_expert 'all', or gate 'softmax'"
    ) in message
    MoEConfig(num_experts=4, second_expert="all", gate="sigmoid")
    MoEConfig(num_experts=4, second_expert="sampled", gate="sigmoid")
    MoEConfig(num_experts=4, second_expert="random", gate="softmax")


@pytest.mark.parametrize(
    ("keys", "encoder", "decoder"),
    [
        ({}, 0, 4),
        ({"architecture": "encoder"}, 4, 0),
        (TWO_STACKS, 4, 4),
        (TWO_STACKS | {"num_decoder_layers": 7}, 4, 7),
    ],
)
def test_depths_follow_the_architecture(keys: dict, encoder: int, decoder: int) -> None:
    config = accept(**keys)
    assert (config.encoder_depth, config.decoder_depth) == (encoder, decoder)


def test_the_deeper_stack_may_have_the_only_moe_layer() -> None:
    moe = {"num_experts": 4, "every": 6}
    accept(**TWO_STACKS, num_decoder_layers=6, moe=moe)
    message = model_message(**TWO_STACKS, num_decoder_layers=5, moe=moe)
    assert "moe.every=6 exceeds num_decoder_layers=5" in message
    assert "use at most 5, or moe null" in message


@pytest.mark.parametrize(
    ("keys", "absolute", "relative", "rotary"),
    [
        ({}, "learned", False, False),
        ({"attention_positions": "relative"}, "none", True, False),
        ({"attention_positions": "rotary"}, "none", False, True),
        ({"attention_positions": "xpos"}, "none", False, True),
        ({"attention_positions": "xpos_relative"}, "none", True, True),
        ({"attention_positions": "rotary", "positions": "learned"}, "learned", False, True),
        ({"positions": "none"}, "none", False, False),
        ({"positions": "sinusoidal_fairseq"}, "sinusoidal_fairseq", False, False),
    ],
)
def test_positions_are_learned_unless_attention_has_its_own(
    keys: dict, absolute: str, relative: bool, rotary: bool
) -> None:
    config = accept(**keys)
    assert config.absolute_positions == absolute
    assert (config.is_relative, config.is_rotary) == (relative, rotary)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (ModelConfig, "dropout", 1.0),
        (ModelConfig, "activation_dropout", -0.1),
        (ModelConfig, "drop_path", 1.0),
        (ModelConfig, "attention_dropout", 1.5),
        (ModelConfig, "norm_eps", 0.0),
        (ModelConfig, "xpos_scale_base", 0.0),
        (ModelConfig, "relative_buckets", 2),
        (ModelConfig, "relative_max_distance", 1),
        (ModelConfig, "norm", "rms"),
        (ModelConfig, "positions", "rotary"),
        (ModelConfig, "num_layers", 2.0),
        (ModelConfig, "multiway", 1),
        (MoEConfig, "jitter", 1.0),
        (MoEConfig, "top_k", 0),
        (MoEConfig, "eval_capacity_fraction", 1.2),
        (MoEConfig, "router_z_loss_weight", -1.0),
        (MoEConfig, "aux_loss_weight", float("nan")),
        (MoEConfig, "experts", 3),
    ],
)
def test_values_out_of_range_and_unknown_keys_are_refused_by_name(
    section: type, key: str, value: object
) -> None:
    message = (model_message if section is ModelConfig else moe_message)(
        **({key: value} if section is ModelConfig else {"num_experts": 4, key: value})
    )
    assert re.search(rf"^{key}$", message, re.MULTILINE), message
