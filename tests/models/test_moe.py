"""The MoE layer on one rank against a loop over tokens and experts in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.config import MoEConfig
from models.feed_forward import FeedForward
from models.init import RandomSource
from models.moe import Assignments, MoE, RoutingStats, expert_capacity, sort_assignments
from tests.models import brute_force

B, T, D, F = 2, 12, 8, 16
N = B * T
# float32 against float64 through a router, a LayerNorm and two matrices; values around 1.
ROUNDING = {"rtol": 1e-4, "atol": 5e-5}


def build(activation: str = "gelu", inner_norm: bool = True, **keys: object) -> MoE:
    moe = MoEConfig(**({"num_experts": 4} | keys))  # type: ignore[arg-type]
    layer = MoE(D, F, moe, activation, inner_norm, 1.0)
    brute_force.randomize(layer)
    return layer


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed))


def by_brute_force(
    layer: MoE, x: Tensor, moe: MoEConfig, activation: str = "gelu", capacity: int | None = None
) -> tuple[brute_force.MoEResult, Tensor, dict[str, Tensor]]:
    """The result, and the leaves that its gradients arrive in."""
    parameters = brute_force.float64_parameters(layer.deepspeed_moe)
    h = x.detach().double().requires_grad_()
    result = brute_force.moe_layer(parameters, h.view(-1, D), moe, activation, capacity)
    return result, h, parameters


def assert_same_stats(stats: RoutingStats, expected: brute_force.MoEResult) -> None:
    assert stats.load.tolist() == expected.load
    assert stats.dropped.item() == expected.dropped
    assert stats.aux_loss.item() == pytest.approx(expected.aux_loss.item(), rel=1e-4)
    assert stats.entropy.item() == pytest.approx(expected.entropy.item(), rel=1e-4)


@pytest.mark.parametrize("inner_norm", [True, False])
@pytest.mark.parametrize("router", ["xmoe", "linear"])
def test_one_expert_equals_the_dense_feed_forward(router: str, inner_norm: bool) -> None:
    layer = build(num_experts=1, top_k=1, router=router, inner_norm=inner_norm)
    experts = layer.deepspeed_moe.experts
    dense = FeedForward(D, F, "gelu", inner_norm, 1.0)
    with torch.no_grad():
        dense.w1.weight.copy_(experts.w1[0].T)
        dense.w1.bias.copy_(experts.b1[0])
        dense.w2.weight.copy_(experts.w2[0].T)
        dense.w2.bias.copy_(experts.b2[0])
        if inner_norm:
            dense.inner_norm.weight.copy_(experts.norm_weight[0])
            dense.inner_norm.bias.copy_(experts.norm_bias[0])
    x = tokens().requires_grad_()
    sparse_out, stats = layer(x)
    dense_out = dense(x)
    # The grouped matmul and the folded LayerNorm only sum in another order.
    torch.testing.assert_close(sparse_out, dense_out, rtol=1e-5, atol=1e-5)
    upstream = tokens(1)
    sparse_grad, dense_grad = (
        torch.autograd.grad(out, x, upstream)[0] for out in (sparse_out, dense_out)
    )
    torch.testing.assert_close(sparse_grad, dense_grad, rtol=1e-5, atol=1e-5)
    assert stats.aux_loss.item() == pytest.approx(1.0, abs=1e-6)
    assert stats.entropy.item() == pytest.approx(0.0, abs=1e-6)


CASES = [
    {"router": router, "gate": gate, "top_k": top_k, **more}
    for router, gate, top_k, more in [
        ("xmoe", "softmax", 2, {}),
        ("xmoe", "softmax", 1, {}),
        ("xmoe", "sigmoid", 2, {}),
        ("xmoe", "sigmoid", 1, {"activation": "relu"}),
        ("linear", "softmax", 2, {"inner_norm": False}),
        ("linear", "softmax", 1, {}),
        ("xmoe", "softmax", 2, {"dispatch": "capacity", "capacity_factor": 0.5}),
        ("linear", "sigmoid", 2, {"dispatch": "capacity", "capacity_factor": 1.0}),
        ("xmoe", "sigmoid", 1, {"dispatch": "capacity", "capacity_factor": 0.7}),
    ]
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_output_statistics_and_all_gradients_equal_a_loop_over_tokens(case: dict) -> None:
    shape = {key: case[key] for key in ("activation", "inner_norm") if key in case}
    keys = {key: value for key, value in case.items() if key not in shape}
    moe = MoEConfig(num_experts=4, **keys)
    layer, x, upstream = build(**shape, num_experts=4, **keys), tokens(), tokens(1)
    capacity = None
    if moe.capacity_factor is not None:
        capacity = -int(-moe.capacity_factor * moe.top_k * N // 4)  # rounded up
    x.requires_grad_()
    out, stats = layer(x)
    ((out * upstream).sum() + stats.aux_loss).backward()

    activation = case.get("activation", "gelu")
    expected, h, parameters = by_brute_force(layer, x, moe, activation, capacity)
    ((expected.output.view(B, T, D) * upstream.double()).sum() + expected.aux_loss).backward()
    assert (expected.dropped > 0) == (capacity is not None)
    assert_same_stats(stats, expected)
    torch.testing.assert_close(out.double().view(N, D), expected.output, **ROUNDING)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), h.grad, **ROUNDING)
    for name, parameter in layer.deepspeed_moe.named_parameters():
        reference = parameters[name].grad
        if reference is None:  # the linear router's, if nothing depends on it
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        scale = reference.abs().max().item()  # gradients sum over up to 48 assignments
        torch.testing.assert_close(
            parameter.grad.double(), reference, rtol=1e-4, atol=5e-5 * max(1, scale), msg=name
        )


def test_first_choices_come_before_second_ones_and_then_position_decides() -> None:
    # Expert 0 is the first choice of tokens 1, 2, 3 and the second of token 0; it takes two.
    experts = torch.tensor([[1, 0], [0, 1], [0, 1], [0, 1]])
    found = sort_assignments(experts, 2, capacity=2)
    by_expert = found.order.split(found.counts.tolist())
    # An index counts first choices of tokens 0..3, then second ones: 4 + token.
    assert [part.tolist() for part in by_expert] == [[1, 2], [0, 5]]
    assert found.load.tolist() == [4, 4]


def test_the_capacity_is_rounded_up_and_never_0() -> None:
    assert expert_capacity(num_tokens=10, num_experts=4, top_k=1, capacity_factor=1.0) == 3
    assert expert_capacity(num_tokens=10, num_experts=4, top_k=2, capacity_factor=1.0) == 5
    assert expert_capacity(num_tokens=10, num_experts=4, top_k=2, capacity_factor=1.25) == 7
    assert expert_capacity(num_tokens=3, num_experts=64, top_k=1, capacity_factor=0.5) == 1


@st.composite
def choices(draw: st.DrawFn) -> tuple[list[list[int]], int, int | None]:
    """Experts of each token, all different; the number of experts; a capacity or None."""
    num_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, min(2, num_experts)))
    one_token = st.lists(
        st.integers(0, num_experts - 1), min_size=top_k, max_size=top_k, unique=True
    )
    experts = draw(st.lists(one_token, min_size=1, max_size=30))
    return experts, num_experts, draw(st.none() | st.integers(1, 12))


@settings(max_examples=300, deadline=None)
@given(choices())
def test_sorted_assignments_are_the_ones_that_a_loop_keeps(case: tuple) -> None:
    experts, num_experts, capacity = case
    found: Assignments = sort_assignments(torch.tensor(experts), num_experts, capacity)
    kept = brute_force.kept_choices(experts, num_experts, capacity)
    flat = [expert for chosen in experts for expert in chosen]
    assert found.load.tolist() == [flat.count(e) for e in range(num_experts)]
    expected: list[list[int]] = [[] for _ in range(num_experts)]
    for choice in range(len(experts[0])):
        for token, chosen in enumerate(experts):
            if kept[token][choice]:
                expected[chosen[choice]].append(choice * len(experts) + token)
    assert found.counts.tolist() == [len(part) for part in expected]
    assert [part.tolist() for part in found.order.split(found.counts.tolist())] == expected


def test_a_token_without_any_expert_adds_zero_and_gets_no_gradient() -> None:
    moe = MoEConfig(num_experts=4, top_k=2, dispatch="capacity", capacity_factor=0.3)
    layer = build(**moe.model_dump())
    x = tokens().requires_grad_()
    out, _ = layer(x)
    kept = by_brute_force(layer, x, moe, capacity=4)[0].kept  # ceil(0.3 * 2 * 24 / 4)
    lost = torch.tensor([not any(keeps) for keeps in kept])
    assert 0 < lost.sum() < N
    assert torch.equal((out.view(N, D) == 0).all(-1), lost)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert torch.equal((grad.view(N, D) == 0).all(-1), lost)


def test_nothing_is_dropped_outside_training() -> None:
    keys = {"dispatch": "capacity", "capacity_factor": 0.3}
    layer, dropless = build(**keys), build()
    assert layer(tokens())[1].dropped > 0
    layer.eval()
    dropless.eval()
    out, stats = layer(tokens())
    assert stats.dropped == 0
    assert torch.equal(out, dropless(tokens())[0])


def test_dropless_never_drops_even_when_all_tokens_want_one_expert() -> None:
    layer = build(top_k=1)
    x = tokens()[:1, :1].expand(B, T, D).contiguous()  # one token, N times
    out, stats = layer(x)
    assert stats.dropped == 0
    assert sorted(stats.load.tolist()) == [0, 0, 0, N]
    torch.testing.assert_close(out, out[:1, :1].expand(B, T, D), rtol=0, atol=1e-6)
    assert out.abs().sum() > 0


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_capacity_beyond_every_load_equals_dropless_bitwise(top_k: int) -> None:
    keys = {"dispatch": "capacity", "capacity_factor": 100.0, "top_k": top_k}
    with_capacity, dropless = build(**keys), build(top_k=top_k)
    results = []
    for layer in (with_capacity, dropless):
        x = tokens().requires_grad_()
        out, stats = layer(x)
        (out.square().sum() + stats.aux_loss).backward()
        results.append([out, *stats, x.grad, *(p.grad for p in layer.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_permuting_the_experts_leaves_the_output_unchanged(gate: str) -> None:
    layer, x = build(num_experts=6, gate=gate), tokens()
    before, stats = layer(x)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for name, parameter in layer.deepspeed_moe.named_parameters():
        if name.startswith("experts.") or name == "gate.centroids":
            parameter.data.copy_(parameter.data[order].clone())
    after, permuted_stats = layer(x)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)  # sums of another order
    assert torch.equal(permuted_stats.load, stats.load[order])
    assert permuted_stats.aux_loss.item() == pytest.approx(stats.aux_loss.item(), rel=1e-5)


def test_a_token_is_treated_alike_wherever_it_stands() -> None:
    layer, x = build(), tokens()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(4))
    out = layer(x)[0].view(N, D)[order]
    shuffled = layer(x.view(N, D)[order].view(B, T, D))[0].view(N, D)
    torch.testing.assert_close(shuffled, out, rtol=1e-5, atol=1e-5)  # other blocks of rows


@pytest.mark.parametrize(("router", "expected"), [("xmoe", 0.4), ("linear", 1.0)])
def test_the_temperature_is_reported(router: str, expected: float) -> None:
    layer = build(router=router)
    if router == "xmoe":
        layer.deepspeed_moe.gate.temperature.data.fill_(expected)
    assert layer(tokens())[1].temperature.item() == pytest.approx(expected, rel=1e-6)


def test_a_bf16_layer_routes_like_float32_and_returns_bf16() -> None:
    layer, x = build().bfloat16(), tokens().bfloat16()
    out, stats = layer(x)
    assert out.dtype == torch.bfloat16
    assert stats.aux_loss.dtype == stats.load.dtype == stats.dropped.dtype == torch.float32
    exact, exact_stats = layer.float()(x.float())
    assert torch.equal(stats.load, exact_stats.load)
    assert stats.aux_loss.item() == pytest.approx(exact_stats.aux_loss.item(), rel=1e-5)
    # A handful of bf16 roundings of 4e-3 each, of sums of size 1 to 3.
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.1)


def test_only_the_experts_carry_deepspeeds_marks() -> None:
    layer = build(num_experts=4)
    for name, parameter in layer.named_parameters():
        marks = {key: vars(parameter).get(key) for key in ("allreduce", "num_experts")}
        if ".experts." in name:
            assert marks == {"allreduce": False, "num_experts": 4}, name
            assert vars(parameter)["group_name"] == "ep_size_1"
        else:
            assert marks == {"allreduce": None, "num_experts": None}, name


def test_checkpoint_names_are_the_ones_that_deepspeed_splits() -> None:
    names = set(build(num_experts=2, inner_norm=False).state_dict())
    assert names == {
        "deepspeed_moe.gate.projection.weight",
        "deepspeed_moe.gate.centroids",
        "deepspeed_moe.gate.temperature",
    } | {
        f"deepspeed_moe.experts.deepspeed_experts.{expert}.{name}"
        for expert in (0, 1)
        for name in ("w1", "b1", "w2", "b2")
    }


def test_a_layer_draws_its_experts_by_the_source_it_is_given() -> None:
    layers = [build(), build()]
    for layer, seed in zip(layers, (1, 2), strict=True):
        layer.init_weights(RandomSource(seed, "ffn"))
    first, second = (layer.deepspeed_moe.experts.w1 for layer in layers)
    assert not torch.equal(first, second)
