"""Each contradiction of a model is refused, and what its message proposes is accepted."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.config import ModelConfig, MoEConfig

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


def test_the_router_width_belongs_to_the_xmoe_router() -> None:
    message = moe_message(num_experts=4, router="linear", d_router=8)
    assert "d_router=8 belongs to router 'xmoe': leave it out, or use router 'xmoe'" in message
    MoEConfig(num_experts=4, router="xmoe", d_router=8)
    MoEConfig(num_experts=4, router="linear")


@pytest.mark.parametrize(
    ("num_experts", "d_router", "width"), [(32, None, 16), (8, None, 8), (4, None, 8), (32, 5, 5)]
)
def test_the_router_is_half_as_wide_as_there_are_experts(
    num_experts: int, d_router: int | None, width: int
) -> None:
    assert MoEConfig(num_experts=num_experts, d_router=d_router).router_width == width


@pytest.mark.parametrize(("every", "sparse"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (4, [3])])
def test_every_nth_layer_is_a_moe_layer(every: int, sparse: list[int]) -> None:
    config = ModelConfig.model_validate(DENSE | {"moe": {"num_experts": 4, "every": every}})
    assert [i for i in range(4) if config.is_moe_layer(i)] == sparse
    assert not any(ModelConfig.model_validate(DENSE).is_moe_layer(i) for i in range(4))
