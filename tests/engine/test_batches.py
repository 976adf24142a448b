"""Batches are the same, whoever asks for them and whenever."""

from typing import Any

import numpy as np
import pytest
import torch

from magnetar.data.errors import UserError
from magnetar.engine import batches
from magnetar.engine.batches import STEPS_AHEAD, TrainingBatches
from magnetar.engine.config.schema import check_config
from tests.engine.programs import BASE, with_keys


class Counting:
    """A dataset whose every batch is its number, which notes what is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> tuple[TrainingBatches, Counting]:
    from magnetar.data.text.packed_lm import Batch

    def micro_batch(
        config: Any, dataset: Counting, step: int, micro_step: int, rank: int, world_size: int
    ) -> Batch:
        dataset.asked.append((step, micro_step))
        if step == 13:
            raise UserError("step 13 has no batch")
        number = np.array([[step, micro_step, rank, world_size]])
        return Batch((number,), number + 100)

    monkeypatch.setattr(batches, "micro_batch", micro_batch)
    monkeypatch.setattr(batches.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(batches.dist, "get_world_size", lambda: 2)
    changes = {"gradient_accumulation_steps": 3, "train_batch_size": 24}
    config, problems = check_config(with_keys(BASE, changes), 2)
    assert config is not None, problems
    dataset = Counting()
    return TrainingBatches(config, dataset, torch.device("cpu")), dataset  # type: ignore[arg-type]


def test_a_step_is_made_once_and_before_it_is_asked_for(
    made: tuple[TrainingBatches, Counting],
) -> None:
    training, dataset = made
    for step in (1, 2, 3):
        found = [
            (inputs[0].tolist(), targets.tolist()) for inputs, targets in training.of_step(step)
        ]
        assert found == [([[step, m, 1, 2]], [[step + 100, m + 100, 101, 102]]) for m in range(3)]
    training._thread.shutdown()
    assert dataset.asked == [(step, m) for step in range(1, 4 + STEPS_AHEAD) for m in range(3)]


def test_steps_may_jump_either_way(made: tuple[TrainingBatches, Counting]) -> None:
    training, _ = made
    for step in (5, 30, 4, 5):
        assert training.of_step(step)[0][0][0][0, 0] == step


def test_an_error_comes_when_its_step_does(made: tuple[TrainingBatches, Counting]) -> None:
    training, _ = made
    assert training.of_step(12)[0][0][0][0, 0] == 12
    with pytest.raises(UserError, match="step 13 has no batch"):
        training.of_step(13)
