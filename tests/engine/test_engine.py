import math

import pytest
from torch import nn

from engine.config import LRSchedule
from engine.engine import lr_factor, parameter_groups
from models.config import ModelConfig, MoEConfig
from models.transformer import build_model

POLYNOMIAL = LRSchedule(type="polynomial", warmup_steps=10, total_steps=110, power=1.0, end_lr=1e-4)


def test_warm_up_rises_in_a_straight_line_to_the_full_rate() -> None:
    factor = lr_factor(POLYNOMIAL, 1e-3, 110)
    assert [factor(step) for step in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])


def test_polynomial_ends_at_end_lr_and_stays_there() -> None:
    factor = lr_factor(POLYNOMIAL, 1e-3, 110)
    assert factor(59) == pytest.approx(0.1 + 0.9 * 0.5)
    assert factor(109) == pytest.approx(0.1)
    assert factor(500) == pytest.approx(0.1)


def test_polynomial_power_is_the_exponent_of_what_is_left() -> None:
    schedule = LRSchedule(type="polynomial", warmup_steps=0, total_steps=100, power=2.0)
    assert lr_factor(schedule, 1e-3, 7)(49) == pytest.approx((1 - 49 / 99) ** 2)


def test_total_steps_is_the_length_of_the_run_unless_given() -> None:
    schedule = LRSchedule(type="polynomial", warmup_steps=1)
    assert lr_factor(schedule, 1.0, 40)(39) == pytest.approx(0.0)


def test_inverse_sqrt_follows_the_root_of_the_step() -> None:
    factor = lr_factor(LRSchedule(type="inverse_sqrt", warmup_steps=100), 1e-3, 10_000)
    assert factor(99) == pytest.approx(1.0)
    assert factor(399) == pytest.approx(0.5)
    assert factor(9_999) == pytest.approx(math.sqrt(100 / 10_000))


def test_constant_stays() -> None:
    factor = lr_factor(LRSchedule(type="constant", warmup_steps=0), 1e-3, 10)
    assert {factor(step) for step in (0, 5, 100)} == {1.0}


@pytest.fixture
def model() -> nn.Module:
    moe = MoEConfig(num_experts=4, every=2, top_k=2)
    config = ModelConfig(
        vocab_size=50, num_layers=2, d_model=16, d_ff=32, num_heads=2, max_seq_len=8, moe=moe
    )
    return build_model(config, seed=1)


def test_every_parameter_is_in_exactly_one_group(model: nn.Module) -> None:
    grouped = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert len(grouped) == len(set(map(id, grouped))) == len(list(model.parameters()))


def test_experts_form_groups_of_their_own_with_their_number(model: nn.Module) -> None:
    for group in parameter_groups(model, 0.1):
        is_expert = {hasattr(p, "num_experts") for p in group["params"]}
        assert is_expert == {group.get("moe", False)}
        if group.get("moe"):
            assert group["num_experts"] == 4
            assert group["name"] == "ep_size_1"


def test_matrices_decay_and_vectors_do_not(model: nn.Module) -> None:
    decay = {
        id(p): group["weight_decay"]
        for group in parameter_groups(model, 0.1)
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        is_vector = last in {"bias", "b1", "b2", "norm_weight", "norm_bias", "temperature"} or (
            "norm" in name and last == "weight"
        )
        assert decay[id(parameter)] == (0.0 if is_vector else 0.1), name


def test_frozen_parameters_are_left_out(model: nn.Module) -> None:
    model.get_parameter("embedding.weight").requires_grad_(False)
    grouped = {id(p) for group in parameter_groups(model, 0.1) for p in group["params"]}
    assert id(model.get_parameter("embedding.weight")) not in grouped
