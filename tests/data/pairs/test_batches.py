from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import magnetar.data.pairs.batches
from magnetar.data.errors import UserError
from magnetar.data.pairs.batches import (
    PairBatches,
    PairOptions,
    ValidBins,
    cut_bins,
    padded,
    round_rates,
    snake,
    spread_pattern,
    unsnaked,
)
from magnetar.data.text.packed_lm import IGNORE_INDEX
from tests.data.parallel import prepared_verses

OPTIONS = PairOptions(600, 5.0, None, "drop", max_len=64, max_target_len=60)


def batches_of(prepared, bins=4, seed=3, **changes):
    return PairBatches(prepared, OPTIONS._replace(**changes), bins, seed)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepared_verses(tmp_path_factory.mktemp("pairs"), 150)


def rows_of(batch, codec):
    """What a batch holds, as text: (target language's tag, source, target) of each row."""
    source, decoder_input, source_padding, target_padding = batch.inputs
    rows = []
    for i in range(len(source)):
        read, asked = source[i][~source_padding[i]], batch.targets[i][~target_padding[i]]
        assert (batch.targets[i][target_padding[i]] == IGNORE_INDEX).all()
        assert (asked != IGNORE_INDEX).all()
        assert asked[-1] == read[-1] == decoder_input[i, 0] == codec.eos_id
        np.testing.assert_array_equal(decoder_input[i, 1 : len(asked)], asked[:-1])
        rows.append((int(read[0]), codec.decode(read.tolist()), codec.decode(asked.tolist())))
    return rows


def bins_of(batches, count):
    return [batches.bin(*divmod(number, batches.bins)) for number in range(count)]


def expected_rows(prepared, split):
    rows = Counter()
    for source, target in prepared.directions(split):
        pairs, tag = prepared.pairs(split, source, target), prepared.codec.tag_id(target)
        rows.update((tag, *texts) for texts in zip(pairs.sources, pairs.references, strict=True))
    return rows


def counted(batches, num_rounds):
    """How often each pair of each stream comes in the first rounds."""
    batches.pair_indices(3000)
    counts = [np.zeros(len(stream), dtype=int) for stream in batches._streams]
    for number in range(batches._first_bins[num_rounds]):
        for stream, pair in zip(*batches.pair_indices(number), strict=True):
            counts[stream][pair] += 1
    return counts


def test_a_round_in_the_datas_own_shares_holds_every_pair_once(prepared):
    given = {
        "temperature": 1.0,
        "directions": ["de-en", "en-pt-br"],
        "max_len": 80,
        "max_target_len": 80,
    }
    batches = batches_of(prepared, **given)
    batches.pair_indices(1000)
    drawn = Counter()
    for batch in bins_of(batches, batches._first_bins[1]):
        drawn.update(rows_of(batch, prepared.codec))
    tags = {prepared.codec.tag_id("en"): 150, prepared.codec.tag_id("pt-br"): 150}
    assert Counter(tag for tag, _, _ in drawn.elements()) == tags
    assert {*drawn.values()} == {1}
    assert drawn.keys() <= expected_rows(prepared, "train").keys()


@given(seed=st.integers(0, 2**40), temperature=st.floats(1, 20), num_rounds=st.integers(1, 7))
@settings(deadline=None, max_examples=10)
def test_a_pair_comes_at_most_once_more_than_another_of_its_stream(
    prepared, seed, temperature, num_rounds
):
    batches = batches_of(prepared, seed=seed, temperature=temperature)
    for count, per_round in zip(counted(batches, num_rounds), batches._rates, strict=True):
        assert count.max() - count.min() <= 1
        assert abs(count.sum() - num_rounds * per_round) <= 0.5


@given(
    seed=st.integers(-5, 5),
    bin_tokens=st.integers(124, 3000),
    temperature=st.floats(1, 10),
    directions=st.sampled_from([None, ["en-de"], ["pt-br-de", "de-en"]]),
)
@settings(deadline=None, max_examples=25)
def test_no_bin_is_larger_than_its_budget_and_lengths_are_padded_to_eights(
    prepared, seed, bin_tokens, temperature, directions
):
    batches = batches_of(
        prepared,
        seed=seed,
        bin_tokens=bin_tokens,
        temperature=temperature,
        directions=directions,
    )
    for batch in bins_of(batches, 40):
        source, decoder_input, source_padding, target_padding = batch.inputs
        assert source.size + decoder_input.size <= bin_tokens
        assert source.shape == source_padding.shape
        assert decoder_input.shape == target_padding.shape == batch.targets.shape
        assert source.shape[1] == padded((~source_padding).sum(1).max(), 64)
        assert decoder_input.shape[1] == padded((~target_padding).sum(1).max(), 60)
        rows_of(batch, prepared.codec)


