"""Experts on several nodes: the same losses whatever the way, and what travels on each link."""

from typing import Any

import pytest
import torch

from magnetar.engine.config.schema import check_config
from magnetar.engine.metrics import choose_ways, message_bytes
from magnetar.models.moe.all_to_all import Peers
from magnetar.models.moe.layer import SparseFeedForward
from magnetar.models.transformer import empty_model
from tests.engine.programs import BASE, with_keys
from tests.ranks import run_on_ranks

MOE = "magnetar.model.moe"
ZERO_1 = {"zero_optimization.stage": 1}
CASES = {
    "flat": {f"{MOE}.ep_size": 4, f"{MOE}.exchange": "flat"},
    "by nodes": {f"{MOE}.ep_size": 4, f"{MOE}.exchange": "hierarchical"},
    "by nodes, ZeRO 3": {
        f"{MOE}.ep_size": 4,
        f"{MOE}.exchange": "hierarchical",
        "zero_optimization.stage": 3,
    },
    "across nodes": {f"{MOE}.ep_size": 2, f"{MOE}.placement": "across_nodes"},
}
PROGRAM = "tests.engine.programs:losses_and_traffic"


@pytest.mark.slow
def test_losses_are_those_of_one_rank_on_any_links() -> None:
    one = run_on_ranks(PROGRAM, 1, [dict(ZERO_1)], 4)[0][0]
    assert one["traffic"] == [{}] * 4
    ranks = run_on_ranks(PROGRAM, 4, [ZERO_1 | case for case in CASES.values()], 4)
    found = dict(zip(CASES, ranks[0], strict=True))
    for name, curve in found.items():
        assert curve["loss"] == pytest.approx(one["loss"], abs=5e-5), name
    assert found["by nodes"]["loss"] == found["flat"]["loss"]  # bit for bit
    flat, by_nodes = found["flat"]["traffic"][0], found["by nodes"]["traffic"][0]
    # 8 sequences of 16 tokens to 2 experts each: float32 rows of 32, there and back, twice.
    everything = 8 * 16 * 2 * 32 * 4 * 4 / 2**30
    links = [f"all_to_all_{link}_gib" for link in ("stayed", "inside", "between")]
    assert sum(flat[link] for link in links) == pytest.approx(everything)
    assert all(flat[link] == pytest.approx(flat[f"layer_2/{link}"]) for link in links)
    assert by_nodes[links[2]] == pytest.approx(flat[links[2]])
    assert by_nodes[links[1]] > flat[links[1]] > 0
    assert found["by nodes"]["messages"] == [4] * 4  # one each time, and not two
    assert found["flat"]["messages"] == [8] * 4
    held = {name: [rank[i]["experts"] for rank in ranks] for i, name in enumerate(CASES)}
    assert held["by nodes"] == held["flat"] == [[0], [1], [2], [3]]
    assert held["across nodes"] == [[0, 1], [0, 1], [2, 3], [2, 3]]  # neighbours have the same
    apart = found["across nodes"]["traffic"][0]
    assert apart[links[1]] == 0 < apart[links[2]]


@pytest.mark.slow
def test_uneven_nodes_have_rows_travel_straight() -> None:
    straight = {f"{MOE}.ep_size": 4, f"{MOE}.exchange": "hierarchical", "nodes": [0, 0, 0, 1]}
    found = run_on_ranks(PROGRAM, 4, [straight], 1)
    assert [rank[0]["messages"] for rank in found] == [[4], [4], [4], [12]]


@pytest.mark.parametrize(
    ("exchange", "top_k", "goes_by_nodes"),
    [("auto", 1, True), ("auto", 2, True), ("auto", 3, False), ("hierarchical", 3, True)],
)
def test_small_messages_go_by_nodes(exchange: str, top_k: int, goes_by_nodes: bool) -> None:
    moe = {"num_experts": 16, "ep_size": 4, "top_k": top_k, "exchange": exchange}
    changes = {f"{MOE}.{key}": value for key, value in moe.items()}
    changes |= {"train_batch_size": 32, "gradient_accumulation_steps": 1}
    config, problems = check_config(with_keys(BASE, changes), 4)
    assert config is not None, problems
    # 8 sequences of 16 tokens on each rank, rows of 32 float32 numbers, to four ranks.
    assert message_bytes(config, 4) == 8 * 16 * top_k * 32 * 4 / 4
    model = empty_model(config.model)
    layers = [module for module in model.modules() if isinstance(module, SparseFeedForward)]
    group: Any = object()
    for layer in layers:
        layer.peers = Peers(group, 0, (0, 0, 1, 1), group, group)
    choose_ways(model, config, torch.device("cpu"))
    assert layers
    for layer in layers:
        assert layer.peers is not None
        assert (layer.peers.across is not None) == goes_by_nodes
        assert layer.peers.nodes == (0, 0, 1, 1)
