"""Rows that travel inside nodes first arrive as those that travel straight: the same bits."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from magnetar.models.moe.all_to_all import Exchange, Peers, Traffic, send_order
from magnetar.models.moe.hierarchical_all_to_all import HierarchicalExchange
from magnetar.models.moe.nodes import expert_groups, node_name, place_of_rank, rows_by_node
from tests.models.exchange_programs import CASES, PROGRAM
from tests.ranks import run_on_ranks

D = 3


class Threads:
    """A group whose ranks are threads of this process, as one of them sees it."""

    def __init__(self, shared: Any, rank: int) -> None:
        self.shared, self.rank = shared, rank

    def size(self) -> int:
        return len(self.shared.letters)


def groups_of_threads(num_ranks: int) -> list[Threads]:
    """A group for each rank; what is sent lies in `letters`."""
    shared = SimpleNamespace(letters=[None] * num_ranks, all=threading.Barrier(num_ranks))
    return [Threads(shared, rank) for rank in range(num_ranks)]


def all_to_all_single(
    output: Tensor,
    given: Tensor,
    output_splits: list[int] | None = None,
    input_splits: list[int] | None = None,
    *,
    group: Threads,
    async_op: bool,
) -> Any:
    assert async_op
    num_ranks = group.size()
    group.shared.letters[group.rank] = given.split(input_splits or len(given) // num_ranks)
    group.shared.all.wait(10)
    got = [letters[group.rank] for letters in group.shared.letters]
    if output_splits is not None:
        assert [len(letter) for letter in got] == output_splits
    output.copy_(torch.cat(got))
    group.shared.all.wait(10)
    return SimpleNamespace(wait=lambda: None)


def on_threads(num_nodes: int, per_node: int, work: Any) -> list[Any]:
    """What `work(peers)` returns on each rank."""
    num_ranks = num_nodes * per_node
    everybody = groups_of_threads(num_ranks)
    inside = [groups_of_threads(per_node) for _ in range(num_nodes)]
    across = [groups_of_threads(num_nodes) for _ in range(per_node)]
    nodes = tuple(rank // per_node for rank in range(num_ranks))
    found: list[Any] = [None] * num_ranks

    def run(rank: int) -> None:
        node, place = divmod(rank, per_node)
        groups: Any = (inside[node][place], across[place][node])
        try:
            found[rank] = work(Peers(everybody[rank], rank, nodes, *groups))  # type: ignore[arg-type]
        except BaseException as error:
            found[rank] = error
            for group in (everybody[rank], *groups):
                group.shared.all.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [result for result in found if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return found


def travelled(peers: Peers, counts: Tensor, num_chunks: int, by_nodes: bool) -> dict[str, Any]:
    """Where a rank's rows arrive, and what comes back of them.

    counts: (W, E) rows of each rank for each expert.
    """
    rank, (num_ranks, num_experts) = peers.rank, counts.shape
    if not by_nodes:
        peers = peers._replace(inside=None, across=None)
    sizes = (num_experts, num_ranks, num_chunks, rank, torch.device("cpu"))
    order = send_order(*sizes, peers.num_nodes).experts.tolist()
    rows = [
        [float(rank), float(expert), float(row)]
        for expert in order
        for row in range(int(counts[rank, expert]))
    ]
    sent = torch.tensor(rows).view(-1, D)
    kind, traffic = (HierarchicalExchange if by_nodes else Exchange), Traffic()
    comm: Any = SimpleNamespace(all_to_all_single=all_to_all_single)
    own = counts[rank].view(num_ranks, -1)
    exchange = kind(comm, peers, own, num_chunks, lambda _: nullcontext(), traffic)
    arriving = torch.full((exchange.num_arriving, D), torch.nan)
    for work in [exchange.start(chunk, sent, arriving) for chunk in range(num_chunks)]:
        work.wait()
    back = torch.full_like(sent, torch.nan)
    for work in [exchange.start_back(c, arriving * 2, back) for c in range(num_chunks)]:
        work.wait()
    num_own = int(own[rank].sum())
    assert torch.equal(back[: len(sent) - num_own], 2 * sent[: len(sent) - num_own])
    assert exchange.num_sent == len(sent)
    return {
        "arriving": arriving,
        "counts": exchange.received_counts().clone(),
        "traffic": traffic,
    }


NODES = st.sampled_from([(2, 2), (3, 2), (2, 3)])
MANY = st.sampled_from([0, 0, 0, 1, 2, 5])


@settings(max_examples=25, deadline=None)
@given(nodes=NODES, num_chunks=st.sampled_from([1, 2]), of_chunk=st.integers(1, 2), data=st.data())
def test_rows_arrive_alike_and_come_back(
    nodes: tuple[int, int], num_chunks: int, of_chunk: int, data: st.DataObject
) -> None:
    num_ranks = nodes[0] * nodes[1]
    num_experts = num_ranks * num_chunks * of_chunk
    numbers = data.draw(
        st.lists(MANY, min_size=num_ranks * num_experts, max_size=num_ranks * num_experts)
    )
    counts = torch.tensor(numbers).view(num_ranks, num_experts)
    flat = on_threads(*nodes, lambda peers: travelled(peers, counts, num_chunks, False))
    found = on_threads(*nodes, lambda peers: travelled(peers, counts, num_chunks, True))
    for one, other in zip(flat, found, strict=True):
        assert torch.equal(one["arriving"], other["arriving"])
        assert torch.equal(one["counts"], other["counts"])
        assert one["traffic"].stayed == other["traffic"].stayed
    between = [sum(r["traffic"].between for r in ranks) for ranks in (flat, found)]
    assert between[0] == between[1]  # nothing is saved, only the number of messages
    # Rows for another node and another place travel once more inside a node.
    per_node = nodes[1]
    extra = sum(
        int(counts[rank].view(num_ranks, -1)[other].sum())
        for rank in range(num_ranks)
        for other in range(num_ranks)
        if rank // per_node != other // per_node and rank % per_node != other % per_node
    )
    inside = [sum(r["traffic"].inside for r in ranks) for ranks in (flat, found)]
    assert inside[1] - inside[0] == 2 * extra * D * 4  # there and back, float32


@pytest.mark.parametrize("nodes", [(2, 2), (3, 2), (2, 3)])
def test_fewer_messages_leave_a_node(nodes: tuple[int, int]) -> None:
    num_nodes, per_node = nodes
    counts = torch.ones(num_nodes * per_node, num_nodes * per_node, dtype=torch.long)
    flat = on_threads(*nodes, lambda peers: travelled(peers, counts, 1, False))
    found = on_threads(*nodes, lambda peers: travelled(peers, counts, 1, True))
    for one, other in zip(flat, found, strict=True):
        assert one["traffic"].messages == 2 * (num_nodes - 1) * per_node  # there and back
        assert other["traffic"].messages == 2 * (num_nodes - 1)


@pytest.mark.parametrize(
    ("nodes", "places"),
    [
        ([0, 0, 1, 1], [[0, 1], [2, 3]]),
        ([4, 4, 4, 7, 7, 7], [[0, 1, 2], [3, 4, 5]]),
        ([0, 0, 2, 2, 4, 4], [[0, 1], [2, 3], [4, 5]]),
        ([0, 0, 0, 0], None),  # one node
        ([0, 1, 2, 3], None),  # one rank on each
        ([0, 0, 0, 1], None),  # uneven
        ([0, 0, 1], None),
        ([0, 1, 0, 1], None),  # not side by side
    ],
    ids=str,
)
def test_nodes_must_be_even_and_their_ranks_neighbours(
    nodes: list[int], places: list[list[int]] | None
) -> None:
    assert rows_by_node(nodes) == places


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from(["within_nodes", "across_nodes"]))
def test_each_rank_has_its_place_in_one_group(size: int, number: int, placement: str) -> None:
    groups = expert_groups(size * number, size, placement)
    assert sorted(rank for ranks in groups for rank in ranks) == list(range(size * number))
    for ranks in groups:
        places = [place_of_rank(rank, size * number, size, placement) for rank in ranks]
        assert places == list(range(size))


def test_placement_says_which_ranks_are_neighbours() -> None:
    assert expert_groups(8, 4, "within_nodes") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert expert_groups(8, 4, "across_nodes") == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_node_is_a_host_or_what_a_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAGNETAR_NODE", raising=False)
    here = node_name()
    assert here == node_name()
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    assert node_name() != here
    monkeypatch.setenv("MAGNETAR_NODE", "rack 7")
    assert node_name() == "rack 7"


def assert_the_same_bits(ranks: list[dict], cases: list[str]) -> None:
    for case in cases:
        messages = {"flat": 0, "by nodes": 0}
        for rank in ranks:
            pairs = list(zip(rank[case], rank[case, "hierarchical"], strict=True))
            for one, other in [*pairs, (rank[case, "plain"], rank[case, "plain, hierarchical"])]:
                messages["flat"] += int(one.pop("messages"))
                messages["by nodes"] += int(other.pop("messages"))
                for name, value in one.items():
                    assert torch.equal(other[name], value), (case, name)
        assert 0 < messages["by nodes"] < messages["flat"], case


@pytest.mark.slow
def test_a_layer_computes_the_same_bits_when_rows_travel_by_nodes() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    cases = ["top 2", "no token for rank 0"]
    ranks = run_on_ranks(PROGRAM, 4, cases, [2], "float32", 2)
    assert_the_same_bits(ranks, cases)


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="two nodes of two ranks: four GPUs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_gpus_compute_the_same_bits_when_rows_travel_by_nodes(dtype: str) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    cases = list(CASES)
    ranks = run_on_ranks(PROGRAM, 4, cases, [1, 2, 1], dtype, 2)
    assert_the_same_bits(ranks, cases)
