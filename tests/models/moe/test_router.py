"""The routers against arXiv 2204.09179, eq. 6-9, in float64 loops."""

from typing import Any

import pytest
import torch
from torch import Tensor

from magnetar.models.layers.init import RandomSource
from magnetar.models.moe.config import MoELayerConfig
from magnetar.models.moe.router import (
    LinearRouter,
    RoutingStats,
    XMoERouter,
    balance_loss,
    build_router,
    route,
)
from tests.models import brute_force

N, D, E, D_ROUTER = 40, 12, 6, 5
# A float32 operation rounds by at most 2^-24 = 6e-8 of its result. Scores and weights up to 1 go
# through some ten of them, a sum of N terms through N.
TEN_ROUNDINGS = 1e-6
SUM_OF_TOKENS = 1e-5  # of N = 40 terms (2.4e-6), and the softmax before them
ROUNDING = 1e-5  # sums of D = 12 terms, times 1 / tau of at most 14


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def router_of(kind: str, top_k: int = 2, gate: str = "softmax", **more: Any) -> Any:
    keys = {"num_experts": E, "router": kind, "top_k": top_k, "gate": gate} | more
    router = build_router(D, MoELayerConfig(**keys))
    router.init_weights(RandomSource(3, "router"))
    return router


def xmoe_router(top_k: int = 2, gate: str = "softmax", **more: Any) -> XMoERouter:
    router: XMoERouter = router_of("xmoe", top_k, gate, d_router=D_ROUTER, **more)
    return router


def linear_router(top_k: int = 2, gate: str = "softmax", **more: Any) -> LinearRouter:
    router: LinearRouter = router_of("linear", top_k, gate, **more)
    return router


BY_NORMALIZE = {True: {}, False: {"normalize_weights": "after_dropping"}}


def of_each_token(router: XMoERouter | LinearRouter, h: Tensor) -> list[RoutingStats]:
    """The statistics of every token alone."""
    return [router(token.unsqueeze(0)).stats for token in h]


def float64_cosines(router: XMoERouter, h: Tensor) -> Tensor:
    parameters = (router.projection.weight, router.centroids)
    return brute_force.cosine_scores(h.double(), *(p.detach().double() for p in parameters))


def test_scores_equal_equation_6() -> None:
    router, h = xmoe_router(), tokens()
    torch.testing.assert_close(
        router.scores(h).double(), float64_cosines(router, h), rtol=0, atol=TEN_ROUNDINGS
    )


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_scores_depend_on_the_direction_of_a_token_and_not_on_its_length(factor: float) -> None:
    router, h = xmoe_router(), tokens()
    lengths = torch.linspace(1, factor, N).unsqueeze(-1)
    torch.testing.assert_close(
        router.scores(h * lengths), router.scores(h), rtol=0, atol=TEN_ROUNDINGS
    )


def test_scores_depend_on_the_direction_of_a_centroid_and_not_on_its_length() -> None:
    router, h = xmoe_router(), tokens()
    before = router.scores(h)
    router.centroids.data *= torch.logspace(-3, 3, E).unsqueeze(-1)
    torch.testing.assert_close(router.scores(h), before, rtol=0, atol=TEN_ROUNDINGS)


@pytest.mark.parametrize(("gate", "tau_0"), [("softmax", 0.3), ("sigmoid", 0.07)])
def test_the_temperature_starts_at_tau_0_has_shape_1_and_a_gradient(
    gate: str, tau_0: float
) -> None:
    router = xmoe_router(top_k=1, gate=gate)
    assert router.temperature.shape == (1,)
    assert router.temperature.item() == pytest.approx(tau_0, rel=2**-24)
    router(tokens()).weights.sum().backward()
    tau = torch.full((1,), tau_0, dtype=torch.float64, requires_grad=True)
    cosines = float64_cosines(router, tokens())
    _, weights = brute_force.gate(cosines / tau, 1, gate)
    sum(weight for (weight,) in weights).backward()
    assert router.temperature.grad is not None
    # A sum over N tokens of both signs, which leaves a tenth of its terms' size.
    assert router.temperature.grad.item() == pytest.approx(tau.grad.item(), rel=10 * ROUNDING)


