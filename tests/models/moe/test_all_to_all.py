"""Rows to the ranks of their experts and back."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from magnetar.models.moe.all_to_all import (
    AllToAll,
    Peers,
    Traffic,
    expert_parallel_rank,
    node_name,
    send_order,
    sender_major_positions,
)
from tests.machine import lacks
from tests.ranks import run_on_ranks

if not lacks("triton"):
    from magnetar.models.moe.kernels.expert_ffn import ExpertFFN
    from magnetar.models.moe.kernels.segments import segments_of

needs_triton = pytest.mark.needs("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D, F = 16, 32
PROGRAM = "tests.models.programs:with_and_without_kernels"
CASES = [
    "top 2",
    "top 1, sigmoid",
    "no norm",
    "experts without tokens",
    "no token for rank 0",
    "rank 0 is padding",
    "capacity",
]


def assert_equal_again(ranks: list[dict], cases: list[str]) -> None:
    for rank in ranks:
        for case in cases:
            one, other = rank[case]
            for name, value in one.items():
                assert torch.equal(other[name], value), (case, name)  # the same program again


def assert_as_without_kernels(ranks: list[dict], cases: list[str]) -> None:
    for rank in ranks:
        for case in cases:
            one = rank[case][0]
            for name, value in rank[case, "plain"].items():
                scale = max(1.0, value.double().abs().max().item())
                difference = (one[name].double() - value.double()).abs().max().item()
                assert difference <= 2e-5 * scale, (case, name)  # float32 sums in another order


def assert_uneven(ranks: list[dict]) -> None:
    """The cases are what their names say."""
    idle = ranks[0]["no token for rank 0"][0]
    assert all((idle[name] == 0).all() for name in idle if ".experts." in name)
    assert all((rank["no token for rank 0"][0]["load"][:2] == 0).all() for rank in ranks)
    busy = ranks[0]["experts without tokens"][0]["deepspeed_moe.experts.w1"]
    assert [bool(grad.any()) for grad in busy[:2]] == [True, False]
    assert (ranks[0]["rank 0 is padding"][0]["load"] == 0).all()
    assert ranks[1]["rank 0 is padding"][0]["out"].any()
    assert ranks[0]["capacity"][0]["dropped"] > 0


@needs_triton
@pytest.mark.slow
def test_two_ranks_compute_the_same_with_and_without_kernels() -> None:
    ranks = run_on_ranks(PROGRAM, 2, CASES)
    assert_equal_again(ranks, CASES)
    assert_as_without_kernels(ranks, CASES)
    assert_uneven(ranks)


@needs_triton
@pytest.mark.slow
def test_four_ranks_compute_the_same_with_and_without_kernels() -> None:
    cases = ["top 2", "no token for rank 0", "capacity"]
    ranks = run_on_ranks(PROGRAM, 4, cases)
    assert_equal_again(ranks, cases)
    assert_as_without_kernels(ranks, cases)


@needs_triton
@pytest.mark.multi_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_gpus_compute_the_same_bits_every_time(dtype: str) -> None:
    ranks = run_on_ranks(PROGRAM, 2, CASES, dtype)
    assert_equal_again(ranks, CASES)
    assert_uneven(ranks)
    if dtype == "float32":
        assert_as_without_kernels(ranks, CASES)


class Mirror:
    """A group of two ranks: what is sent to the other comes back when somebody waits for it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def all_to_all_single(
        self,
        output: Tensor,
        given: Tensor,
        output_splits: list[int] | None = None,
        input_splits: list[int] | None = None,
        *,
        group: Any,
        async_op: bool,
    ) -> Any:
        assert async_op
        assert output_splits == input_splits
        assert output.numel() == given.numel()
        sent = given.clone()
        if output_splits is None:
            output.copy_(sent)
            return SimpleNamespace(wait=lambda: None)
        assert sum(output_splits) == len(given)
        assert 0 in output_splits, "rows of this rank's own travel"
        output.fill_(torch.nan)
        self.calls.append("start")

        def wait() -> None:
            assert torch.equal(sent, given), "changed on the way"
            output.copy_(sent)
            self.calls.append("wait")

        return SimpleNamespace(wait=wait)


