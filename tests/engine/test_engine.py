import math
from typing import Any

import pytest
import torch
from torch import nn

from engine.config import LRSchedule
from engine.engine import LossWeights, lr_factor, parameter_groups, train_step
from models.config import ModelConfig, MoEConfig
from models.deepspeed_moe import moe_class
from models.moe import RoutingStats
from models.transformer import ModelOutput, build_model
from tests.ranks import run_on_ranks

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
    return build_model(config, 1, moe_class(zero_stage=0))


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


class FakeEngine:
    """A model whose logits and routing are given, and what it was asked to minimise."""

    def __init__(self, outputs: list[ModelOutput]) -> None:
        self.outputs, self.minimised = outputs, []

    def __call__(self, tokens: torch.Tensor) -> ModelOutput:
        return self.outputs[int(tokens)]

    def get_lr(self) -> list[float]:
        return [0.5]

    def backward(self, loss: torch.Tensor) -> None:
        self.minimised.append(float(loss))

    def step(self) -> None:
        pass


def fake_step(weights: LossWeights) -> tuple[Any, FakeEngine, list[dict[str, float]]]:
    """A step of two micro-batches, and what its losses should be, in float64 loops."""
    torch.manual_seed(0)
    outputs, batches, expected = [], [], []
    for index in range(2):
        logits = 3 * torch.randn(2, 5, 7)
        targets = torch.randint(0, 7, (2, 5))
        targets[0, :3] = -100
        layers = torch.rand(2, 2).double()
        routing = [
            RoutingStats(aux, *([torch.zeros(())] * 4), z_loss=z) for aux, z in layers.float()
        ]
        outputs.append(ModelOutput(logits, routing))
        batches.append(((torch.tensor(index),), targets))
        losses, z_losses = [], []
        for row, target in zip(logits.flatten(0, 1).double(), targets.flatten(), strict=True):
            if target != -100:
                log_z = math.log(sum(math.exp(x) for x in row))
                losses.append(log_z - float(row[target]))
                z_losses.append(log_z**2)
        expected.append(
            {
                "loss": sum(losses) / len(losses),
                "z_loss": sum(z_losses) / len(z_losses),
                "aux_loss": float(layers[:, 0].mean()),
                "router_z_loss": float(layers[:, 1].mean()),
            }
        )
    engine = FakeEngine(outputs)
    return train_step(engine, batches, weights), engine, expected


def test_a_step_minimises_the_weighted_sum_of_its_losses() -> None:
    result, engine, expected = fake_step(LossWeights(aux=0.3, z=0.2, router_z=0.7))
    for found, parts in zip(engine.minimised, expected, strict=True):
        total = parts["loss"] + 0.3 * parts["aux_loss"] + 0.2 * parts["z_loss"]
        # float32 sums of ten terms.
        assert found == pytest.approx(total + 0.7 * parts["router_z_loss"], rel=1e-6)
    for name in expected[0]:
        mean = sum(parts[name] for parts in expected) / 2
        assert float(getattr(result, name)) == pytest.approx(mean, rel=1e-6)


def test_losses_without_weight_are_not_minimised() -> None:
    result, engine, expected = fake_step(LossWeights())
    assert engine.minimised == pytest.approx([parts["loss"] for parts in expected], rel=1e-6)
    assert float(result.z_loss) == 0


@pytest.mark.slow
@pytest.mark.parametrize("independent", [True, False])
def test_weight_decay_follows_its_recurrence(independent: bool) -> None:
    found, gradients, factors = run_on_ranks(
        "tests.engine.programs:weights_under_decay", 1, independent, 12
    )[0]
    lr, decay, (beta1, beta2), eps = 3e-3, 0.1, (0.9, 0.98), 1e-8
    weight, mean, square = found[0].double(), torch.zeros(()), torch.zeros(())
    assert len(set(factors)) > 8, "the schedule must move, or the two decays are alike"
    for step, (gradient, factor) in enumerate(zip(gradients, factors, strict=True), start=1):
        gradient = gradient.double()
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        update = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)
        shrink = decay if independent else lr * decay
        weight = weight - factor * (lr * update + shrink * weight)
        # float32 against float64 over 12 steps; the decays differ by half a weight here.
        assert torch.allclose(found[step].double(), weight, rtol=1e-5, atol=1e-6)