@pytest.mark.parametrize(("gate", "tau_0"), [("softmax", 0.3), ("sigmoid", 0.07)])
def test_balance_probabilities_use_tau_0_whatever_tau_has_become(gate: str, tau_0: float) -> None:
    router, h = xmoe_router(gate=gate), tokens()
    router.temperature.data.fill_(0.9)
    probs = torch.stack([stats.probs for stats in of_each_token(router, h)])
    expected = brute_force.softmax(float64_cosines(router, h) / tau_0)
    torch.testing.assert_close(probs.double(), expected, rtol=0, atol=ROUNDING)
    grads = torch.autograd.grad(probs.square().sum(), list(router.parameters()), allow_unused=True)
    by_name = dict(zip(dict(router.named_parameters()), grads, strict=True))
    assert by_name["temperature"] is None
    assert by_name["centroids"].abs().sum() > 0
    assert by_name["projection.weight"].abs().sum() > 0


def test_a_vanishing_temperature_can_still_be_raised_by_the_loss() -> None:
    router = xmoe_router(top_k=1)
    router.temperature.data.fill_(1e-3)
    router(tokens()).weights.sum().backward()
    assert router.temperature.grad is not None
    assert router.temperature.grad.item() != 0


@pytest.mark.parametrize("tau", [-1.0, 0.0, 1e-4])
def test_a_vanishing_temperature_leaves_finite_weights(tau: float) -> None:
    router = xmoe_router(top_k=1)
    router.temperature.data.fill_(tau)
    routing = router(tokens())
    _, weights = brute_force.gate(float64_cosines(router, tokens()) / 0.01, 1, "softmax")
    # At 1 / tau = 100 a score's rounding of 1e-7 is 1e-5 in the exponent.
    torch.testing.assert_close(
        routing.weights.double(), torch.tensor(weights, dtype=torch.float64), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, 3, E])
@pytest.mark.parametrize("kind", ["xmoe", "linear"])
def test_gates_equal_a_loop_over_tokens(kind: str, top_k: int, gate: str, normalize: bool) -> None:
    h = tokens(1)
    router: XMoERouter | LinearRouter
    if kind == "xmoe":
        router = xmoe_router(top_k, gate, **BY_NORMALIZE[normalize])
        router.temperature.data.fill_(0.17)  # neither tau_0
        scores = float64_cosines(router, h) / 0.17
    else:
        router = linear_router(top_k, gate, **BY_NORMALIZE[normalize])
        scores = torch.stack([router.wg.weight.detach().double() @ token for token in h.double()])
    routing = router(h)
    experts, weights = brute_force.gate(scores, top_k, gate, normalize)
    assert routing.experts.tolist() == experts
    assert routing.used is None
    expected = torch.tensor([[float(w) for w in row] for row in weights], dtype=torch.float64)
    torch.testing.assert_close(routing.weights.double(), expected, rtol=0, atol=ROUNDING)
    probs = brute_force.softmax(scores)
    entropy = -(probs * probs.log()).sum(-1)
    tokens_stats = of_each_token(router, h)
    found = torch.stack([stats.entropy for stats in tokens_stats])
    torch.testing.assert_close(found.double(), entropy, rtol=0, atol=ROUNDING)
    first = torch.stack([row.max() for row in probs])
    torch.testing.assert_close(routing.first_probs.double(), first, rtol=0, atol=ROUNDING)
    log_z = scores.exp().sum(-1).log()
    found = torch.stack([stats.log_z_squared for stats in tokens_stats]).sqrt()
    torch.testing.assert_close(found.double(), log_z.abs(), rtol=0, atol=ROUNDING)
    if kind == "linear":
        found = torch.stack([stats.probs for stats in tokens_stats])
        torch.testing.assert_close(found.double(), probs, rtol=0, atol=ROUNDING)


