"""What a guard says of a step's numbers."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from magnetar.engine.cluster.signals import Requests
from magnetar.engine.config.schema import GuardsConfig
from magnetar.engine.guards import Guards, Verdict


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.all_reduce", lambda values: None)


def guards(fp16: bool = False, **keys: Any) -> Guards:
    parameter = torch.nn.Parameter(torch.ones(1))
    scaler = SimpleNamespace(dynamic=True, cur_scale=4.0, min_scale=1.0)
    engine = SimpleNamespace(
        basic_optimizer=torch.optim.SGD([parameter], lr=0.1),
        fp16_enabled=lambda: fp16,
        optimizer=SimpleNamespace(loss_scaler=scaler),
    )
    clip = SimpleNamespace(norm=torch.tensor(1.0))
    return Guards(engine, clip, GuardsConfig(**keys), Requests())  # type: ignore[arg-type]


def problem(guard: Guards, loss: float, norm: float = 1.0) -> str:
    guard.watch(torch.tensor(loss))
    guard.sparse_clip.norm = torch.tensor(norm)
    return guard.problem()


@pytest.mark.parametrize(
    ("loss", "norm", "found"),
    [
        (1.0, 2.0, ""),
        (math.nan, 2.0, "loss nan"),
        (-math.inf, 2.0, "loss -inf"),
        (1.0, math.inf, "gradient norm inf"),
        (math.nan, math.nan, "loss nan"),
    ],
)
def test_numbers_that_are_none_are_bad(loss: float, norm: float, found: str) -> None:
    guard = guards()
    assert problem(guard, loss, norm) == found
    assert guard.bad_in_a_row == bool(found)


def test_the_optimizer_does_nothing_in_a_bad_step() -> None:
    guard = guards()
    optimizer = guard.engine.basic_optimizer
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones(1)
    for loss, expected in ((math.nan, 1.0), (1.0, 0.9), (math.inf, 0.9)):
        problem(guard, loss)
        optimizer.step()
        assert parameter.item() == pytest.approx(expected)


def test_an_overflow_of_fp16_is_for_the_loss_scale_while_that_can_fall() -> None:
    guard = guards(fp16=True)
    scaler = guard.engine.optimizer.loss_scaler
    assert not scaler.raise_error_at_min_scale
    assert problem(guard, 1.0, math.inf) == ""
    assert problem(guard, math.nan, math.inf) == "loss nan"
    scaler.cur_scale = scaler.min_scale
    assert problem(guard, 1.0, math.inf) == "gradient norm inf"


def test_a_spike_is_so_many_deviations_above_the_mean_of_good_steps() -> None:
    guard = guards(spike_deviations=3.0, spike_window=4)
    losses = [9.0, 1.0, 2.0, 3.0]  # mean 3.75, sample deviation 3.594...
    assert [problem(guard, loss) for loss in losses] == [""] * 4
    assert problem(guard, 14.6).startswith("loss 14.6000, more than 3 standard deviations (3.5940)")
    assert guard.recent_losses == losses
    assert problem(guard, 14.5) == ""
    assert guard.recent_losses == [1.0, 2.0, 3.0, 14.5]


def test_a_falling_loss_is_no_spike() -> None:
    guard = guards(spike_deviations=0.1, spike_window=2)
    assert [problem(guard, 10.0 - step) for step in range(10)] == [""] * 10


def test_what_signals_ask_is_known_after_the_step() -> None:
    guard = guards()
    guard.requests.save = True
    problem(guard, 1.0)
    assert (guard.save, guard.stop) == (True, "")
    guard.requests.stop = "SIGTERM"
    problem(guard, 1.0)
    assert (guard.save, guard.stop) == (False, "SIGTERM")


def test_a_signal_to_another_rank_stops_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = guards()
    monkeypatch.setattr(
        "torch.distributed.all_reduce", lambda values: values.add_(torch.tensor([0.0, 1.0, 0.0]))
    )
    problem(guard, 1.0)
    assert guard.stop == "a signal to another rank"


def test_a_verdict_puts_going_back_before_stopping_and_stopping_before_skipping() -> None:
    guard = guards(max_bad_steps=2)
    verdicts = []
    for loss, stop in ((1.0, ""), (math.nan, ""), (1.0, "SIGTERM"), (math.nan, ""), (math.nan, "")):
        guard.requests.stop = guard.requests.stop or stop
        guard.watch(torch.tensor(loss))
        verdicts.append(guard.judge())
    assert verdicts == [
        Verdict.GO,
        Verdict.SKIP,
        Verdict.STOP,
        Verdict.STOP,
        Verdict.ROLL_BACK,
    ]
    assert (guard.num_bad, guard.problem()) == (3, "loss nan")


def test_a_guard_goes_on_from_the_counts_of_a_checkpoint() -> None:
    guard = guards(max_bad_steps=1)
    problem(guard, math.nan)
    guard.start_from(num_bad=5, batch_offset=7, recent_losses=[1.0])
    assert guard.judge() is Verdict.SKIP
    problem(guard, math.nan)
    assert (guard.num_bad, guard.batch_offset, guard.recent_losses) == (6, 7, [1.0])
