"""Capacity and order of assignments against loops over tokens."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from magnetar.models.moe.dispatch import (
    Choices,
    GatherTokens,
    expert_capacity,
    expert_counts,
    gathered_choices,
    kept_choices,
    sort_assignments,
)
from tests.models import brute_force


def test_first_choices_come_before_second_ones_and_then_position_decides() -> None:
    # Expert 0 is the first choice of tokens 1, 2, 3 and the second of token 0; it takes two.
    experts = torch.tensor([[1, 0], [0, 1], [0, 1], [0, 1]])
    kept = kept_choices(Choices(experts, None, None), 2, capacity=2)
    assert kept.tolist() == [[True, False], [True, True], [True, False], [False, False]]
    found = sort_assignments(experts, 2, kept)
    by_expert = found.order.split(found.counts.tolist())
    # An index counts first choices of tokens 0..3, then second ones: 4 + token.
    assert [part.tolist() for part in by_expert] == [[1, 2], [0, 5]]


def capacity(num_tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    return int(expert_capacity(torch.tensor(num_tokens), num_experts, top_k, factor))


def test_the_capacity_is_rounded_up_and_never_0() -> None:
    assert capacity(10, num_experts=4, top_k=1, factor=1.0) == 3
    assert capacity(10, num_experts=4, top_k=2, factor=1.0) == 5
    assert capacity(10, num_experts=4, top_k=2, factor=1.25) == 7
    assert capacity(3, num_experts=64, top_k=1, factor=0.5) == 1
    assert capacity(0, num_experts=4, top_k=2, factor=1.0) == 1
    # 1.1 * 2 * 30 is 66.00000000000001 in float64, and would be 66 in exact arithmetic.
    assert capacity(30, num_experts=2, top_k=2, factor=1.1) == -int(-1.1 * 2 * 30 // 2)
    assert capacity(2**40, num_experts=1, top_k=1, factor=1.0) == 2**40


class Case(NamedTuple):
    """Experts of each token, all different, and what decides which of them are kept."""

    experts: list[list[int]]
    num_experts: int
    capacity: int
    priority: list[float] | None
    used: list[list[bool]] | None


@st.composite
def choices(draw: st.DrawFn) -> Case:
    num_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, min(4, num_experts)))

    def row(element: st.SearchStrategy, unique: bool) -> st.SearchStrategy:
        return st.lists(element, min_size=top_k, max_size=top_k, unique=unique)

    experts = draw(st.lists(row(st.integers(0, num_experts - 1), True), min_size=1, max_size=30))
    count = len(experts)
    priority = draw(st.none() | st.lists(st.integers(0, 5), min_size=count, max_size=count))
    used = draw(st.none() | st.lists(row(st.booleans(), False), min_size=count, max_size=count))
    return Case(experts, num_experts, draw(st.integers(1, 12)), priority, used)


def as_tensors(case: Case) -> Choices:
    return Choices(
        torch.tensor(case.experts),
        None if case.used is None else torch.tensor(case.used),
        None if case.priority is None else torch.tensor(case.priority, dtype=torch.float32),
    )


def kept_by_a_loop(case: Case) -> list[list[bool]]:
    token_order = list(range(len(case.experts)))
    if case.priority is not None:
        token_order.sort(key=lambda token: -case.priority[token])  # stable, as ours
    return brute_force.kept_choices(
        case.experts, case.num_experts, case.capacity, token_order, case.used
    )


@settings(max_examples=300, deadline=None)
@given(choices())
def test_kept_choices_are_the_ones_that_a_loop_keeps(case: Case) -> None:
    expected = kept_by_a_loop(case)
    for limit in (case.capacity, torch.tensor(case.capacity)):
        assert kept_choices(as_tensors(case), case.num_experts, limit).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(choices(), st.booleans())
def test_sorted_assignments_come_by_expert_then_by_choice_then_by_position(
    case: Case, all_kept: bool
) -> None:
    experts = torch.tensor(case.experts)
    kept = None if all_kept else torch.tensor(kept_by_a_loop(case))
    found = sort_assignments(experts, case.num_experts, kept)
    expected: list[list[int]] = [[] for _ in range(case.num_experts)]
    for choice in range(experts.size(1)):
        for token in range(experts.size(0)):
            if kept is None or kept[token, choice]:
                expected[case.experts[token][choice]].append(choice * len(experts) + token)
    assert found.counts.tolist() == [len(part) for part in expected]
    assert [part.tolist() for part in found.order.split(found.counts.tolist())] == expected


def test_experts_are_counted_where_they_are_used() -> None:
    experts = torch.tensor([[4, 0], [0, 1], [4, 1]])
    assert expert_counts(experts, 6).tolist() == [2, 2, 0, 0, 2, 0]
    used = torch.tensor([[True, False], [True, True], [False, False]])
    assert expert_counts(experts, 6, used).tolist() == [1, 1, 0, 0, 1, 0]
    assert expert_counts(experts[:0], 2).tolist() == [0, 0]


@pytest.mark.parametrize("top_k", [2, 3, 4])
def test_a_tokens_gradients_are_summed_over_its_experts_and_not_by_atomics(top_k: int) -> None:
    num_tokens, d_model = 24, 8
    h = torch.randn(num_tokens, d_model).requires_grad_()
    order = torch.randperm(top_k * num_tokens)[: top_k * num_tokens - 5]
    upstream = torch.randn(len(order), d_model)
    rows = GatherTokens.apply(h, order, top_k)
    assert torch.equal(rows, h[order % num_tokens])  # rows are copied
    rows.backward(upstream)
    expected = torch.zeros(num_tokens, d_model).index_add_(0, order % num_tokens, upstream)
    torch.testing.assert_close(h.grad, expected, rtol=1e-6, atol=1e-6)  # another order


def all_ranks(parts: list[dict[str, Any]], shape: torch.Size, time_major: bool) -> list[Any]:
    """`gathered_choices` on every rank; what the ranks send is exchanged here."""
    sent: list[Tensor] = []

    def collect(_out: Tensor, mine: Tensor) -> None:
        sent.append(mine)

    def answer(out: Tensor, _mine: Tensor) -> None:
        out.copy_(torch.cat(sent))

    found: list[Any] = []
    for gather in (collect, answer):
        found = []
        for rank, part in enumerate(parts):
            comm: Any = SimpleNamespace(
                get_world_size=lambda: len(parts),
                get_rank=lambda rank=rank: rank,
                all_gather_into_tensor=gather,
            )
            found.append(gathered_choices(part["choices"], part["index"], shape, time_major, comm))
    return found


@settings(max_examples=100, deadline=None)
@given(
    world_size=st.integers(1, 4),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    top_k=st.integers(1, 3),
    flags=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 1000),
)
def test_every_rank_keeps_what_a_loop_over_all_ranks_keeps(
    world_size: int,
    shape: tuple[int, int],
    top_k: int,
    flags: tuple[bool, bool, bool, bool],
    seed: int,
) -> None:
    has_padding, has_priority, has_unused, time_major = flags
    num_samples, num_positions = shape
    generator = torch.Generator().manual_seed(seed)
    num_experts, limit = 4, 3
    total = (world_size * num_samples, num_positions)
    experts = torch.rand(*total, num_experts, generator=generator).argsort(-1)[..., :top_k]
    priority = torch.randint(0, 6, total, generator=generator).float() - 3
    used = torch.rand(*total, top_k, generator=generator) < 0.7
    used[..., 0] = True  # a first choice always is an assignment
    real = torch.rand(total, generator=generator) < 0.6
    if not has_padding:
        real.fill_(True)

    # The oracle: one list of all real tokens in the order of service.
    places = [(b, t) for b in range(total[0]) for t in range(total[1]) if real[b, t]]
    if time_major:
        places.sort(key=lambda place: (place[1], place[0]))
    by_loop = brute_force.kept_choices(
        [experts[place].tolist() for place in places] or [[0] * top_k],
        num_experts,
        limit if places else 0,
        sorted(range(len(places)), key=lambda i: -priority[places[i]]) if has_priority else None,
        [used[place].tolist() for place in places] if has_unused and places else None,
    )
    expected = torch.zeros(*total, top_k, dtype=torch.bool)
    for place, kept in zip(places, by_loop, strict=False):
        expected[place] = torch.tensor(kept)

    parts = []
    for rank in range(world_size):
        mine = slice(rank * num_samples, (rank + 1) * num_samples)
        index = torch.arange(num_samples * num_positions).view(shape)
        mask = real[mine]
        if time_major:
            index, mask = index.t(), mask.t()
        index = index[mask]
        own = Choices(
            experts[mine].flatten(0, 1)[index],
            used[mine].flatten(0, 1)[index] if has_unused else None,
            priority[mine].flatten()[index] if has_priority else None,
        )
        parts.append({"choices": own, "index": index if has_padding or time_major else None})
    for rank, (found, rows) in enumerate(all_ranks(parts, torch.Size(shape), time_major)):
        assert found.used[:, 0].sum() == len(places)
        kept = kept_choices(found, num_experts, limit)[rows]
        mine = expected[rank * num_samples : (rank + 1) * num_samples].flatten(0, 1)
        index = parts[rank]["index"]
        assert torch.equal(kept, mine if index is None else mine[index])