@given(step=st.integers(0, 400), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=25)
def test_any_bin_is_reached_directly_and_is_that_of_the_straight_run(prepared, step, seed):
    straight = batches_of(prepared, seed=seed)
    for before in range(0, step, 7):
        straight.bin(before, before % 4)
    fresh = batches_of(prepared, seed=seed)
    for index in reversed(range(4)):
        for first, second in zip(
            (*straight.bin(step, index).inputs, straight.bin(step, index).targets),
            (*fresh.bin(step, index).inputs, fresh.bin(step, index).targets),
            strict=True,
        ):
            np.testing.assert_array_equal(first, second)


def test_the_bins_do_not_depend_on_how_many_a_step_has(prepared):
    many, few = batches_of(prepared), batches_of(prepared, bins=3)
    for number in range(30):
        np.testing.assert_array_equal(
            many.bin(*divmod(number, 4)).targets, few.bin(*divmod(number, 3)).targets
        )


def test_another_seed_and_another_round_give_another_order(prepared):
    batches = batches_of(prepared)
    other = batches_of(prepared, seed=4)
    batches.pair_indices(1000)
    second = batches._first_bins[1]
    order = [tuple(batches.pair_indices(i)[1]) for i in range(20)]
    assert order != [tuple(other.pair_indices(i)[1]) for i in range(20)]
    assert order != [tuple(batches.pair_indices(second + i)[1]) for i in range(20)]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_directions_are_drawn_as_the_temperature_says(prepared, temperature):
    batches = batches_of(prepared, temperature=temperature)
    rates = dict.fromkeys(prepared.directions("train"), 150 ** (1 / temperature))
    rates["en", "de"] = (150 + 2 * 30) ** (1 / temperature)
    drawn, of_tables = Counter(), Counter()
    batches.pair_indices(2000)
    for number in range(batches._first_bins[4]):
        for s in batches.pair_indices(number)[0]:
            pairs = batches._streams[s].pairs
            drawn[pairs.direction] += 1
            of_tables[pairs.table] += pairs.direction == ("en", "de")
    assert of_tables["help.en-de"] / drawn["en", "de"] == pytest.approx(60 / 210, abs=0.005)
    for direction, rate in rates.items():
        expected = rate / sum(rates.values())
        assert drawn[direction] / drawn.total() == pytest.approx(expected, abs=0.003)


def test_directions_mix_within_a_bin(prepared):
    batches = batches_of(prepared, bin_tokens=2000)
    mixed = [len({*batches.pair_indices(number)[0]}) for number in range(20)]
    assert np.mean(mixed) > 4


def test_few_tokens_are_padding(prepared):
    batches = batches_of(prepared)
    batches.pair_indices(1000)
    bins = [batch.inputs for batch in bins_of(batches, batches._first_bins[1])]
    held = sum(int((~pad).sum()) for _, _, *paddings in bins for pad in paddings)
    places = sum(source.size + target.size for source, target, *_ in bins)
    assert held / places > 0.75  # lengths of 12 to 60 tokens are rounded up to eights
    assert places / (len(bins) * 600) > 0.9


@given(
    counts=st.lists(
        st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 60)), min_size=1, max_size=30
    ),
    bin_tokens=st.integers(128, 2000),
)
@settings(deadline=None)
def test_cutting_keeps_the_budget_and_every_pair(counts, bin_tokens):
    source, target, count = np.array(counts).T
    cells, first = np.unique(snake(8 * source, 8 * target), return_index=True)
    starts = cut_bins(cells, count[first], bin_tokens)
    assert starts[0] == 0
    assert starts[-1] == count[first].sum()
    assert (np.diff(starts) > 0).all()
    of_pair = np.repeat(cells, count[first])
    for begin, end in pairwise(starts):
        longest = [int(lengths.max()) for lengths in unsnaked(of_pair[begin:end])]
        assert (end - begin) * sum(longest) <= bin_tokens


