from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magnetar.data.text.masked_lm import Masking, denoising, masked_lm, masked_positions, num_masked
from magnetar.data.text.packed_lm import (
    IGNORE_INDEX,
    Objective,
    PackedLM,
    Rows,
    mixed,
    sample_order,
    train_micro_batch,
    valid_batches,
    window_batch,
)

shared_files = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
VOCAB = 1000
TOKENS = Masking(0.15, None, "bert")
SPANS = Masking(0.15, 3.0, "bert")
ONLY_MASKS = Masking(0.15, None, "mask")
maskings = st.builds(
    Masking,
    st.floats(0.001, 0.999),
    st.none() | st.floats(1, 1e300),
    st.sampled_from(["bert", "mask"]),
)


def asking(objective, masking: Masking) -> Objective:
    return partial(objective, masking=masking, vocab_size=VOCAB)


def key(number: int) -> np.uint64:
    return mixed(np.array([number], dtype=np.uint64))[0]


@given(st.integers(1, 300), maskings, st.integers(0, 2**63))
@settings(deadline=None, max_examples=200)
def test_exactly_the_promised_number_of_positions_is_masked(length, masking, number):
    positions = masked_positions(length, masking, key(number))
    assert len(set(positions.tolist())) == len(positions)
    assert len(positions) == num_masked(length, masking.probability)
    assert 1 <= len(positions) <= length
    assert positions.min() >= 0
    assert positions.max() < length
    assert np.array_equal(positions, masked_positions(length, masking, key(number)))


def test_num_masked_is_the_rounded_share_and_at_least_one():
    assert [num_masked(n, 0.15) for n in (1, 3, 9, 10, 100, 128, 512)] == [1, 1, 1, 2, 15, 19, 77]


def test_every_position_is_masked_alike_by_single_tokens():
    counts = np.zeros(20)
    for number in range(4000):
        counts[masked_positions(20, TOKENS, key(number))] += 1
    # Three of twenty; the standard deviation of a count is sqrt(4000 * 0.15 * 0.85) = 23.
    assert np.abs(counts - 600).max() < 4 * 23


def run_lengths(positions: np.ndarray) -> list[int]:
    return [len(run) for run in np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)]


def test_a_long_window_has_spans_of_the_asked_mean_length():
    # At 1 % masked, spans seldom touch: a run is a span. 300 spans a window, 20 windows; the
    # standard deviation of a length is sqrt(1 - q) / q = 2.4, of the mean 0.03; touching adds 3 %.
    sparse = Masking(0.01, 3.0, "bert")
    runs = [n for i in range(20) for n in run_lengths(masked_positions(90_000, sparse, key(i)))]
    assert np.mean(runs) == pytest.approx(3.0 * 1.03, abs=0.15)
    share_of_ones = np.mean(np.array(runs) == 1)
    assert share_of_ones == pytest.approx(1 / 3, abs=0.03)


def test_spans_of_mean_one_are_single_tokens_mostly_apart():
    alone = Masking(0.01, 1.0, "bert")
    assert np.mean(run_lengths(masked_positions(90_000, alone, key(1)))) < 1.03


def rows(num_rows: int, seq_len: int, first: int = 0) -> Rows:
    tokens = np.arange(num_rows * (seq_len + 1)).reshape(num_rows, -1) % VOCAB
    lengths = np.full(num_rows, seq_len)
    return Rows(tokens, lengths, np.arange(first, first + num_rows))


def test_an_encoder_is_asked_about_masked_positions_alone_and_sees_the_rest():
    given_rows = rows(50, 64)
    (inputs,), targets = asking(masked_lm, ONLY_MASKS)(given_rows, 3)
    asked = targets != IGNORE_INDEX
    assert (asked.sum(axis=1) == 10).all()
    assert np.array_equal(inputs == VOCAB, asked)
    truth = given_rows.tokens[:, 1:]
    assert np.array_equal(targets[asked], truth[asked])
    assert np.array_equal(inputs[~asked], truth[~asked])


def test_of_bert_s_masked_tokens_80_percent_are_masks_10_random_and_10_stay():
    given_rows = rows(2000, 64)
    (inputs,), targets = asking(masked_lm, TOKENS)(given_rows, 3)
    asked = targets != IGNORE_INDEX
    seen, truth = inputs[asked], targets[asked]
    assert len(seen) == 20_000
    # Standard deviations of the shares: 0.0028 and 0.0021. A random token equals the true one
    # once in a thousand.
    assert np.mean(seen == VOCAB) == pytest.approx(0.8, abs=0.01)
    assert np.mean(seen == truth) == pytest.approx(0.1, abs=0.008)
    random = seen[(seen != VOCAB) & (seen != truth)]
    assert 0 <= random.min() < 10
    assert VOCAB - 10 < random.max() < VOCAB
    assert np.mean(random) == pytest.approx(VOCAB / 2, rel=0.05)


def test_a_random_token_is_never_the_mask_token():
    few = Masking(0.5, None, "bert")
    given_rows = rows(2000, 64)
    given_rows = given_rows._replace(tokens=given_rows.tokens % 3)
    (inputs,), _ = masked_lm(given_rows, 3, few, vocab_size=3)
    # 40 % of 128,000 are masks, with a standard deviation of 0.14 %; one in four of the random ones
    # would add 1.25 %.
    assert np.mean(inputs == 3) == pytest.approx(0.4, abs=0.005)


