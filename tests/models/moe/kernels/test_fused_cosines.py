"""The fused cosines against XMoERouter.scores and against float64."""

import pytest
import torch
from torch import Tensor

from magnetar.models.layers.init import RandomSource
from magnetar.models.moe.config import MoELayerConfig
from magnetar.models.moe.router import XMoERouter
from tests.machine import lacks

if not lacks("triton"):
    from magnetar.models.moe.kernels import fused_cosines as cosines

pytestmark = pytest.mark.needs("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

N = 77  # one block of tokens and a part of a second
ROUNDING = 2e-6  # float32 rounding of sums of 100 terms, relative to the largest number
# Half a bf16 step, relative to the largest number, and as much for what is not multiplied for its
# sake. Triton's interpreter cuts off where a GPU rounds: a whole step.
ROUNDING_OF_BF16 = 2**-8 if DEVICE == "cuda" else 2**-7
# (d_model, d_router, num_experts): powers of two, and what fills no block.
SHAPES = [(64, 16, 16), (100, 5, 7), (72, 40, 70)]


def router(shape: tuple[int, int, int], dtype: torch.dtype, normalize: bool = True) -> XMoERouter:
    d_model, d_router, num_experts = shape
    keys = {"num_experts": num_experts, "d_router": d_router, "normalize_tokens": normalize}
    made = XMoERouter(d_model, MoELayerConfig(**keys))
    made.init_weights(RandomSource(3, "router"))
    return made.to(DEVICE, dtype)


def tokens(d_model: int, num_tokens: int = N) -> Tensor:
    h = torch.randn(num_tokens, d_model, generator=torch.Generator().manual_seed(0))
    return h.to(DEVICE, torch.bfloat16).requires_grad_()


def fused(made: XMoERouter, h: Tensor) -> Tensor:
    found: Tensor = cosines.fused_cosines(
        h, made.projection.weight, made.centroids, normalize_tokens=made.normalize_tokens
    )
    return found


def float64_cosines(made: XMoERouter, h: Tensor) -> tuple[Tensor, list[Tensor]]:
    """In float64 from the same numbers: the cosines, and h, W and the centroids as its leaves."""
    leaves = [
        tensor.detach().double().requires_grad_()
        for tensor in (h, made.projection.weight, made.centroids)
    ]
    projected = leaves[0] @ leaves[1].t()
    if made.normalize_tokens:
        projected = torch.nn.functional.normalize(projected, dim=-1)
    return projected @ torch.nn.functional.normalize(leaves[2], dim=-1).t(), leaves


def assert_rounded(found: Tensor, expected: Tensor, rounding: float) -> None:
    atol = rounding * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_cosines_and_gradients_equal_the_plain_router(
    shape: tuple[int, int, int], dtype: torch.dtype, normalize: bool
) -> None:
    made, h = router(shape, dtype, normalize), tokens(shape[0])
    found = fused(made, h)
    assert_rounded(found, made.scores(h).detach(), ROUNDING)
    expected, leaves = float64_cosines(made, h)
    assert_rounded(found, expected.detach(), ROUNDING)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    inputs = [h, made.projection.weight, made.centroids]
    of_found = torch.autograd.grad(found, inputs, grad)
    of_expected = torch.autograd.grad(expected, leaves, grad.double())
    for mine, theirs, tensor in zip(of_found, of_expected, inputs, strict=True):
        assert mine.dtype == tensor.dtype
        rounding = ROUNDING_OF_BF16 if tensor.dtype == torch.bfloat16 else ROUNDING
        assert_rounded(mine, theirs, rounding)


def test_a_float32_weight_is_the_sum_of_its_parts() -> None:
    generator = torch.Generator().manual_seed(4)
    exponents = torch.randint(-20, 20, (33, 50), generator=generator)
    weight = torch.randn(33, 50, generator=generator).ldexp(exponents).to(DEVICE)
    parts = cosines._bf16_parts(weight)
    assert torch.equal(parts.double().sum(0), weight.double())  # 3 * 8 bits are 24


def test_tokens_of_zero_have_cosines_and_gradients_of_zero() -> None:
    made, h = router((64, 16, 16), torch.float32), tokens(64)
    zero = h.detach().clone()
    zero[3] = 0
    zero.requires_grad_()
    found = fused(made, zero)
    assert (found[3] == 0).all()
    grads = torch.autograd.grad(found.sum(), [zero, made.projection.weight, made.centroids])
    assert all(grad.isfinite().all() for grad in grads)


def test_no_tokens() -> None:
    made, h = router((64, 16, 16), torch.float32), tokens(64, num_tokens=0)
    found = fused(made, h)
    assert found.shape == (0, 16)
    grads = torch.autograd.grad(found.sum(), [h, made.projection.weight, made.centroids])
    assert grads[0].shape == (0, 64)
    assert all((grad == 0).all() for grad in grads[1:])


@pytest.mark.parametrize("trained", ["h", "weight", "centroids"])
def test_gradient_of_one_input_alone(trained: str) -> None:
    made, h = router((64, 16, 16), torch.float32), tokens(64)
    named = {"h": h, "weight": made.projection.weight, "centroids": made.centroids}
    expected = torch.autograd.grad(fused(made, h).square().sum(), list(named.values()))
    for name, tensor in named.items():
        tensor.requires_grad_(name == trained)
    (found,) = torch.autograd.grad(fused(made, h).square().sum(), [named[trained]])
    # The same program with fewer outputs, so exactly.
    torch.testing.assert_close(found, expected[list(named).index(trained)], rtol=0, atol=0)
