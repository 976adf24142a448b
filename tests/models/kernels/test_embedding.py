"""The embedding's gradient against PyTorch's own, in Triton's interpreter or on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from magnetar.models.layers.embedding import Embedding
from tests.machine import lacks

if not lacks("triton"):
    from magnetar.models.kernels.embedding import EmbedTokens

pytestmark = pytest.mark.needs("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("d_model", [5, 32, 1030])
@pytest.mark.parametrize("frequent", [False, True])
def test_rows_and_gradients(d_model: int, frequent: bool) -> None:
    generator = torch.Generator().manual_seed(d_model)
    tokens = torch.randint(0, 11, (3, 9), generator=generator)
    if frequent:  # one token fills several steps of its program; the last row is nobody's
        tokens[1:] = 4
    weight = torch.randn(13, d_model, generator=generator)
    upstream = torch.randn(3, 9, d_model, generator=generator)
    exact = weight.double().requires_grad_()
    ours = weight.to(DEVICE).requires_grad_()
    out, expected = EmbedTokens.apply(ours, tokens.to(DEVICE)), F.embedding(tokens, exact)
    assert torch.equal(out.cpu().double(), expected)  # rows are copied
    out.backward(upstream.to(DEVICE))
    expected.backward(upstream.double())
    # Sums of up to 20 float32 numbers below 4: 20 * 2^-24 * 4 = 5e-6 at worst, a third in fact.
    torch.testing.assert_close(ours.grad.cpu().double(), exact.grad, rtol=1e-6, atol=2e-6)
    assert not ours.grad[11:].any()


def test_no_tokens() -> None:
    weight = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    EmbedTokens.apply(weight, torch.zeros(0, 2, dtype=torch.int64, device=DEVICE)).sum().backward()
    assert not weight.grad.any()


@pytest.mark.gpu
def test_the_layer_waits_for_nothing_and_repeats_itself() -> None:
    layer = Embedding(50304, 64, device="cuda", dtype=torch.bfloat16)
    tokens = torch.randint(0, 50304, (64, 128), device="cuda")
    gradients = []
    for _ in range(2):
        layer.weight.grad = None
        out = layer(tokens)
        torch.cuda.set_sync_debug_mode("error")
        try:
            out.square().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        gradients.append(layer.weight.grad)
    assert torch.equal(*gradients)  # the kernel adds in one order
