"""Experts on several nodes: the same losses wherever they are, and what travels on each link."""

import pytest

from tests.ranks import run_on_ranks

MOE = "magnetar.model.moe"
ZERO_1 = {"zero_optimization.stage": 1}
CASES = {
    "within nodes": {f"{MOE}.ep_size": 4},
    "within nodes, ZeRO 3": {f"{MOE}.ep_size": 4, "zero_optimization.stage": 3},
    "across nodes": {f"{MOE}.ep_size": 2, f"{MOE}.placement": "across_nodes"},
}
PROGRAM = "tests.engine.programs:losses_and_traffic"


@pytest.mark.slow
def test_losses_are_those_of_one_rank_on_any_links() -> None:
    one = run_on_ranks(PROGRAM, 1, [dict(ZERO_1)], 4)[0][0]
    assert {gib for record in one["traffic"] for gib in record.values()} == {0.0}
    ranks = run_on_ranks(PROGRAM, 4, [ZERO_1 | case for case in CASES.values()], 4)
    curves = dict(zip(CASES, ranks[0], strict=True))
    for (
        name,
        curve,
    ) in curves.items():  # float32 sums in another order, amplified by 4 steps of Adam
        assert curve["loss"] == pytest.approx(one["loss"], abs=5e-5), name
    within, across = (curves[name]["traffic"][0] for name in ("within nodes", "across nodes"))
    # 8 sequences of 16 tokens to 2 experts each: float32 rows of 32, there and back, twice.
    everything = 8 * 16 * 2 * 32 * 4 * 4 / 2**30
    links = [f"all_to_all_{link}_gib" for link in ("local", "intra_node", "inter_node")]
    assert sum(within[link] for link in links) == pytest.approx(everything)
    assert all(within[link] == pytest.approx(within[f"layer_2/{link}"]) for link in links)
    assert all(within[link] > 0 for link in links)
    assert across["all_to_all_intra_node_gib"] == 0 < across["all_to_all_inter_node_gib"]
    held = {name: [rank[i]["experts"] for rank in ranks] for i, name in enumerate(CASES)}
    assert held["within nodes"] == [[0], [1], [2], [3]]
    assert held["across nodes"] == [[0, 1], [0, 1], [2, 3], [2, 3]]  # neighbours have the same
