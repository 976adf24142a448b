"""Batches are the same, whatever asks for them and whenever."""

from typing import Any

import numpy as np
import pytest

from magnetar.data.errors import UserError
from magnetar.data.loader import STEPS_AHEAD, TrainingBatches
from magnetar.data.text.packed_lm import Batch


class Counting:
    """Data whose every batch is its number, which notes what is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def micro_batch(self, step: int, micro_step: int, rank: int, world_size: int) -> Batch:
        self.asked.append((step, micro_step))
        if step == 13:
            raise UserError("step 13 has no batch")
        number = np.array([[step, micro_step, rank, world_size]])
        return Batch((number,), number + 100)


@pytest.fixture
def made() -> tuple[TrainingBatches, Counting]:
    data: Any = Counting()
    return TrainingBatches(data, num_micro_steps=3, rank=1, world_size=2), data


def test_a_step_is_made_once_and_before_it_is_asked_for(
    made: tuple[TrainingBatches, Counting],
) -> None:
    training, data = made
    for step in (1, 2, 3):
        found = [
            (inputs[0].tolist(), targets.tolist()) for inputs, targets in training.of_step(step)
        ]
        assert found == [([[step, m, 1, 2]], [[step + 100, m + 100, 101, 102]]) for m in range(3)]
    training._thread.shutdown()
    assert data.asked == [(step, m) for step in range(1, 4 + STEPS_AHEAD) for m in range(3)]


def test_arrays_are_converted_in_the_thread_and_again_at_their_step() -> None:
    data: Any = Counting()
    training = TrainingBatches(data, 1, 0, 1, lambda array: array + 1000, lambda array: array * 2)
    ((inputs,), targets) = training.of_step(1)[0]
    assert inputs.tolist() == [[2002, 2000, 2000, 2002]]
    assert targets.tolist() == [[2202, 2200, 2200, 2202]]


def test_steps_may_jump_either_way(made: tuple[TrainingBatches, Counting]) -> None:
    training, _ = made
    for step in (5, 30, 4, 5):
        assert training.of_step(step)[0][0][0][0, 0] == step


def test_an_error_comes_when_its_step_does(made: tuple[TrainingBatches, Counting]) -> None:
    training, _ = made
    assert training.of_step(12)[0][0][0][0, 0] == 12
    with pytest.raises(UserError, match="step 13 has no batch"):
        training.of_step(13)
