"""The kernel of the output's losses beside the plain path, in Triton's interpreter or on a GPU."""

import pytest
import torch

from magnetar.models.losses import _softmax
from tests.machine import lacks

if not lacks("triton"):
    from magnetar.models.kernels import cross_entropy as kernel

pytestmark = pytest.mark.needs("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates to bf16.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}


@pytest.mark.parametrize("columns", [8, 4096], ids="{} columns at a time".format)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("z_weight", [0.0, 0.1])
@pytest.mark.parametrize("vocab_size", [1, 16, 37])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_losses_and_gradients_are_those_of_the_plain_path(
    dtype: torch.dtype,
    vocab_size: int,
    z_weight: float,
    label_smoothing: float,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel, "COLUMNS", columns)
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(9, vocab_size, generator=generator) * 8).to(dtype)
    targets = torch.randint(vocab_size, (9,), generator=generator)
    counted = torch.arange(9) % 3 > 0
    exact = logits.double()
    numbers = (z_weight, label_smoothing, 1.0, True)
    expected = _softmax(exact, targets, counted, *numbers)
    gradients = logits.to(DEVICE)
    found = kernel.cross_entropy(gradients, targets.to(DEVICE), counted.to(DEVICE), *numbers)
    for value, of_plain in zip(found, expected, strict=True):
        # Float32 sums of up to 37 exponentials, whose logarithm is below 32: 2^-24 * 32 each way.
        torch.testing.assert_close(value.cpu().double(), of_plain, rtol=1e-6, atol=2e-6)
    error = (gradients.cpu().double() - exact).abs()
    assert (error <= ROUNDING[dtype] * exact.abs() + 2e-6).all()


def test_extreme_logits_and_a_scale() -> None:
    logits = torch.tensor([[-3e4, 3e4, 0.0], [-6e4, -6e4, -6e4], [float("-inf"), 1.0, 1.0]])
    targets, counted = torch.tensor([0, 1, 2]), torch.tensor([True, True, True])
    gradients = logits.to(DEVICE)
    log_z, of_target, _ = kernel.cross_entropy(
        gradients, targets.to(DEVICE), counted.to(DEVICE), 0.0, 0.0, 64.0, True
    )
    expected_log_z = torch.tensor([3e4, -6e4 + 1.0986123, 1.6931472])
    # By hand; a rounding or two of float32 (assert_close allows 1.3e-6).
    torch.testing.assert_close(log_z.cpu(), expected_log_z)
    assert of_target.tolist() == [-3e4, -6e4, 1.0]
    expected = torch.tensor([[-64.0, 64.0, 0.0], [64 / 3, -128 / 3, 64 / 3], [0.0, 32.0, -32.0]])
    torch.testing.assert_close(gradients.cpu(), expected)


def test_without_gradients_logits_stay() -> None:
    logits = torch.randn(4, 11, device=DEVICE)
    before = logits.clone()
    targets, counted = logits.new_zeros(4).long(), logits.new_ones(4).bool()
    log_z, _, means = kernel.cross_entropy(logits, targets, counted, 0.0, 0.1, 1.0, False)
    # Torch adds in another order: some roundings of sums of 11 (assert_close allows 1e-5).
    torch.testing.assert_close(means, before.mean(-1))
    torch.testing.assert_close(log_z, before.logsumexp(-1))
    assert torch.equal(logits, before)  # nothing is written
