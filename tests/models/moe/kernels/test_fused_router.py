"""The fused router against models.moe.router.route and against float64."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from magnetar.models.moe.all_to_all import send_order
from magnetar.models.moe.router import MIN_TEMPERATURE, route
from tests.machine import lacks

if not lacks("triton"):
    from magnetar.models.moe.kernels import counting_sort as sorting
    from magnetar.models.moe.kernels import fused_router as routing

pytestmark = pytest.mark.needs("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

N = 77  # two blocks and a part of a third
TAU, BALANCE_TEMPERATURE = 0.07, 0.3
# Float32 rounding, relative to the largest number of a tensor: scores up to 1 / 0.07 in the
# exponent, gradients divided by 0.07, sums over 77 tokens.
ROUNDING = 3e-6
# Of tau's gradient: a sum over tokens of terms of both signs, some ten times as large as it.
ROUNDING_OF_TAU = 2e-5


class Case(NamedTuple):
    """What a router is asked for."""

    num_experts: int
    top_k: int
    gate: str
    normalize: bool
    xmoe: bool

    @property
    def balance_temperature(self) -> float:
        return BALANCE_TEMPERATURE if self.xmoe else 1.0


CASES = [
    Case(num_experts, top_k, gate, normalize, xmoe)
    for num_experts in (2, 5, 16, 64, 200)
    for top_k in (1, 2, 3)
    for gate in ("softmax", "sigmoid")
    for normalize in (True, False)
    # Both routers with every number of experts and of choices.
    for xmoe in ((True, False) if gate == "softmax" else (normalize,))
    if top_k <= num_experts
]


def raw_scores(case: Case, num_tokens: int = N) -> Tensor:
    """(N, E) float32: cosines, or logits of a few units."""
    generator = torch.Generator().manual_seed(case.num_experts)
    shape = (num_tokens, case.num_experts)
    if case.xmoe:
        return (2 * torch.rand(shape, generator=generator) - 1).to(DEVICE)
    return 2 * torch.randn(shape, generator=generator).to(DEVICE)


def temperature(case: Case, value: float = TAU) -> Tensor | None:
    return torch.full((1,), value, device=DEVICE, requires_grad=True) if case.xmoe else None


def fused(raw: Tensor, tau: Tensor | None, case: Case) -> SimpleNamespace:
    """The fields of the routing, and of its statistics."""
    found = routing.fused_route(
        raw,
        case.top_k,
        case.gate,
        tau=tau,
        balance_temperature=case.balance_temperature,
        normalize=case.normalize,
        lowest_temperature=MIN_TEMPERATURE,
    )
    return SimpleNamespace(**found.stats._asdict() | found._asdict())


def plain(raw: Tensor, tau: Tensor | None, case: Case) -> dict[str, Tensor]:
    """What models.moe.router and models.moe.layer compute, in the type of `raw`."""
    balance_probs = (raw / case.balance_temperature).softmax(-1)
    scores = raw if tau is None else raw / tau
    decision = route(scores, case.top_k, case.gate, balance_probs, normalize=case.normalize)
    return {
        "experts": decision.experts,
        "weights": decision.weights,
        "first_probs": decision.first_probs,
        "probs": decision.stats.probs,
        "entropy": decision.stats.entropy,
        "log_z_squared": decision.stats.log_z_squared,
    }


def cotangents(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"weights": (N, case.top_k), "probs": (case.num_experts,), "log_z_squared": ()}
    # log^2 sum exp is in the hundreds at a low temperature: all three must be seen in the sum.
    scales = {"weights": 1.0, "probs": 1.0, "log_z_squared": 0.01}
    return {
        name: (scales[name] * torch.randn(shape, generator=generator)).to(DEVICE)
        for name, shape in shapes.items()
    }


def gradients(outputs: dict[str, Tensor], inputs: list[Tensor], grads: dict[str, Tensor]) -> Any:
    loss = sum((outputs[name] * grad.to(outputs[name].dtype)).sum() for name, grad in grads.items())
    assert isinstance(loss, Tensor)
    return torch.autograd.grad(loss, inputs)


def assert_rounded(found: Tensor, expected: Tensor) -> None:
    """Equal up to rounding, relative to the largest number expected."""
    rounding = ROUNDING_OF_TAU if expected.shape == (1,) else ROUNDING
    atol = rounding * max(expected.abs().max().item(), 1e-3)
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decision_and_gradients_equal_the_plain_router(case: Case) -> None:
    raw, tau = raw_scores(case).requires_grad_(), temperature(case)
    inputs = [raw] if tau is None else [raw, tau]
    found = fused(raw, tau, case)
    of_found = gradients(vars(found), inputs, cotangents(case))
    for dtype in (torch.float32, torch.float64):
        copies = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        expected = plain(copies[0], copies[1] if case.xmoe else None, case)
        torch.testing.assert_close(found.experts.long(), expected["experts"], rtol=0, atol=0)
        for name, value in expected.items():
            assert_rounded(getattr(found, name), value)
        of_expected = gradients(expected, copies, cotangents(case))
        for mine, theirs in zip(of_found, of_expected, strict=True):
            assert_rounded(mine, theirs)


@pytest.mark.parametrize("name", ["weights", "probs", "log_z_squared"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("xmoe", [True, False])
def test_gradient_of_one_output_alone(name: str, gate: str, xmoe: bool) -> None:
    case = Case(5, 2, gate, True, xmoe)
    raw, tau = raw_scores(case).requires_grad_(), temperature(case)
    inputs = [raw] if tau is None else [raw, tau]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    grads = {name: cotangents(case)[name]}
    outputs = plain(wide[0], wide[1] if xmoe else None, case)
    loss = (outputs[name] * grads[name].double()).sum()
    expected = torch.autograd.grad(loss, wide, allow_unused=True)
    of_found = gradients(vars(fused(raw, tau, case)), inputs, grads)
    for mine, theirs, tensor in zip(of_found, expected, wide, strict=True):
        assert_rounded(mine, torch.zeros_like(tensor) if theirs is None else theirs)


@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_counts_are_histograms_of_the_choices(case: Case) -> None:
    found = fused(raw_scores(case), temperature(case), case)
    size, top_k = case.num_experts, case.top_k
    experts = found.experts.long().cpu()
    torch.testing.assert_close(found.load.cpu(), experts.view(-1).bincount(minlength=size))
    torch.testing.assert_close(found.first_choices.cpu(), experts[:, 0].bincount(minlength=size))
    blocks = experts.view(-1).split(routing.BLOCK_TOKENS * top_k)
    by_block = torch.stack([block.bincount(minlength=size) for block in blocks], dim=1)
    torch.testing.assert_close(found.block_counts.cpu(), by_block.int())


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
@pytest.mark.parametrize("tau", [None, TAU])
def test_of_equal_scores_the_lower_index_comes_first(top_k: int, tau: float | None) -> None:
    case = Case(20, top_k, "softmax", True, tau is not None)
    generator = torch.Generator().manual_seed(2)
    raw = torch.randint(-1, 2, (N, 20), generator=generator).float() / 2
    zeros = raw == 0
    raw[zeros & (torch.rand(raw.shape, generator=generator) < 0.5)] = -0.0
    found = fused(raw.to(DEVICE), temperature(case), case)
    by_score = raw.argsort(dim=-1, descending=True, stable=True)
    torch.testing.assert_close(found.experts.long().cpu(), by_score[:, :top_k])


def test_scores_that_are_no_numbers_still_name_distinct_experts() -> None:
    case = Case(5, 3, "softmax", True, False)
    raw = raw_scores(case)
    raw[1] = torch.nan
    raw[2] = -torch.inf
    raw[3, 2] = torch.nan
    raw[4] = torch.inf
    found = fused(raw, None, case)
    experts = found.experts.cpu()
    assert experts[[1, 2, 4]].tolist() == [[0, 1, 2]] * 3
    assert experts[3, 0] == 2, "NaN is above all, as in torch.topk"
    assert all(len(set(row)) == 3 and set(row) <= set(range(5)) for row in experts.tolist())
    assert found.weights[1:4].isnan().any(-1).all(), "a NaN must not be hidden"
    assert found.log_z_squared.isnan()
    place = sorting.sorted_positions(found.experts, found.block_counts)
    assert sorted(place.row_of.view(-1).tolist()) == list(range(3 * N))


def test_below_the_minimum_the_temperature_is_it_and_still_learns() -> None:
    case = Case(5, 2, "softmax", False, True)
    raw = raw_scores(case) / 10
    low, lowest = temperature(case, 0.004), temperature(case, MIN_TEMPERATURE)
    assert low is not None
    assert lowest is not None
    found, expected = fused(raw, low, case), fused(raw, lowest, case)
    # Both are divided by the same number, so exactly.
    torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=0)
    (grad,) = gradients(vars(found), [low], cotangents(case))
    (expected_grad,) = gradients(vars(expected), [lowest], cotangents(case))
    assert grad != 0
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0)


def test_sigmoids_too_small_to_divide_by_stay_finite() -> None:
    case = Case(5, 2, "sigmoid", True, True)
    raw, tau = torch.full((3, 5), -1.0, device=DEVICE, requires_grad=True), temperature(case, 0.01)
    assert tau is not None
    found = fused(raw, tau, case)
    (grad,) = torch.autograd.grad(found.weights.sum(), [raw])
    assert found.weights.isfinite().all()
    assert grad.isfinite().all()


def test_temperature_may_be_bf16_and_without_dimensions() -> None:
    case = Case(5, 2, "softmax", True, True)
    raw = raw_scores(case)
    tau = torch.tensor(0.25, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    wide = torch.full((1,), 0.25, device=DEVICE, requires_grad=True)
    (grad,) = gradients(vars(fused(raw, tau, case)), [tau], cotangents(case))
    (expected,) = gradients(vars(fused(raw, wide, case)), [wide], cotangents(case))
    assert grad.shape == ()
    # 0.25 is a bf16 number: the same program, rounded once at the end.
    torch.testing.assert_close(grad, expected.squeeze().bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("xmoe", [True, False])
def test_no_tokens(xmoe: bool) -> None:
    case = Case(6, 2, "softmax", True, xmoe)
    raw, tau = raw_scores(case, num_tokens=0).requires_grad_(), temperature(case)
    found = fused(raw, tau, case)
    assert found.experts.shape == found.weights.shape == (0, 2)
    assert found.load.tolist() == found.first_choices.tolist() == [0] * 6
    assert found.probs.tolist() == [0.0] * 6
    assert found.entropy == found.log_z_squared == 0
    inputs = [raw] if tau is None else [raw, tau]
    loss = found.weights.sum() + found.probs.sum() + found.log_z_squared
    grads = torch.autograd.grad(loss, inputs)
    assert grads[0].shape == (0, 6)
    assert all((grad == 0).all() for grad in grads)
    place = sorting.sorted_positions(found.experts, found.block_counts)
    assert place.offsets.tolist() == place.counts.tolist() == [0] * 6
    assert place.row_of.shape == (0, 2)
    assert place.assignment_of.shape == (0,)


@pytest.mark.parametrize("num_tokens", [1, 32, N])
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
@pytest.mark.parametrize("num_experts", [8, 200])
def test_positions_are_a_stable_sort(num_tokens: int, top_k: int, num_experts: int) -> None:
    case = Case(num_experts, top_k, "softmax", True, False)
    raw = raw_scores(case, num_tokens)
    raw[:, 3] += 3.0  # a crowded expert
    found = fused(raw, None, case)
    place = sorting.sorted_positions(found.experts, found.block_counts)
    flat = found.experts.view(-1).long().cpu()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=num_experts)
    torch.testing.assert_close(place.assignment_of.cpu(), order.int())
    torch.testing.assert_close(place.row_of.cpu().view(-1)[order], torch.arange(flat.numel()).int())
    torch.testing.assert_close(place.counts.cpu(), counts)
    torch.testing.assert_close(place.offsets.cpu(), counts.cumsum(0).int())


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("order", [None, "sent"])
def test_what_is_dropped_has_no_row(share: float, order: str | None) -> None:
    case = Case(24, 2, "softmax", True, False)
    experts = fused(raw_scores(case), None, case).experts
    dropped = torch.rand(2, len(experts), generator=torch.Generator().manual_seed(0)).t() < share
    experts = experts.where(~dropped.to(DEVICE), -1).contiguous()
    sent = send_order(24, 2, 1, experts.device) if order else None
    place = sorting.sorted_positions(experts, sorting.kept_block_counts(experts, 24), sent, True)
    kept = (~dropped).reshape(-1).nonzero().squeeze(1)
    named = experts.view(-1).cpu().long()[kept]
    named = named if sent is None else sent.positions.cpu()[named]
    by_expert = kept[named.argsort(stable=True)]
    row_of, rows = place.row_of.cpu().view(-1), torch.arange(len(kept)).int()
    torch.testing.assert_close(row_of[by_expert], rows)
    assert (row_of[dropped.reshape(-1)] == -1).all()
    expected = torch.zeros(dropped.numel(), dtype=torch.int32)
    expected[: len(kept)] = by_expert
    torch.testing.assert_close(place.assignment_of.cpu(), expected)
    torch.testing.assert_close(place.counts.cpu(), named.bincount(minlength=24))


@pytest.mark.gpu
def test_two_runs_give_the_same_bits() -> None:
    case = Case(64, 2, "softmax", True, True)
    raw, tau = raw_scores(case, 16384).requires_grad_(), temperature(case)
    assert tau is not None
    runs = []
    for _ in range(2):
        found = fused(raw, tau, case)
        loss = found.weights.square().sum() + found.probs.square().sum() + found.log_z_squared
        place = sorting.sorted_positions(found.experts, found.block_counts)
        tensors = [value for value in vars(found).values() if isinstance(value, Tensor)]
        runs.append([*tensors, *place, *torch.autograd.grad(loss, [raw, tau])])
    # Blocks are added in one order.
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
