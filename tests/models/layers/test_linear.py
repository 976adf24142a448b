"""Matrices round alike under every ZeRO stage."""

import pytest
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.linear import zero3_linear_wrap

from magnetar.models.layers.feed_forward import Linear


@pytest.mark.parametrize("bias", [True, False])
def test_zero_3_rounds_as_the_other_stages_do(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = Linear(64, 128, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(4, 9, 64, generator=generator).bfloat16().requires_grad_()
    plain = linear(x)
    gradients = torch.autograd.grad(plain.float().square().sum(), [x, *linear.parameters()])
    monkeypatch.setattr(F, "linear", zero3_linear_wrap)  # as deepspeed.zero.Init does
    under_zero_3 = linear(x)
    # Both call addmm on the same matrices.
    assert torch.equal(under_zero_3, plain)
    others = torch.autograd.grad(under_zero_3.float().square().sum(), [x, *linear.parameters()])
    assert all(map(torch.equal, others, gradients))
    if bias:  # what torch's own module would return
        rounded_twice = torch.nn.Linear.forward(linear, x)
        assert not torch.equal(rounded_twice, plain)


def test_any_shape() -> None:
    linear = Linear(6, 3)
    for shape in ((6,), (2, 6), (2, 3, 6), (0, 5, 6), (2, 0, 3, 6)):
        x = torch.randn(shape)
        assert linear(x).shape == (*shape[:-1], 3)
        # Sums of 6 products and a bias, below 4: to one token F.linear applies another operator.
        expected = F.linear(x, linear.weight, linear.bias)
        torch.testing.assert_close(linear(x), expected, rtol=0, atol=2 * 7 * 4 * 2**-24)