def test_without_normalised_tokens_scores_grow_with_a_tokens_length() -> None:
    router, h = xmoe_router(normalize_tokens=False), tokens()
    expected = brute_force.cosine_scores(
        h.double(),
        router.projection.weight.detach().double(),
        router.centroids.detach().double(),
        normalize_tokens=False,
    )
    # Scores up to 3, sums of D terms.
    torch.testing.assert_close(router.scores(h).double(), expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(
        router.scores(7 * h), 7 * router.scores(h), rtol=0, atol=7 * ROUNDING
    )
    before = router.scores(h)
    router.centroids.data *= torch.logspace(-3, 3, E).unsqueeze(-1)
    torch.testing.assert_close(router.scores(h), before, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_without_a_temperature_gate_and_balance_loss_see_the_scores_themselves(gate: str) -> None:
    router, h = xmoe_router(1, gate, learned_temperature=False), tokens()
    assert set(router.state_dict()) == {"projection.weight", "centroids"}
    assert router.temperature is None
    routing, scores = router(h), float64_cosines(router, h)
    experts, weights = brute_force.gate(scores, 1, gate)
    assert routing.experts.tolist() == experts
    expected = torch.tensor([[float(w) for w in row] for row in weights], dtype=torch.float64)
    torch.testing.assert_close(routing.weights.double(), expected, rtol=0, atol=TEN_ROUNDINGS)
    probs = torch.stack([stats.probs for stats in of_each_token(router, h)])
    torch.testing.assert_close(
        probs.double(), brute_force.softmax(scores), rtol=0, atol=TEN_ROUNDINGS
    )


DRAWS = 20000
KEYS = torch.arange(DRAWS)


def one_token_many_times(tau: float) -> Tensor:
    return torch.tensor([0.9, -0.3, 0.5, 0.7]).div(tau).expand(DRAWS, 4)


def test_a_sampled_second_expert_follows_the_softmax_over_the_others() -> None:
    scores = one_token_many_times(tau=0.5)
    routing = route(scores, 2, "softmax", scores, "sampled", normalize=False, keys=KEYS)
    probs = scores[0].softmax(-1)
    assert (routing.experts[:, 0] == 0).all()
    others = probs.clone()
    others[0] = 0
    shares = routing.experts[:, 1].bincount(minlength=4) / DRAWS
    # A share of 20000 draws has a standard deviation of at most 0.0036.
    torch.testing.assert_close(shares, others / others.sum(), rtol=0, atol=0.015)
    torch.testing.assert_close(routing.weights, probs[routing.experts], rtol=TEN_ROUNDINGS, atol=0)
    assert routing.used is None


def test_a_sampled_second_expert_weighs_the_sigmoid_of_its_own_score() -> None:
    scores = one_token_many_times(tau=0.5)
    routing = route(scores, 2, "sigmoid", scores, "sampled", normalize=False, keys=KEYS)
    assert set(routing.experts[:, 1].tolist()) == {1, 2, 3}
    expected = 1 / (1 + (-scores[0][routing.experts]).exp())
    torch.testing.assert_close(routing.weights, expected, rtol=TEN_ROUNDINGS, atol=0)


@pytest.mark.parametrize("spread", [1e3, 1e30])
def test_a_second_expert_is_sampled_even_where_every_other_probability_is_0(spread: float) -> None:
    scores = torch.tensor([[0.0, -spread, -1.1 * spread]])
    routing = route(scores, 2, "softmax", scores, "sampled", keys=KEYS[:1])
    assert routing.experts.tolist() == [[0, 1]]
    assert routing.weights.isfinite().all()


@pytest.mark.parametrize("normalize", [True, False])
def test_a_random_second_expert_is_used_with_twice_its_weight_as_probability(
    normalize: bool,
) -> None:
    scores = one_token_many_times(tau=0.3)
    routing = route(scores, 2, "softmax", scores, "random", normalize, KEYS)
    first, second = scores[0].softmax(-1)[[0, 3]].tolist()
    if normalize:
        first, second = first / (first + second), second / (first + second)
    assert routing.experts.tolist() == [[0, 3]] * DRAWS
    assert routing.used is not None
    assert routing.used[:, 0].all()
    assert routing.used[:, 1].double().mean().item() == pytest.approx(
        2 * second, abs=0.015
    )  # as above
    assert 2 * second < 0.8, "nothing is drawn"
    expected = torch.tensor([first, second]) * routing.used
    torch.testing.assert_close(routing.weights, expected, rtol=0, atol=TEN_ROUNDINGS)


def test_a_random_second_expert_of_half_the_weight_is_always_used() -> None:
    scores = torch.zeros(1000, 2)
    routing = route(scores, 2, "softmax", scores, "random", keys=KEYS[:1000])
    assert routing.used is not None
    assert routing.used.all()


@pytest.mark.parametrize("make", [xmoe_router, linear_router])
@pytest.mark.parametrize("policy", ["sampled", "random"])
def test_the_second_experts_policy_is_for_training(make: Any, policy: str) -> None:
    router, plain, h = make(second_expert=policy), make(), tokens()
    assert not torch.equal(router(h, KEYS[:N]).weights, plain(h).weights)
    router.eval()
    ours, theirs = router(h), plain(h)
    assert ours.used is theirs.used is None
    # Outside training the same operations run.
    assert torch.equal(ours.experts, theirs.experts)
    assert torch.equal(ours.weights, theirs.weights)


@pytest.mark.parametrize("make", [xmoe_router, linear_router])
def test_bf16_tokens_and_weights_are_routed_in_float32(make) -> None:
    router, h = make().bfloat16(), tokens().bfloat16()
    routing = router(h)
    assert routing.weights.dtype == routing.stats.probs.dtype == torch.float32
    assert routing.stats.entropy.dtype == torch.float32
    # The same numbers, once rounded to bf16, routed by the same router in float32.
    exact = router.float()(h.float())
    assert torch.equal(routing.weights, exact.weights)
    assert torch.equal(routing.experts, exact.experts)
    assert torch.equal(routing.stats.probs, exact.stats.probs)


def test_a_sigmoid_that_underflows_does_not_divide_by_zero() -> None:
    scores = torch.full((3, 4), -300.0, requires_grad=True)
    weights = route(scores, 2, "sigmoid", scores).weights
    weights.sum().backward()
    assert weights.isfinite().all()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("num_experts", [1, 3, 8])
def test_balance_loss_equals_a_double_loop(num_experts: int) -> None:
    probs = torch.randn(N, num_experts, generator=torch.Generator().manual_seed(2)).softmax(-1)
    first = probs.argmax(-1)
    first_choices = first.bincount(minlength=num_experts)
    expected = brute_force.balance_loss(probs.double(), first.tolist()).item()
    assert balance_loss(probs.sum(0), first_choices).item() == pytest.approx(
        expected, rel=SUM_OF_TOKENS
    )


def test_the_balance_losses_of_unequal_parts_add_up_to_the_whole_batchs() -> None:
    probs = torch.randn(N, E, generator=torch.Generator().manual_seed(2)).softmax(-1)
    first_choices = probs.argmax(-1).bincount(minlength=E)
    parts = [balance_loss(part.sum(0), first_choices).item() for part in probs.split([7, 33, 0])]
    assert parts[2] == 0
    whole = balance_loss(probs.sum(0), first_choices).item()
    assert sum(parts) == pytest.approx(whole, rel=SUM_OF_TOKENS)


def test_the_balance_loss_of_no_token_is_0() -> None:
    assert balance_loss(torch.zeros(E), torch.zeros(E, dtype=torch.int64)).item() == 0


def test_balance_loss_is_1_when_even_more_when_skewed_and_e_when_collapsed() -> None:
    even = torch.full((E,), 7.0)
    assert balance_loss(even, even.long()).item() == pytest.approx(1.0, abs=TEN_ROUNDINGS)
    skewed = torch.tensor([5.0] + [1.0] * (E - 1))  # half of ten tokens
    loss = balance_loss(skewed, skewed.long()).item()
    assert loss == pytest.approx(E * (0.25 + 0.25 / (E - 1)), rel=TEN_ROUNDINGS)
    assert 1.0 < loss < E
    collapsed = N * torch.eye(E)[0]
    assert balance_loss(collapsed, collapsed.long()).item() == pytest.approx(E, rel=TEN_ROUNDINGS)


def test_lowering_the_balance_loss_evens_out_the_router() -> None:
    router, h = xmoe_router(1), tokens()
    h[:, 0] += 8.0  # a common direction, so that few experts get most tokens
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)

    def busiest() -> float:
        return router(h).experts.flatten().bincount(minlength=E).max().item() / N

    before = busiest()
    for _ in range(40):
        optimizer.zero_grad()
        router(h).stats.aux_loss.backward()
        optimizer.step()
    assert before > 0.5
    assert busiest() < 0.7 * before


@pytest.mark.parametrize("make", [xmoe_router, linear_router])
def test_no_name_of_a_router_contains_expert(make) -> None:
    # DeepSpeed's checkpoint writer takes such a name for an expert's own weight.
    names = list(make().state_dict())
    assert names
    assert not [name for name in names if "expert" in name]