NAMES = ("rows", "w1", "b1", "gain", "shift", "w2", "b2")


def through_ranks(
    tensors: dict[str, Tensor], counts: list[list[int]], rank: int
) -> tuple[Mirror, Tensor]:
    comm = Mirror()
    peers = Peers(None, rank)  # type: ignore[arg-type]
    send_counts = torch.tensor(counts, device=DEVICE)
    all_to_all = AllToAll(comm, peers, send_counts, lambda _: nullcontext())  # type: ignore[arg-type]
    parameters = (tensors.get(name) for name in NAMES)
    return comm, ExpertFFN.apply(*parameters, None, all_to_all, "gelu", 1e-5)


def of_experts(counts: list[list[int]], rank: int) -> Tensor:
    """(A,), which of the sent rows each row is, once they are sorted by (expert, sender)."""
    num_experts = len(counts[0])
    order = send_order(2 * num_experts, 2, rank, torch.device("cpu")).experts.tolist()
    first, begins = 0, {}
    for expert in order:
        begins[divmod(expert, num_experts)] = first
        first += counts[expert // num_experts][expert % num_experts]
    found = [
        begins[sender, expert] + row
        for expert in range(num_experts)
        for sender in range(2)
        for row in range(counts[sender][expert])
    ]
    return torch.tensor(found, dtype=torch.long, device=DEVICE)


@needs_triton
@pytest.mark.parametrize(("norm", "rank"), [(True, 0), (False, 1)])
@pytest.mark.parametrize(
    "counts",
    [
        [[5, 0, 40, 3], [1, 33, 2, 0]],
        [[0, 0, 7, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [2, 0, 0, 1]],
        [[0, 0, 0, 0], [0, 0, 0, 0]],
    ],
    ids=str,
)
def test_experts_behind_an_all_to_all_compute_what_they_compute_here(
    counts: list[list[int]], norm: bool, rank: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    num_rows = sum(map(sum, counts))
    shapes: dict[str, tuple[int, ...]] = {
        "rows": (num_rows, D),
        "w1": (4, D, F),
        "b1": (4, F),
        "w2": (4, F, D),
        "b2": (4, D),
    }
    shapes |= {"gain": (4, F), "shift": (4, F)} if norm else {}
    tensors = {
        name: torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()
        for name, shape in shapes.items()
    }
    upstream = torch.randn(num_rows, D, generator=generator).to(DEVICE)
    _, out = through_ranks(tensors, counts, rank)
    found = torch.autograd.grad(out, list(tensors.values()), upstream)
    if num_rows == 0:
        assert out.shape == (0, D)
        assert not any(grad.any() for grad in found)
        return
    sizes = torch.tensor(counts, device=DEVICE).sum(0)
    index = of_experts(counts, rank)
    parameters = (tensors.get(name) for name in NAMES[1:-1])
    offsets = sizes.cumsum(0).int()
    here = ExpertFFN.apply(tensors["rows"][index], *parameters, None, offsets, None, "gelu", 1e-5)
    here = here + tensors["b2"].repeat_interleave(sizes, 0)
    here = torch.zeros_like(here).index_copy(0, index, here)
    wanted = torch.autograd.grad(here, list(tensors.values()), upstream)
    # The same kernels on the same rows in the same order, so exactly.
    assert torch.equal(out, here)
    for name, one, other in zip(tensors, found, wanted, strict=True):
        if name == "b2":  # summed in another order
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(one, other), name


@needs_triton
def test_gradients_travel_beside_those_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {
        "rows": torch.randn(16, D, device=DEVICE, requires_grad=True),
        "w1": torch.randn(4, D, F, device=DEVICE, requires_grad=True),
        "b1": torch.zeros(4, F, device=DEVICE),
        "w2": torch.randn(4, F, D, device=DEVICE, requires_grad=True),
        "b2": torch.zeros(4, D, device=DEVICE),
    }
    comm = None
    product = torch._grouped_mm

    def recorded(*arguments: Any, **keywords: Any) -> Tensor:
        assert comm is not None
        comm.calls.append("product")
        return product(*arguments, **keywords)

    comm, out = through_ranks(tensors, [[2, 2, 2, 2], [2, 2, 2, 2]], 0)
    comm.calls.clear()
    monkeypatch.setattr(torch, "_grouped_mm", recorded)
    out.sum().backward()
    assert comm.calls == [
        *("start", "wait", "product", "product"),
        *("start", "product", "product", "wait"),  # the way back, beside the weights' gradients
    ]


@needs_triton
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_segments_are_where_a_sort_puts_them(rank: int) -> None:
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 5, (3, 6), generator=generator)  # of 3 senders for 6 experts
    counts[1, :4], counts[:, 2] = 0, 0
    segments = segments_of(counts.to(DEVICE), rank)
    assert segments.offsets.tolist() == counts.sum(0).cumsum(0).tolist()
    assert segments.ends.tolist() == counts.t().reshape(-1).cumsum(0).tolist()
    others = torch.cat([counts[:rank], counts[rank + 1 :]]).reshape(-1)
    begins = iter((others.cumsum(0) - others).view(2, -1))
    own = counts[rank].cumsum(0) - counts[rank]
    starts = torch.stack([own if sender == rank else next(begins) for sender in range(3)])
    assert segments.arrivals.tolist() == starts.t().reshape(-1).tolist()


def test_rows_are_taken_from_where_they_arrived() -> None:
    counts = torch.tensor([[2, 0, 1], [1, 3, 0]])
    expert_of = torch.tensor([0, 0, 2, 0, 1, 1, 1])  # sorted by sender, then by expert
    assert torch.equal(sender_major_positions(counts, 1, 7), expert_of.argsort(stable=True))
    # The first sender's own are behind those of the second: 4, 5 and 6.
    assert sender_major_positions(counts, 0, 7).tolist() == [4, 5, 0, 1, 2, 3, 6]


@pytest.mark.parametrize(
    ("num_ranks", "rank", "order"),
    [
        (2, 0, [4, 5, 6, 7, 0, 1, 2, 3]),
        (2, 1, [0, 1, 2, 3, 4, 5, 6, 7]),
        (4, 1, [0, 1, 4, 5, 6, 7, 2, 3]),
    ],
)
def test_own_rows_are_behind_those_that_travel(num_ranks: int, rank: int, order: list[int]) -> None:
    sending = send_order(8, num_ranks, rank, torch.device("cpu"))
    assert sending.experts.tolist() == order
    assert sending.positions.tolist() == torch.tensor(order).argsort().tolist()


def test_bytes_are_counted_by_link() -> None:
    comm: Any = SimpleNamespace(
        all_to_all_single=lambda received, *_, **__: SimpleNamespace(wait=received.zero_)
    )
    counts = torch.tensor([[1, 2], [3, 0], [0, 5], [4, 0]])  # of rank 1, for 4 ranks of 2 experts
    traffic = Traffic()
    peers = Peers(None, 1, (0, 0, 2, 2))  # type: ignore[arg-type]
    all_to_all = AllToAll(comm, peers, counts, lambda _: nullcontext(), traffic)
    all_to_all.start(torch.zeros(15, D), torch.zeros(0, D))
    row = D * 4  # bytes of float32
    assert traffic == Traffic(local=3 * row, intra_node=3 * row, inter_node=9 * row)


def test_placement_says_which_ranks_hold_which_experts() -> None:
    ranks = {
        placement: [expert_parallel_rank(rank, 8, 4, placement) for rank in range(8)]
        for placement in ("within_nodes", "across_nodes")
    }
    assert ranks["within_nodes"] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert ranks["across_nodes"] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_node_is_a_host_or_what_a_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAGNETAR_NODE", raising=False)
    here = node_name()
    assert here == node_name()
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    assert node_name() != here
    monkeypatch.setenv("MAGNETAR_NODE", "rack 7")
    assert node_name() == "rack 7"
