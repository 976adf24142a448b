"""Rows to other ranks and back: the same bits in any number of chunks."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from models.exchange import Exchange, _by_expert, chunk_order
from models.kernels.exchange import ExchangedNetwork, segments_of
from models.kernels.experts import SparseNetwork
from tests.models.exchange_programs import CASES, NUM_EXPERTS
from tests.ranks import run_on_ranks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D, F = 16, 32


def assert_equal_in_any_number_of_chunks(
    ranks: list[dict], cases: list[str], chunk_counts: list[int]
) -> None:
    for rank in ranks:
        for case in cases:
            one, *others = rank[case]
            assert len(others) == len(chunk_counts) - 1 > 0
            for other in others:
                for name, value in one.items():
                    assert torch.equal(other[name], value), (case, name)


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
    assert all((rank["no token for rank 0"][0]["load"][:4] == 0).all() for rank in ranks)
    busy = ranks[0]["experts without tokens"][0]["deepspeed_moe.experts.w1"]
    assert [bool(grad.any()) for grad in busy[:2]] == [True, False]
    assert (ranks[0]["rank 0 is padding"][0]["load"] == 0).all()
    assert ranks[1]["rank 0 is padding"][0]["out"].any()
    assert ranks[0]["capacity"][0]["dropped"] > 0


PROGRAM = "tests.models.exchange_programs:everything"


@pytest.mark.slow
def test_two_ranks_compute_the_same_bits_in_any_number_of_chunks() -> None:
    ranks = run_on_ranks(PROGRAM, 2, list(CASES), [1, 4])
    assert_equal_in_any_number_of_chunks(ranks, list(CASES), [1, 4])
    assert_as_without_kernels(ranks, list(CASES))
    assert_uneven(ranks)


@pytest.mark.slow
def test_four_ranks_compute_the_same_bits_in_any_number_of_chunks() -> None:
    cases = ["top 2", "no token for rank 0", "capacity"]
    ranks = run_on_ranks(PROGRAM, 4, cases, [1, 2])
    assert_equal_in_any_number_of_chunks(ranks, cases, [1, 2])
    assert_as_without_kernels(ranks, cases)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_gpus_compute_the_same_bits_in_any_number_of_chunks(dtype: str) -> None:
    counts = [1, 2, 4, 1]  # and twice the same
    ranks = run_on_ranks(PROGRAM, 2, list(CASES), counts, dtype)
    assert_equal_in_any_number_of_chunks(ranks, list(CASES), counts)
    assert_uneven(ranks)
    if dtype == "float32":
        assert_as_without_kernels(ranks, list(CASES))


class FakeComm:
    """A group of one rank, where what is sent arrives when somebody waits for it."""

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
        assert output.shape == given.shape
        if output.is_floating_point():
            output.fill_(torch.nan)
        name = f"{len(self.calls)}"
        self.calls.append("start")
        sent = given.clone()

        def wait() -> None:
            assert torch.equal(sent, given), f"{name}: changed on the way"
            output.copy_(sent)
            if output.is_floating_point():
                self.calls.append("wait")

        return SimpleNamespace(wait=wait)


def through_ranks(tensors: dict[str, Tensor], counts: list[int], num_chunks: int) -> Any:
    comm = FakeComm()
    of_experts = torch.tensor([counts], device=DEVICE)
    exchange = Exchange(comm, None, of_experts, num_chunks, lambda _: nullcontext())  # type: ignore[arg-type]
    names = ("rows", "w1", "b1", "gain", "shift", "w2", "b2")
    out = ExchangedNetwork.apply(*(tensors.get(name) for name in names), exchange, "gelu", 1e-5)
    return comm, out


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("num_chunks", [1, 2, 4])
@pytest.mark.parametrize("counts", [[5, 0, 40, 3], [0, 0, 7, 0], [0, 0, 0, 0]], ids=str)
def test_experts_behind_an_exchange_compute_what_they_compute_here(
    counts: list[int], num_chunks: int, norm: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {
        "rows": (sum(counts), D),
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
    upstream = torch.randn(sum(counts), D, generator=generator).to(DEVICE)
    _, out = through_ranks(tensors, counts, num_chunks)
    found = torch.autograd.grad(out, list(tensors.values()), upstream)
    if sum(counts) == 0:
        assert out.shape == (0, D)
        assert not any(grad.any() for grad in found)
        return
    sizes = torch.tensor(counts, device=DEVICE)
    offsets = sizes.cumsum(0).int()
    names = ("rows", "w1", "b1", "gain", "shift", "w2")
    here = SparseNetwork.apply(*(tensors.get(name) for name in names), offsets, "gelu", 1e-5)
    here = here + tensors["b2"].repeat_interleave(sizes, 0)
    wanted = torch.autograd.grad(here, list(tensors.values()), upstream)
    assert torch.equal(out, here)
    for name, one, other in zip(tensors, found, wanted, strict=True):
        if name == "b2":  # summed in another order
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(one, other), name


def test_a_chunk_travels_while_another_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {
        "rows": torch.randn(8, D, device=DEVICE, requires_grad=True),
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

    comm, out = through_ranks(tensors, [2, 2, 2, 2], 2)
    comm.calls.clear()
    monkeypatch.setattr(torch, "_grouped_mm", recorded)
    out.sum().backward()
    assert comm.calls == [
        *("start", "wait", "product"),  # nothing hides the first chunk's way
        *("start", "product"),  # the second's is hidden by the first's activation and product
        *("wait", "product", "start", "product"),  # so is the first's way back
        *("start", "product", "product"),  # the second's way back by the weights' gradients
        *("wait", "wait"),
    ]


@pytest.mark.parametrize("num_chunks", [1, 3, 6])
def test_segments_lie_where_a_sort_puts_them(num_chunks: int) -> None:
    generator = torch.Generator().manual_seed(num_chunks)
    counts = torch.randint(0, 5, (3, 6), generator=generator)  # of 3 senders for 6 experts
    counts[1], counts[:, 2] = 0, 0
    found = segments_of(counts.to(DEVICE), num_chunks)
    of_chunk = 6 // num_chunks
    assert found.offsets.tolist() == counts.sum(0).cumsum(0).tolist()
    for chunk in range(num_chunks):
        part = counts[:, chunk * of_chunk : (chunk + 1) * of_chunk]
        assert found.chunk_offsets[chunk].tolist() == part.sum(0).cumsum(0).tolist()
        assert found.ends[chunk].tolist() == part.t().reshape(-1).cumsum(0).tolist()
        begins = (part.reshape(-1).cumsum(0) - part.reshape(-1)).view_as(part)
        assert found.arrivals[chunk].tolist() == begins.t().reshape(-1).tolist()


def test_rows_are_taken_from_where_they_arrived() -> None:
    counts = torch.tensor([[2, 0, 1], [1, 3, 0]])
    expert_of = torch.tensor([0, 0, 2, 0, 1, 1, 1])  # sorted by sender, then by expert
    assert torch.equal(_by_expert(counts, 7), expert_of.argsort(stable=True))


@pytest.mark.parametrize("num_chunks", [1, 2, 4])
def test_experts_are_ordered_by_chunk_then_by_rank(num_chunks: int) -> None:
    places = chunk_order(NUM_EXPERTS, 2, num_chunks, torch.device("cpu"))
    order = {
        1: [0, 1, 2, 3, 4, 5, 6, 7],
        2: [0, 1, 4, 5, 2, 3, 6, 7],
        4: [0, 4, 1, 5, 2, 6, 3, 7],
    }
    assert places.argsort().tolist() == order[num_chunks]