def test_masks_are_functions_of_seed_and_sample_alone():
    objective = asking(masked_lm, SPANS)
    together = objective(rows(6, 64), 3)
    apart = objective(Rows(*(part[4:] for part in rows(6, 64))), 3)
    assert np.array_equal(together.targets[4:], apart.targets)
    assert np.array_equal(together.inputs[0][4:], apart.inputs[0])
    for other in (objective(rows(6, 64), 4), objective(rows(6, 64, first=6), 3)):
        same = (other.targets != IGNORE_INDEX) == (together.targets != IGNORE_INDEX)
        assert not same.all(axis=1).any()


@pytest.mark.parametrize("objective", [asking(masked_lm, SPANS), asking(denoising, SPANS)])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 12), (2, 3), (3, 2), (12, 1)])
def test_an_optimizer_step_asks_the_same_in_any_layout(
    make_split, objective, world_size, micro_batch_size
):
    dataset = PackedLM(make_split(500), 7, objective)
    whole = train_micro_batch(dataset, 24, 0, 12, 0, 1, seed=5)
    parts = [
        train_micro_batch(dataset, 24, step, micro_batch_size, rank, world_size, seed=5)
        for step in range(12 // (world_size * micro_batch_size))
        for rank in range(world_size)
    ]
    assert np.array_equal(np.concatenate([part.targets for part in parts]), whole.targets)
    for index, inputs in enumerate(whole.inputs):
        assert inputs.dtype == np.int64
        assert np.array_equal(np.concatenate([part.inputs[index] for part in parts]), inputs)


def test_a_window_read_again_in_the_next_epoch_has_new_masks(make_split):
    dataset = PackedLM(make_split(71), 7, asking(masked_lm, ONLY_MASKS))
    n = len(dataset)
    asked = {}
    for g in range(2 * n):
        batch = train_micro_batch(dataset, g, 0, 1, 0, 1, seed=1)
        window = int(sample_order(g, n, 1))
        asked.setdefault(window, []).append(tuple(batch.targets[0]))
    assert len(asked) == n
    assert sum(first != second for first, second in asked.values()) > n / 2


@given(st.integers(8, 200), st.integers(1, 5), st.integers(1, 4))
@shared_files
def test_validation_masks_each_window_once_and_never_its_filler(
    make_split, num_tokens, batch_size, world_size
):
    dataset = PackedLM(make_split(num_tokens), 7, asking(masked_lm, SPANS))
    ranks = [list(valid_batches(dataset, batch_size, r, world_size)) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    num_targets, num_tokens_seen = 0, 0
    for (inputs, *masks), targets in (batch for batches in ranks for batch in batches):
        padding = masks[0] if masks else np.zeros(inputs.shape, dtype=bool)
        assert padding.any() or not masks
        assert (inputs[padding] == 0).all()
        assert (targets[padding] == IGNORE_INDEX).all()
        num_targets += (targets != IGNORE_INDEX).sum()
        num_tokens_seen += (~padding).sum()
    windows, rest = divmod(num_tokens - 1, 7)
    assert num_tokens_seen == num_tokens - 1
    assert num_targets == windows + (1 if rest else 0)  # one of seven, one of the rest


def test_every_validation_pass_asks_the_same_in_any_layout(make_split):
    dataset = PackedLM(make_split(100), 7, asking(masked_lm, TOKENS))

    def asked(batch_size: int, world_size: int) -> set[int]:
        return {
            int(t)
            for rank in range(world_size)
            for _, targets in valid_batches(dataset, batch_size, rank, world_size)
            for t in targets[targets != IGNORE_INDEX]
        }

    assert asked(1, 1) == asked(4, 1) == asked(3, 2)


def test_denoising_asks_for_every_token_after_the_one_before(make_split):
    dataset = PackedLM(make_split(31), 7, asking(denoising, ONLY_MASKS))
    seen = []
    for batch in valid_batches(dataset, 3, 0, 1):
        source, target, *masks = batch.inputs
        counts = batch.targets != IGNORE_INDEX
        assert np.array_equal(target[counts] + 1, batch.targets[counts])  # the file counts upwards
        is_mask = source == VOCAB
        assert (is_mask.sum(axis=1) == (counts.sum(axis=1) > 0)).all()
        kept = counts & ~is_mask
        assert np.array_equal(source[kept], batch.targets[kept])
        assert len(masks) == (0 if counts.all() else 2)
        assert all(np.array_equal(mask, ~counts) for mask in masks)
        seen += batch.targets[counts].tolist()
    assert seen == list(range(1, 31))


def test_chosen_windows_are_asked_about_as_in_a_validation_pass(make_split):
    dataset = PackedLM(make_split(100), 7, asking(masked_lm, SPANS))
    passed = list(valid_batches(dataset, 1, 0, 1))
    chosen = window_batch(dataset, [3, 0, 11])
    for row, window in enumerate([3, 0, 11]):
        assert np.array_equal(chosen.targets[row], passed[window].targets[0])
        assert np.array_equal(chosen.inputs[0][row], passed[window].inputs[0][0])