@given(source=st.integers(1, 9000), target=st.integers(1, 9000))
def test_the_snake_is_undone(source, target):
    found = unsnaked(snake(np.array([source]), np.array([target])))
    assert [lengths.tolist() for lengths in found] == [[source], [target]]


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), data=st.data())
@settings(deadline=None)
def test_a_pass_spreads_each_cell_evenly(sizes, data):
    cell, rank = spread_pattern(np.array(sizes))
    pairs = zip(cell.tolist(), rank.tolist(), strict=True)
    assert sorted(pairs) == [(c, r) for c, size in enumerate(sizes) for r in range(size)]
    place = data.draw(st.integers(0, len(cell)))
    for c, size in enumerate(sizes):
        expected = size * place / max(len(cell), 1)
        assert abs((cell[:place] == c).sum() - expected) <= 1 + len(sizes) / 2


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_long_pairs_are_counted_and_dropped_or_cut_before_their_end(prepared, policy):
    given = {"max_len": 30, "max_target_len": 21, "directions": ["de-en", "en-de"]}
    batches = batches_of(prepared, too_long=policy, **given)
    longer = [
        sum(len(s) > 30 or len(t) > 21 for s, t in prepared.pairs("train", *direction))
        for direction in (("de", "en"), ("en", "de"))
    ]
    assert batches.num_too_long == sum(longer)
    assert all(0 < count < 150 for count in longer)
    rows = [row for batch in bins_of(batches, 200) for row in rows_of(batch, prepared.codec)]
    expected = expected_rows(prepared, "train")
    whole = sum(row in expected for row in rows) / len(rows)
    assert whole == 1 if policy == "drop" else whole < 1
    for batch in bins_of(batches, 50):
        assert batch.inputs[0].shape[1] <= 30
        assert batch.targets.shape[1] <= 21
        ends = np.take_along_axis(
            batch.targets, (~batch.inputs[3]).sum(1, keepdims=True) - 1, axis=1
        )
        assert (ends == prepared.codec.eos_id).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_len": 20, "too_long": "refuse"}, r"\d+ pairs of the train split of .* are longer"),
        ({"max_len": 3}, r"has no pair for the train split: 930 pairs .* seq_len=3.*raise these"),
        ({"bin_tokens": 40}, r"bin_tokens=40 does not hold the longest pair .* takes \d+ with"),
        ({"directions": ["en-fr"]}, r"direction 'en-fr' is not SOURCE-TARGET of two languages"),
    ],
)
def test_what_cannot_be_batched_is_a_message(prepared, changes, message):
    with pytest.raises(UserError, match=message):
        batches_of(prepared, **changes)


def test_large_data_come_in_rounds_of_a_part(prepared, monkeypatch):
    monkeypatch.setattr(magnetar.data.pairs.batches, "MAX_ROUND_PAIRS", 100)
    batches = batches_of(prepared)
    assert batches._rates.sum() == pytest.approx(100)
    for count in counted(batches, 9):
        assert count.max() - count.min() <= 1


@given(pieces=st.lists(st.integers(1, 900), min_size=1, max_size=5), temperature=st.floats(1, 20))
def test_cutting_a_table_into_several_changes_no_direction(pieces, temperature):
    whole = round_rates([2, 1], [sum(pieces), 70], ["en-de", "de-en"], temperature)
    directions = ["en-de"] * len(pieces) + ["de-en"]
    rates = round_rates([*[2] * len(pieces), 1], [*pieces, 70], directions, temperature)
    assert rates[-1] == pytest.approx(whole[1])
    np.testing.assert_allclose(rates[:-1] / whole[0], np.array(pieces) / sum(pieces))


def test_a_tables_weight_counts():
    rates = round_rates([1, 2, 1], [150, 30, 120], ["en-de", "en-de", "de-en"], 1.0)
    np.testing.assert_allclose(rates, np.array([150, 60, 120]) * 300 / 330)
    rates = round_rates([1, 2, 1], [150, 30, 120], ["en-de", "en-de", "de-en"], 2.0)
    assert rates[:2].sum() / rates[2] == pytest.approx((210 / 120) ** 0.5)


def test_a_table_of_little_weight_has_its_turn_in_some_rounds_only(prepared):
    verses, (small,) = prepared.tables["train"][:-1], prepared.tables["train"][-1:]
    tables = {"train": [*verses, replace(small, weight=0.01)]}  # 0.3 of 150.3 pairs
    batches = batches_of(replace(prepared, tables=tables), directions=["en-de"], temperature=1.0)
    per_round = [stop[1] - start[1] for start, stop in map(batches._places, range(100))]
    assert {*per_round} == {0, 1}
    assert sum(per_round) == pytest.approx(100 * 180 * 0.3 / 150.3, abs=1)
    assert counted(batches, 5)[1].sum() == sum(per_round[:5])


@pytest.mark.parametrize("max_pairs", [None, 3])
def test_validation_bins_hold_every_pair_once(prepared, max_pairs):
    bins = ValidBins(prepared, OPTIONS, max_pairs)
    held = Counter(row for i in range(len(bins)) for row in rows_of(bins.bin(i), prepared.codec))
    expected = expected_rows(prepared, "valid")
    if max_pairs is None:
        assert held == expected
    else:
        assert held.total() == 3 * 6
        assert held <= expected
    assert all(sum(i.size for i in bins.bin(n).inputs[:2]) <= 600 for n in range(len(bins)))


def test_a_validation_bin_beyond_the_last_asks_for_nothing(prepared):
    bins = ValidBins(prepared, OPTIONS._replace(directions=["en-de"]))
    filling = bins.bin(len(bins))
    assert (filling.targets == IGNORE_INDEX).all()
    assert filling.inputs[1].shape == filling.targets.shape


def test_a_folder_without_validation_pairs_is_a_message(tmp_path):
    prepared = prepared_verses(tmp_path, 100, num_valid=0)
    with pytest.raises(
        UserError, match=r"has no pair for the valid split: give `.* --table NAME=TR"
    ):
        ValidBins(prepared, OPTIONS)
