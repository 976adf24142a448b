import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from magnetar.engine.build import early_end, lr_factor, parameter_groups
from magnetar.engine.config.schema import LRSchedule
from magnetar.engine.train_step import LossWeights, StepResult, train_step
from magnetar.models.config import ModelConfig
from magnetar.models.losses import token_losses
from magnetar.models.moe.config import MoEConfig
from magnetar.models.moe.deepspeed import moe_class
from magnetar.models.moe.layer import RoutingStats
from magnetar.models.transformer import ModelLosses, ModelOutput, build_model
from tests.ranks import run_on_ranks

POLYNOMIAL = {"type": "polynomial", "warmup_steps": 10, "total_steps": 110, "end_lr": 1e-4}
SQUARED = {"type": "polynomial", "warmup_steps": 0, "total_steps": 100, "power": 2.0}


@pytest.mark.parametrize(
    ("schedule", "num_steps", "expected"),
    [
        # Warm-up is a straight line to the full rate; polynomial ends at end_lr and stays there.
        (POLYNOMIAL, 110, {step: (step + 1) / 10 for step in range(10)}),
        (POLYNOMIAL, 110, {59: 0.1 + 0.9 * 0.5, 109: 0.1, 500: 0.1}),
        # The power is the exponent of what is left, and total_steps follows from the run's steps.
        (SQUARED, 7, {49: (1 - 49 / 99) ** 2}),
        ({"type": "polynomial", "warmup_steps": 1}, 40, {39: 0.0}),
        (
            {"type": "inverse_sqrt", "warmup_steps": 100},
            10_000,
            {99: 1.0, 399: 0.5, 9_999: math.sqrt(100 / 10_000)},
        ),
        ({"type": "constant", "warmup_steps": 0}, 10, {0: 1.0, 5: 1.0, 100: 1.0}),
    ],
)
def test_the_learning_rate_follows_its_schedule(
    schedule: dict[str, Any], num_steps: int, expected: dict[int, float]
) -> None:
    factor = lr_factor(LRSchedule(**schedule), 1e-3, num_steps)
    assert {step: factor(step) for step in expected} == pytest.approx(expected, rel=1e-12)


WARM_UP = {"warmup_steps": 20, "warmup_start_lr": 2e-4, "total_steps": 120}
DECAY = {"type": "wsd", "decay_steps": 40, "end_lr": 1e-4}


@pytest.mark.parametrize(
    ("schedule", "after_warm_up"),
    [
        # Rates in units of the peak of 1e-3, at n = 20, ..., 150 steps done.
        (
            {"type": "cosine", "end_lr": 1e-4},
            lambda n: 0.1 + 0.9 * np.cos(np.pi / 2 * np.minimum(n - 20, 100) / 100) ** 2,
        ),
        ({"type": "cosine"}, lambda n: np.cos(np.pi / 200 * np.minimum(n - 20, 100)) ** 2),
        (DECAY, lambda n: np.interp(n, [80, 120], [1.0, 0.1])),
        (
            DECAY | {"decay": "1-sqrt"},
            lambda n: 1 - 0.9 * np.sqrt(np.clip(n - 80, 0, 40) / 40),
        ),
        # Without a stable phase the line is that of the polynomial.
        ({"type": "wsd", "decay_steps": 100}, lambda n: np.maximum(120 - n, 0) / 100),
    ],
)
def test_the_learning_rate_follows_a_closed_form_at_every_step(
    schedule: dict[str, Any], after_warm_up: Callable[[np.ndarray], np.ndarray]
) -> None:
    factor = lr_factor(LRSchedule(**WARM_UP, **schedule), 1e-3, 7)
    found = [factor(step) for step in range(150)]
    done = np.arange(1, 151, dtype=np.float64)
    line = 0.2 + 0.8 * done[:19] / 20
    expected = np.concatenate([line, after_warm_up(done[19:])])
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)  # float64 against float64


def test_the_stable_phase_of_wsd_is_the_constant_rate_to_the_last_bit() -> None:
    warm_up = {"warmup_steps": 7, "warmup_start_lr": 1e-5}
    stable = lr_factor(LRSchedule(type="constant", **warm_up), 3e-3, 60)
    decays = lr_factor(LRSchedule(type="wsd", decay_steps=20, end_lr=1e-4, **warm_up), 3e-3, 60)
    assert [decays(step) for step in range(40)] == [stable(step) for step in range(40)]
    assert decays(40) < 1


