"""Which ranks are paired, and which links are slow."""

from itertools import combinations

import pytest

from magnetar.engine.doctor.bandwidth import Link, rounds, slow_links


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_every_pair_meets_once_and_nobody_twice_in_a_round(count: int) -> None:
    played = list(rounds(count))
    for pairs in played:
        players = [player for pair in pairs for player in pair]
        assert len(players) == len(set(players))
    assert sorted(pair for pairs in played for pair in pairs) == list(combinations(range(count), 2))
    assert len(played) <= count


def test_a_link_below_half_of_its_kind_s_median_is_slow() -> None:
    links = [Link((0, 2), False, 10.0), Link((0, 4), False, 11.0), Link((2, 4), False, 4.0)]
    links += [Link((0, 1), True, 300.0), Link((2, 3), True, 200.0)]
    assert slow_links(links) == [(links[2], 10.0)]
    assert slow_links([]) == []
