"""Batches are the same, whatever asks for them and whenever; text and pairs answer alike."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magnetar.data.errors import UserError
from magnetar.data.loader import (
    STEPS_AHEAD,
    DataOptions,
    Masking,
    PairOptions,
    TextData,
    TrainingBatches,
    open_data,
)
from magnetar.data.text.packed_lm import IGNORE_INDEX, Batch
from tests.data.parallel import prepared_verses
from tests.runs import make_corpus

OPTIONS = DataOptions("decoder", seq_len=32, train_batch_size=8, micro_batch_size=2, seed=3)
PAIRS = DataOptions(
    "encoder_decoder",
    seq_len=48,
    train_batch_size=4,
    micro_batch_size=1,
    seed=3,
    pairs=PairOptions(512, 2.0, ["en-de"], "drop", 48, 40),
)


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


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_verses(tmp_path_factory.mktemp("pairs"), num_train=120).path


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_validation_counts_the_same_targets_on_any_number_of_ranks(
    kind: str, request: pytest.FixtureRequest
) -> None:
    options = {"text": OPTIONS, "pairs": PAIRS}[kind]
    data = open_data(request.getfixturevalue(kind), options)
    counts = [
        sum(
            int((batch.targets != IGNORE_INDEX).sum())
            for rank in range(ranks)
            for batch in data.valid_batches(2, rank, ranks)
        )
        for ranks in (1, 2, 3)
    ]
    assert len(set(counts)) == 1
    assert 1 < data.unigram_perplexity(counts[0]) < data.vocab_size


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_ranks_read_what_one_rank_reads_in_turn(kind: str, request: pytest.FixtureRequest) -> None:
    options = {"text": OPTIONS, "pairs": PAIRS}[kind]
    data = open_data(request.getfixturevalue(kind), options)
    for micro_step, rank in ((0, 0), (0, 1), (1, 0), (1, 1)):
        found = data.micro_batch(5, micro_step, rank, world_size=2)
        alone = data.micro_batch(5, 2 * micro_step + rank, 0, world_size=1)
        assert np.array_equal(found.targets, alone.targets)


def test_only_pairs_are_translated_and_only_text_is_continued(text: Path, pairs: Path) -> None:
    of_text, of_pairs = open_data(text, OPTIONS), open_data(pairs, PAIRS)
    assert of_text.to_translate(2) is None
    beginnings = of_text.beginnings(3, 5)
    assert [len(beginning) for beginning in beginnings] == [5] * len(beginnings)
    assert len({tuple(beginning) for beginning in beginnings}) == len(beginnings) > 0
    asked = of_pairs.to_translate(2)
    assert asked is not None
    assert list(asked.texts) == [("en", "de")]
    assert of_pairs.beginnings(3, 5) == []
    assert of_pairs.example_windows(3) is None


def test_bits_per_byte_are_left_out_where_text_is_seen_with_masks(text: Path) -> None:
    data = open_data(text, OPTIONS)
    assert isinstance(data, TextData)
    assert data.predicted_bytes() == data.prepared.valid.record.num_bytes
    masked = replace(OPTIONS, architecture="encoder", masking=Masking(0.15, None, "bert"))
    assert open_data(text, masked).predicted_bytes() is None