@pytest.mark.parametrize(
    ("schedule", "num_steps", "parts"),
    [
        (POLYNOMIAL, 110, []),
        ({"type": "cosine", "warmup_steps": 1, "total_steps": 9}, 10, ["after 9 train at a learn"]),
        (DECAY | {"warmup_steps": 0, "total_steps": 40}, 41, ["train at end_lr=0.0001; use"]),
        (POLYNOMIAL, 111, ["total_steps=110 is less than num_steps=111", "end_lr=0.0001; use"]),
        (SQUARED, 300, ["after 100 train at a learning rate of 0", "use num_steps=100, or begin"]),
        ({"type": "polynomial", "warmup_steps": 1}, 40, []),
        ({"type": "constant", "warmup_steps": 0}, 10, []),
    ],
)
def test_a_schedule_that_ends_before_the_run_is_said(
    schedule: dict[str, Any], num_steps: int, parts: list[str]
) -> None:
    words = early_end(LRSchedule(**schedule), num_steps)
    assert bool(words) == bool(parts)
    assert all(part in words for part in parts)


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
        self.seen: list[dict[str, Any]] = []

    def __call__(
        self,
        tokens: torch.Tensor,
        sample_keys: torch.Tensor,
        targets: torch.Tensor,
        z_weight: float,
        label_smoothing: float,
    ) -> ModelLosses:
        has_gradients = torch.is_grad_enabled()
        self.seen.append(
            {"keys": sample_keys.tolist(), "draw": torch.rand(()), "has_gradients": has_gradients}
        )
        logits, routing = self.outputs[int(tokens)]
        identity = torch.eye(logits.size(-1))
        losses = token_losses(logits, identity, targets, z_weight, label_smoothing)
        return ModelLosses(losses, routing)

    def get_lr(self) -> list[float]:
        return [0.5]

    def backward(self, loss: torch.Tensor) -> None:
        self.minimised.append(float(loss))

    def step(self) -> None:
        pass


class FakeStep(NamedTuple):
    """What train_step made of two micro-batches, and what float64 loops make of them."""

    result: StepResult
    engine: FakeEngine
    losses: dict[str, list[float]]  # of each micro-batch: its share of the mean over all tokens


def fake_step(
    weights: LossWeights,
    counts: tuple[int, int] = (7, 3),
    step: int = 4,
    max_rows: int | None = None,
) -> FakeStep:
    """Micro-batches of so many targets, and of 6 and 10 routed tokens."""
    torch.manual_seed(0)
    outputs, batches = [], []
    names = ("loss", "z_loss", "aux_loss", "router_z_loss")
    losses: dict[str, list[float]] = {name: [0.0, 0.0] for name in names}
    routed = (6, 10)
    first = torch.tensor([[[1, 2, 3], [6, 0, 0]], [[4, 4, 2], [0, 5, 5]]])  # micro-step, layer
    probs = torch.rand(2, 2, 3)
    log_z = torch.rand(2, 2)
    for index, count in enumerate(counts):
        logits = 3 * torch.randn(2, 5, 7)
        targets = torch.randint(0, 7, (2, 5))
        targets.view(-1)[torch.randperm(10)[count:]] = -100
        routing = [
            RoutingStats(
                probs=probs[index, layer],
                first_choices=first[index, layer],
                entropy=torch.zeros(()),
                log_z_squared=log_z[index, layer],
                load=torch.zeros(3),
                dropped=torch.zeros(()),
                temperature=torch.ones(()),
            )
            for layer in range(2)
        ]
        outputs.append(ModelOutput(logits, routing))
        batches.append(((torch.tensor(index),), targets))
        for row, target in zip(logits.flatten(0, 1).double(), targets.flatten(), strict=True):
            if target != -100:
                z = math.log(sum(math.exp(x) for x in row))
                losses["loss"][index] += (z - float(row[target])) / sum(counts)
                losses["z_loss"][index] += z**2 / sum(counts)
        for layer in range(2):
            if weights.balances_batch:
                share, tokens, chosen = 1.0, sum(routed), first[:, layer].sum(0)
            else:
                share, tokens = counts[index] / max(1, sum(counts)), routed[index]
                chosen = first[index, layer]
            for expert in range(3):
                t, p = float(chosen[expert]) / tokens, float(probs[index, layer, expert]) / tokens
                losses["aux_loss"][index] += share * 3 * t * p / 2
            losses["router_z_loss"][index] += share * float(log_z[index, layer]) / tokens / 2
    engine = FakeEngine(outputs)
    return FakeStep(train_step(engine, batches, weights, 3, step, max_rows), engine, losses)


