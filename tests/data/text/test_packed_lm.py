import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magnetar.data.errors import UserError
from magnetar.data.text.packed_lm import (
    IGNORE_INDEX,
    PackedLM,
    sample_order,
    train_micro_batch,
    valid_batches,
    window_batch,
)

shared_files = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SEQ_LEN = 7


def window(dataset, i):
    return dataset.split.read(i * dataset.seq_len, (i + 1) * dataset.seq_len + 1)


@given(st.integers(1, 3000), st.integers(0, 5), st.integers(-5, 2**70))
@settings(deadline=None, max_examples=60)
def test_every_epoch_reads_each_window_once(num_samples, epoch, seed):
    index = np.arange(epoch * num_samples, (epoch + 1) * num_samples)
    order = sample_order(index, num_samples, seed)
    assert np.array_equal(np.sort(order), np.arange(num_samples))


@given(st.lists(st.integers(0, 10**15), max_size=50), st.integers(1, 10**12), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_the_order_of_a_sample_does_not_depend_on_its_neighbours(index, num_samples, seed):
    together = sample_order(index, num_samples, seed)
    alone = [int(sample_order(g, num_samples, seed)) for g in index]
    assert together.tolist() == alone
    assert all(0 <= window < num_samples for window in alone)


def test_seeds_and_epochs_have_orders_of_their_own():
    n = 1000
    orders = [sample_order(np.arange(e * n, (e + 1) * n), n, s) for e in (0, 1) for s in (0, 1)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert (first == second).mean() < 0.01  # chance agrees once in a thousand


def test_the_order_looks_random():
    order = sample_order(np.arange(10_000), 10_000, seed=3)
    # Neighbours of a random permutation are a third of its range apart, and uncorrelated.
    assert abs(np.abs(np.diff(order)).mean() / 10_000 - 1 / 3) < 0.01
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.04


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size"), [(1, 12), (1, 1), (2, 3), (4, 3), (3, 2), (12, 1)]
)
def test_an_optimizer_step_reads_the_same_samples_in_any_layout(
    make_split, world_size, micro_batch_size
):
    dataset = PackedLM(make_split(500), SEQ_LEN)
    expected = [window(dataset, int(i)) for i in sample_order(np.arange(24, 36), len(dataset), 5)]
    rows = []
    for micro_step in range(12 // (world_size * micro_batch_size)):
        for rank in range(world_size):
            (inputs,), targets = train_micro_batch(
                dataset, 24, micro_step, micro_batch_size, rank, world_size, seed=5
            )
            assert inputs.dtype == targets.dtype == np.int64
            assert inputs.shape == targets.shape == (micro_batch_size, SEQ_LEN)
            rows += [[*i, t[-1]] for i, t in zip(inputs, targets, strict=True)]
    assert np.array_equal(rows, expected)


@given(st.integers(8, 200), st.integers(1, 5), st.integers(1, 4))
@shared_files
def test_validation_predicts_each_token_but_the_first_once(
    make_split, num_tokens, batch_size, world_size
):
    dataset = PackedLM(make_split(num_tokens), SEQ_LEN)
    ranks = [list(valid_batches(dataset, batch_size, r, world_size)) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = []
    for (inputs, *padding), targets in (batch for batches in ranks for batch in batches):
        assert inputs.shape == targets.shape == (batch_size, SEQ_LEN)
        counts = targets != IGNORE_INDEX
        assert np.array_equal(inputs[counts] + 1, targets[counts])  # the file counts upwards
        seen += targets[counts].tolist()
        # The mask is there where something is padding, and says where nothing counts.
        assert len(padding) == (not counts.all())
        assert all(np.array_equal(mask, ~counts) for mask in padding)
        assert (inputs[~counts] == 0).all()
    assert sorted(seen) == list(range(1, num_tokens))


def test_max_sequences_takes_the_first_windows(make_split):
    dataset = PackedLM(make_split(100), SEQ_LEN)
    targets = [
        t[t != IGNORE_INDEX]
        for rank in range(2)
        for _, t in valid_batches(dataset, 2, rank, 2, max_sequences=5)
    ]
    assert sorted(np.concatenate(targets)) == list(range(1, 5 * SEQ_LEN + 1))


def test_windows_share_only_their_border_token(make_split):
    dataset = PackedLM(make_split(4 * SEQ_LEN + 1), SEQ_LEN)
    assert len(dataset) == 4
    batch = window_batch(dataset, [0, 1])
    assert batch.inputs[0][1].tolist() == list(range(SEQ_LEN, 2 * SEQ_LEN))
    assert batch.inputs[0][1, 0] == batch.targets[0, -1]


def test_a_file_shorter_than_one_sequence_is_refused(make_split):
    with pytest.raises(
        UserError, match=r"train\.bin has 8 tokens.*seq_len=8 needs 9.*seq_len of at most 7"
    ):
        PackedLM(make_split(8), 8)


def test_a_sequence_without_tokens_is_refused(make_split):
    with pytest.raises(UserError, match="seq_len=0 must be at least 1"):
        PackedLM(make_split(8), 0)


def test_an_id_beyond_the_vocabulary_names_file_and_position(make_split):
    split = make_split(50)
    tokens = np.fromfile(split.path, "<u2")
    tokens[20] = 5000
    tokens.tofile(split.path)
    dataset = PackedLM(split, SEQ_LEN)
    with pytest.raises(
        UserError, match=r"train\.bin holds token id 5000 at position 20.*ends at 999.*again"
    ):
        window_batch(dataset, [2])


@pytest.mark.parametrize("max_sequences", [None, 1, 3, 1000])
def test_num_targets_counts_what_valid_batches_predicts(make_split, max_sequences):
    dataset = PackedLM(make_split(101), 8)
    counted = sum(
        int((targets != IGNORE_INDEX).sum())
        for _, targets in valid_batches(dataset, 3, 0, 1, max_sequences)
    )
    assert dataset.num_targets(max_sequences) == counted
