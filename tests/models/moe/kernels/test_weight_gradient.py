"""Gradients that grow where they are, against those that autograd adds up."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.machine import lacks

if not lacks("triton"):
    from magnetar.models.moe.kernels import weight_gradient as kernel

pytestmark = pytest.mark.needs("triton")
OFFSETS = torch.tensor([3, 3, 8], dtype=torch.int32)  # the second expert has no rows
X, Y = 4, 8
# Comparisons: sums of up to 5 products of float32, in another order; assert_close allows 1.3e-6 and
# 1e-5 for them.


class Product(torch.autograd.Function):
    """rows times the matrix of their expert."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return torch._grouped_mm(rows, weight, offs=OFFSETS)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (rows,) = ctx.saved_tensors
        (_, _), (node, _) = ctx.next_functions
        return None, kernel.weight_gradient(node, rows, grad.contiguous(), OFFSETS)


@pytest.fixture
def grown(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses of the gradients that grew; the kernel itself is for GPUs."""
    addresses = []

    def add(total: Tensor, left: Tensor, right: Tensor, offsets: Tensor) -> None:
        addresses.append(total.data_ptr())
        total += torch._grouped_mm(left.t(), right, offs=offsets)

    monkeypatch.setattr(kernel, "_add_gradient", add)
    monkeypatch.setattr(kernel, "_can_add", lambda total, left, right: True)
    return addresses


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(3, X, Y, generator=torch.Generator().manual_seed(0)))


ROWS = torch.randn(8, X, generator=torch.Generator().manual_seed(1))


def loss(weight: Tensor) -> Tensor:
    return Product.apply(ROWS, weight).square().sum() / 2


def of_one_pass(weight: Tensor) -> Tensor:
    ends = [0, *OFFSETS.tolist()]
    parts = [ROWS[first:end] for first, end in pairwise(ends)]
    return torch.stack([rows.t() @ rows @ one for rows, one in zip(parts, weight, strict=True)])


def test_a_gradient_grows_where_it_is_and_hooks_see_it(
    weight: nn.Parameter, grown: list[int]
) -> None:
    seen = []
    weight.register_post_accumulate_grad_hook(lambda w: seen.append(w.grad.clone()))
    expected = of_one_pass(weight.detach())
    for times in (1, 2, 3):
        loss(weight).backward()
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, times * expected)
        torch.testing.assert_close(seen[-1], times * expected)
    assert grown == 2 * [weight.grad.data_ptr()]
    assert len(seen) == 3


def test_a_weight_that_is_used_twice(weight: nn.Parameter, grown: list[int]) -> None:
    expected = of_one_pass(weight.detach())
    for times in (2, 4):
        (loss(weight) + loss(weight)).backward()
        torch.testing.assert_close(weight.grad, times * expected)
    assert len(grown) == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(weight: nn.Parameter, grown: list[int], use_reentrant: bool) -> None:
    expected = of_one_pass(weight.detach())
    factor = torch.ones((), requires_grad=True)
    for times in (1, 2):
        kept = checkpoint(lambda f: f * loss(weight), factor, use_reentrant=use_reentrant)
        assert isinstance(kept, Tensor)
        kept.backward()
        torch.testing.assert_close(weight.grad, times * expected)
    assert len(grown) == 1


def test_a_gradient_that_is_asked_for_is_not_added_to_what_there_is(
    weight: nn.Parameter, grown: list[int]
) -> None:
    expected = of_one_pass(weight.detach())
    loss(weight).backward()
    (asked,) = torch.autograd.grad(loss(weight), [weight])
    torch.testing.assert_close(asked, expected)
    torch.testing.assert_close(weight.grad, expected)
    assert not grown


def test_a_hook_on_the_weight_sees_the_new_part_alone(
    weight: nn.Parameter, grown: list[int]
) -> None:
    expected = of_one_pass(weight.detach())
    weight.register_hook(lambda grad: 10 * grad)
    for times in (10, 20):
        loss(weight).backward()
        torch.testing.assert_close(weight.grad, times * expected)
    assert not grown


def test_what_is_no_parameter_has_no_gradient_to_grow(
    weight: nn.Parameter, grown: list[int]
) -> None:
    expected = of_one_pass(weight.detach())
    for times in (1, 2):
        loss(weight.clone()).backward()
        torch.testing.assert_close(weight.grad, times * expected)
    assert not grown


def test_other_types_and_sizes_are_left_to_autograd(weight: nn.Parameter) -> None:
    expected = of_one_pass(weight.detach())
    for times in (1, 2):
        loss(weight).backward()
        torch.testing.assert_close(weight.grad, times * expected)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [(200, 0, 64, 1, 135), (0, 0, 0, 0, 0), (64, 64, 64, 64, 64)])
@pytest.mark.parametrize(("x", "y"), [(128, 256), (256, 72)])
def test_the_kernel_adds_and_rounds_once(x: int, y: int, counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    kwargs = {"dtype": torch.bfloat16, "device": "cuda"}
    # Rows after the last expert's are nobody's.
    left, right = (
        torch.randn(sum(counts) + 7, x, **kwargs),
        torch.randn(sum(counts) + 7, y, **kwargs),
    )
    total = torch.randn(len(counts), x, y, **kwargs)
    expected, first = total.double(), 0
    for expert, count in enumerate(counts):
        own = slice(first, first + count)
        expected[expert] += left[own].double().t() @ right[own].double()
        first += count
    offsets = torch.tensor(counts).cumsum(0).int().cuda()
    kernel._add_gradient(total, left, right, offsets)
    error = (total.double() - expected).abs()
    assert (error <= 2**-8 * expected.abs() + 1e-4).all()  # half of bf16's last place