@pytest.mark.parametrize("balances_batch", [False, True])
@pytest.mark.parametrize("counts", [(7, 3), (0, 4), (10, 10)])
def test_a_step_minimises_means_over_all_tokens_of_its_micro_batches(
    counts: tuple[int, int], balances_batch: bool
) -> None:
    weights = LossWeights(aux=0.3, z=0.2, router_z=0.7, balances_batch=balances_batch)
    result, engine, losses = fake_step(weights, counts)
    assert result.num_targets == sum(counts)
    for index, found in enumerate(engine.minimised):
        total = losses["loss"][index] + 0.3 * losses["aux_loss"][index]
        total += 0.2 * losses["z_loss"][index] + 0.7 * losses["router_z_loss"][index]
        # DeepSpeed divides by the two micro-batches. float32 sums of ten terms.
        assert found / 2 == pytest.approx(total, rel=1e-6)
    for name, parts in losses.items():
        assert float(getattr(result, name)) == pytest.approx(sum(parts), rel=1e-6), name


def test_a_step_without_any_target_has_losses_of_0() -> None:
    result, engine, _ = fake_step(LossWeights(aux=0.3, z=0.2, router_z=0.7), (0, 0))
    assert engine.minimised == [0.0, 0.0]
    assert [float(loss) for loss in result[:4]] == [0.0] * 4


def test_losses_without_weight_are_not_minimised() -> None:
    result, engine, losses = fake_step(LossWeights())
    # Two micro-batches, and float32 as above.
    assert engine.minimised == pytest.approx([2 * loss for loss in losses["loss"]], rel=1e-6)
    assert float(result.z_loss) == 0


def test_smoothed_targets_are_minimised_and_the_plain_cross_entropy_is_reported() -> None:
    plain, smoothed = fake_step(LossWeights()), fake_step(LossWeights(label_smoothing=0.5))
    assert smoothed.result.loss == plain.result.loss  # the same sum on the same threads
    for before, after in zip(plain.engine.minimised, smoothed.engine.minimised, strict=True):
        assert abs(before - after) > 0.01


def test_a_balance_loss_of_the_whole_batch_counts_first_with_the_same_noise() -> None:
    seen = fake_step(LossWeights(aux=0.3, balances_batch=True)).engine.seen
    assert [each.pop("has_gradients") for each in seen] == [False, False, True, True]
    assert seen[:2] == seen[2:]
    assert seen[0]["draw"] != seen[1]["draw"], "each micro-batch has a dropout of its own"
    assert len(fake_step(LossWeights(aux=0.3)).engine.seen) == 2


def test_samples_have_keys_by_their_place_in_the_batch_and_by_step() -> None:
    seen = fake_step(LossWeights()).engine.seen
    keys = seen[0]["keys"] + seen[1]["keys"]
    assert keys == list(range(keys[0], keys[0] + 4))
    again, other = (fake_step(LossWeights(), step=step).engine.seen for step in (4, 5))
    assert again == seen
    assert abs(other[0]["keys"][0] - keys[0]) > 2**40
    apart = fake_step(LossWeights(), max_rows=100).engine.seen
    assert apart[0]["keys"] == keys[:2]
    assert apart[1]["keys"] == [keys[0] + 100, keys[0] + 101]
    assert other[0]["draw"] != seen[0]["draw"]


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


def test_a_bucket_of_gradients_is_no_larger_than_the_model_and_torchs_adam_is_fused() -> None:
    for given, expected in (({}, None), ({"zero_optimization.reduce_bucket_size": 1000}, 1000)):
        changes = {"zero_optimization.stage": 1} | given
        ((bucket, numel, fused),) = run_on_ranks("tests.engine.programs:optimizer_of", 1, changes)
        assert bucket == (expected or numel)
        assert set(fused) == {True}
