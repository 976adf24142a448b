"""The losses against float64 sums over whole logits, and that no whole logits are made."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import magnetar.data.text.packed_lm
from magnetar.models import losses
from magnetar.models.losses import IGNORE_INDEX, TokenLosses, token_losses
from magnetar.models.transformer import EncoderDecoder, Transformer, set_checkpointing
from tests.models.small import VOCAB, random_model

B, T, D = 3, 7, 8
# Roundings of the logits' type: what they are multiplied with, and what is sent back, are rounded.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = tuple(ROUNDING)


@pytest.fixture(params=[1, 4, 100], ids="chunks of {}".format)
def chunk_len(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """One token, several with fewer in the last chunk (21 = 5 * 4 + 1), all at once."""
    monkeypatch.setattr(losses, "TILE", 1)
    monkeypatch.setattr(losses, "MIN_CHUNK", request.param)
    monkeypatch.setattr(losses, "CPU_CHUNK_BYTES", 0)
    return request.param


def inputs(dtype: torch.dtype, shape: tuple[int, int] = (B, T)) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a matrix (logits of variance 4) and targets, some of which do not count."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(*shape, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, D, generator=generator) * 2 / math.sqrt(D)
    targets = torch.randint(0, VOCAB, shape, generator=generator)
    targets[0, 4:] = IGNORE_INDEX
    targets[-1] = IGNORE_INDEX
    return hidden, weight.to(dtype).requires_grad_(), targets


def expected_of(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_weight: float, label_smoothing: float = 0.0
) -> tuple[TokenLosses, Tensor, Tensor]:
    """The losses in float64, and the gradients of the total."""
    h, w = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    # The logits are of the model's type: rounded, with the gradient of what is not rounded.
    exact = h @ w.t()
    logits = exact + ((hidden @ weight.t()).double() - exact).detach()
    counted = targets != IGNORE_INDEX
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    z_loss = (logits.logsumexp(-1).square() * counted).sum()
    # fairseq's label_smoothed_cross_entropy, over the whole vocabulary (Szegedy et al., 2016).
    smooth = (-logits.log_softmax(-1).mean(-1) * counted).sum()
    total = (1 - label_smoothing) * cross_entropy + label_smoothing * smooth + z_weight * z_loss
    total.backward()
    assert h.grad is not None
    assert w.grad is not None
    return TokenLosses(total, cross_entropy, z_loss, counted.sum()), h.grad, w.grad


def assert_near(found: Tensor | None, expected: Tensor, tolerance: float) -> None:
    """Within a tolerance, relative to the largest number: sums of rounded products."""
    assert found is not None
    largest = expected.abs().max().item()
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=tolerance * max(largest, 1e-30)
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_weight", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients_equal_those_of_whole_logits_in_float64(
    dtype: torch.dtype, z_weight: float, label_smoothing: float, chunk_len: int
) -> None:
    hidden, weight, targets = inputs(dtype)
    expected, hidden_grad, weight_grad = expected_of(
        hidden, weight, targets, z_weight, label_smoothing
    )
    found = token_losses(hidden, weight, targets, z_weight, label_smoothing)
    (3 * found.total).backward()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Products of other shapes add in another order, so a logit of 16 bits may be rounded to the
    # other side. One step is 4 eps, as logits are below 8: at most 4 eps of a cross-entropy of 51,
    # and 12 * 4 eps, as 2 log z is below 12, of a z-loss of 220.
    rounding = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps / 4)
    for name in ("total", "cross_entropy", "z_loss"):
        value = getattr(found, name)
        assert value.dtype == wide
        wanted = getattr(expected, name).item() if name != "z_loss" or z_weight else 0.0
        assert value.item() == pytest.approx(wanted, rel=rounding), name
        assert value.requires_grad == (name == "total")
    assert found.num_tokens.item() == expected.num_tokens.item() == 4 + T
    for tensor, gradient in ((hidden, hidden_grad), (weight, weight_grad)):
        assert tensor.grad is not None
        assert tensor.grad.dtype == dtype
        assert_near(tensor.grad, 3 * gradient, ROUNDING[dtype])
    assert not hidden.grad[targets == IGNORE_INDEX].any()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.9])
@pytest.mark.parametrize("z_weight", [0.0, 3.0])
def test_the_gradient_is_that_of_finite_differences(
    z_weight: float, label_smoothing: float, chunk_len: int
) -> None:
    hidden, weight, targets = inputs(torch.float64, (2, 3))
    assert torch.autograd.gradcheck(
        lambda h, w: token_losses(h, w, targets, z_weight, label_smoothing).total,
        (hidden, weight),
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_weight", [0.0, 0.1])
def test_a_batch_without_targets_has_loss_0_count_0_and_gradient_0(
    z_weight: float, label_smoothing: float
) -> None:
    hidden, weight, targets = inputs(torch.float32)
    nothing = torch.full_like(targets, IGNORE_INDEX)
    found = token_losses(hidden, weight, nothing, z_weight, label_smoothing)
    assert [value.item() for value in found] == [0.0, 0.0, 0.0, 0]
    found.total.backward()
    for tensor in (hidden, weight):
        assert tensor.grad is not None
        assert not tensor.grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_far_from_0_give_finite_losses_and_gradients(dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(dtype)
    with torch.no_grad():
        hidden *= 300
    found = token_losses(hidden, weight, targets, z_weight=1e-4)
    found.total.backward()
    expected, _, weight_grad = expected_of(hidden, weight, targets, 1e-4)
    # The same rounded logits; log Z and the sum are float32, 11 terms of some hundreds.
    assert found.cross_entropy.item() == pytest.approx(expected.cross_entropy.item(), rel=1e-5)
    assert_near(weight.grad, weight_grad, 2 * ROUNDING[dtype])


@pytest.mark.parametrize("upstream", [65536.0, 2.0**16 / 1000, 2.0**-8])
def test_a_loss_scale_neither_overflows_nor_underflows_fp16(upstream: float) -> None:
    # A nearly certain model: every probability but the target's is 2e-8, which is 0 in fp16, and
    # what is sent back is the sum of all of them.
    vocab, num_tokens = 999, 64
    weight = torch.full((vocab, D), -1.0, dtype=torch.float16)
    weight[0] = 1.25
    hidden = torch.full((1, num_tokens, D), 0.984375, dtype=torch.float16)
    targets = torch.zeros(1, num_tokens, dtype=torch.int64)
    hidden.requires_grad_(), weight.requires_grad_()
    _, hidden_grad, weight_grad = expected_of(hidden, weight, targets, 0.0)
    assert 1e-9 < hidden_grad.abs().max() / vocab / 2 < 3e-8
    token_losses(hidden, weight, targets).total.backward(torch.tensor(upstream))
    for found, expected in ((hidden.grad, hidden_grad), (weight.grad[:1], weight_grad[:1])):
        expected = upstream * expected
        # 2e-8 is 21.5 steps of fp16's smallest number at FP16_SCALE; and half a step of the result.
        tolerance = 0.025 * expected.abs().max().item() + 2.0**-25
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_fp16_holds_a_mean_whose_sum_over_the_tokens_it_could_not_hold() -> None:
    hidden = torch.full((8, 512, D), 24.0, dtype=torch.float16)
    weight = torch.zeros(VOCAB, D, dtype=torch.float16, requires_grad=True)
    targets = torch.zeros(8, 512, dtype=torch.int64)
    total = token_losses(hidden, weight, targets).total
    (total / targets.numel()).backward()
    assert weight.grad is not None
    # One rounding of fp16, 2^-11, of the result, and one of the stored gradient.
    assert weight.grad[0].tolist() == pytest.approx([24 * (1 / VOCAB - 1)] * D, rel=1e-3)


def test_two_backward_passes_give_the_gradient_twice() -> None:
    hidden, weight, targets = inputs(torch.float32)
    total = token_losses(hidden, weight, targets).total
    total.backward(retain_graph=True)
    once = [hidden.grad.clone(), weight.grad.clone()]
    total.backward()
    # The same numbers added to themselves: doubling rounds nothing.
    assert torch.equal(hidden.grad, 2 * once[0])
    assert torch.equal(weight.grad, 2 * once[1])


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_of_the_two_may_be_frozen(frozen: str) -> None:
    hidden, weight, targets = inputs(torch.float32)
    _, hidden_grad, weight_grad = expected_of(hidden, weight, targets, 0.0)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    token_losses(hidden, weight, targets).total.backward()
    for name, tensor, expected in (
        ("hidden", hidden, hidden_grad),
        ("weight", weight, weight_grad),
    ):
        if name == frozen:
            assert tensor.grad is None
        else:
            assert_near(tensor.grad, expected, ROUNDING[torch.float32])


def test_without_gradients_the_same_losses_cost_one_product() -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    found, flops = [], []
    for has_gradients in (True, False):
        with torch.set_grad_enabled(has_gradients), FlopCounterMode(display=False) as counter:
            found.append(token_losses(hidden, weight, targets, 0.1))
        flops.append(counter.get_total_flops())
    assert flops[0] > flops[1] == 2 * B * T * D * VOCAB
    assert not found[1].total.requires_grad
    assert [value.item() for value in found[0]] == [value.item() for value in found[1]]


@pytest.mark.gpu
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_weight", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_finds_the_same(
    dtype: torch.dtype, z_weight: float, label_smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "TILE", 1)
    monkeypatch.setattr(losses, "MIN_CHUNK", 4)
    monkeypatch.setattr(losses, "GPU_CHUNK_BYTES", 0)
    hidden, weight, targets = inputs(dtype)
    expected, hidden_grad, weight_grad = expected_of(
        hidden, weight, targets, z_weight, label_smoothing
    )
    h, w = (tensor.detach().cuda().requires_grad_() for tensor in (hidden, weight))
    found = token_losses(h, w, targets.cuda(), z_weight, label_smoothing)
    upstream = 1.003  # 1 in bf16, which must not round it
    (upstream * found.total).backward()
    # The logits may be rounded to the other side of those on a CPU.
    assert found.total.item() == pytest.approx(expected.total.item(), rel=ROUNDING[dtype])
    for tensor, expected_grad in ((h, hidden_grad), (w, weight_grad)):
        assert tensor.grad is not None
        gradient = tensor.grad.cpu().double()
        assert_near(gradient, upstream * expected_grad, 2 * ROUNDING[dtype])
        along = (gradient * expected_grad).sum() / expected_grad.square().sum()
        assert along.item() == pytest.approx(upstream, abs=2e-3), "rounded alike"


MODELS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "encoder, untied": {"architecture": "encoder", "tie_embeddings": False},
    "encoder-decoder": {"architecture": "encoder_decoder", "num_decoder_layers": 1},
    "encoder-decoder, one table": {"architecture": "encoder_decoder", "share_embeddings": True},
    "Post-LN, untied": {"norm": "post", "tie_embeddings": False},
}


def model_of(keys: dict[str, Any], **sizes: int) -> Transformer | EncoderDecoder:
    base = {"max_seq_len": 16, "moe": {"num_experts": 4, "every": 2}}
    return random_model(**base | keys | sizes)


def run(model: nn.Module, tokens: Tensor, **arguments: object) -> Any:
    return model(*(tokens,) * (2 if isinstance(model, EncoderDecoder) else 1), **arguments)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("keys", MODELS.values(), ids=MODELS)
def test_a_model_with_targets_learns_what_its_logits_would_teach_it(
    keys: dict[str, Any], recomputes: bool, chunk_len: int
) -> None:
    model, z_weight, smoothing = model_of(keys), 0.1, 0.2
    if recomputes:
        set_checkpointing(model, lambda *arguments: checkpoint(*arguments, use_reentrant=False))
    _, _, targets = inputs(torch.float32)
    tokens = targets.clamp(min=0).flip(1)
    logits, routing = run(model, tokens)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    z_loss = (logits.logsumexp(-1).square() * (targets != IGNORE_INDEX)).sum()
    smoothed = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=smoothing
    )
    (smoothed + z_weight * z_loss).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    numbers = {"z_weight": z_weight, "label_smoothing": smoothing}
    found, found_routing = run(model, tokens, targets=targets, **numbers)
    found.total.backward()
    # Chunks multiply matrices of other shapes: sums of 16 products and of 11 tokens in float32.
    assert found.cross_entropy.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert found.z_loss.item() == pytest.approx(z_loss.item(), rel=1e-5)
    assert len(found_routing) == len(routing) > 0
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        # Some 100 float32 roundings of gradients up to 30, through two layers and a router.
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_features_without_an_output_have_no_losses() -> None:
    model = model_of({"output_projection": False, "tie_embeddings": False})
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(AssertionError, match="features without an output have no losses"):
        model(tokens, targets=tokens)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    num_elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        results = function(*arguments, **named or {})
        sizes = [leaf.numel() for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_the_batch_are_never_made(dtype: torch.dtype) -> None:
    batch, length, vocab = 64, 16, 4096
    model = model_of({}, vocab_size=vocab).to(dtype)
    tokens = torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(0))
    whole = batch * length * vocab
    with LargestTensor() as seen, sdpa_kernel(SDPBackend.MATH):
        run(model, tokens, targets=tokens, z_weight=0.1).losses.total.backward()
    assert seen.num_elements == whole // 4, "256 of 1024 tokens at a time"
    with LargestTensor() as seen, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run(model, tokens, targets=tokens)
    assert seen.num_elements == whole // 4
    with LargestTensor() as seen, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run(model, tokens)
    assert seen.num_elements == whole, "whoever asks for logits gets them"


def test_data_and_model_ignore_the_same_targets() -> None:
    assert magnetar.data.text.packed_lm.IGNORE_INDEX == IGNORE_INDEX
