"""The MoE layer on one rank against a loop over tokens and experts in float64."""

import math
from collections.abc import Callable
from itertools import compress
from typing import Any

import pytest
import torch
from torch import Tensor

from magnetar.models.layers.feed_forward import FeedForward
from magnetar.models.moe.config import MoELayerConfig
from magnetar.models.moe.layer import MoE, RoutingStats
from magnetar.models.moe.noise import token_keys
from tests.models import brute_force

B, T, D, F = 2, 12, 8, 16
N = B * T
# float32 against float64 through a router, a LayerNorm and two matrices; values around 1.
ROUNDING = {"rtol": 1e-4, "atol": 5e-5}
# float32 twice, by other operators or in other blocks of rows, whose kernels add the D + F products
# in another order: 2 (D + F) = 48 roundings by 2^-24 of sums below 4 make 1.1e-5.
OTHER_ORDER = {"rtol": 1e-5, "atol": 1e-5}


# Keys of `build` that are no keys of `moe`.
SHAPE = ("activation", "inner_norm", "norm_eps", "activation_dropout", "time_major", "layer")


def build(activation: str = "gelu", inner_norm: bool = True, **keys: Any) -> MoE:
    shape = {key: keys.pop(key) for key in SHAPE if key in keys}
    moe = MoELayerConfig(**({"num_experts": 4} | keys))
    layer = MoE(D, F, moe, activation, inner_norm, 1.0, **shape)
    brute_force.randomize(layer)
    return layer


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed))


def by_brute_force(
    layer: MoE,
    x: Tensor,
    moe: MoELayerConfig,
    activation: str = "gelu",
    capacity: int | None = None,
    eps: float = 1e-5,
) -> tuple[brute_force.MoEResult, Tensor, dict[str, Tensor]]:
    """The result, and the leaves that its gradients arrive in."""
    parameters = brute_force.float64_parameters(layer.deepspeed_moe)
    h = x.detach().double().requires_grad_()
    result = brute_force.moe_layer(parameters, h.flatten(0, -2), moe, activation, capacity, eps)
    return result, h, parameters


def assert_same_stats(stats: RoutingStats, expected: brute_force.MoEResult) -> None:
    assert stats.load.tolist() == expected.load
    assert stats.dropped.item() == expected.dropped
    # Float32 scores up to 14 in an exponent, summed over 24 tokens.
    assert stats.aux_loss.item() == pytest.approx(expected.aux_loss.item(), rel=1e-4)
    assert stats.mean_entropy.item() == pytest.approx(expected.entropy.item(), rel=1e-4)
    assert stats.z_loss.item() == pytest.approx(expected.z_loss.item(), rel=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "relu", "swish", "swiglu"])
@pytest.mark.parametrize("inner_norm", [True, False])
@pytest.mark.parametrize("router", ["xmoe", "linear"])
def test_one_expert_equals_the_dense_feed_forward(
    router: str, inner_norm: bool, activation: str
) -> None:
    layer = build(activation, inner_norm, num_experts=1, top_k=1, router=router, norm_eps=0.1)
    experts = layer.deepspeed_moe.experts
    dense = FeedForward(D, F, activation, inner_norm, 1.0, norm_eps=0.1)
    with torch.no_grad():
        for matrix, bias in (("w1", "b1"), ("w2", "b2"), ("w3", "b3")):
            if getattr(experts, matrix) is not None:
                getattr(dense, matrix).weight.copy_(getattr(experts, matrix)[0].T)
                getattr(dense, matrix).bias.copy_(getattr(experts, bias)[0])
        if inner_norm:
            dense.inner_norm.weight.copy_(experts.norm_weight[0])
            dense.inner_norm.bias.copy_(experts.norm_bias[0])
    x = tokens().requires_grad_()
    sparse_out, stats = layer(x)
    dense_out = dense(x)
    # A grouped product and F.linear are two operators: a processor may have a kernel for each.
    torch.testing.assert_close(sparse_out, dense_out, **OTHER_ORDER)
    upstream = tokens(1)
    sparse_grad, dense_grad = (
        torch.autograd.grad(out, x, upstream)[0] for out in (sparse_out, dense_out)
    )
    torch.testing.assert_close(sparse_grad, dense_grad, **OTHER_ORDER)
    assert stats.aux_loss.item() == pytest.approx(1.0, abs=1e-6)
    assert stats.mean_entropy.item() == pytest.approx(0.0, abs=1e-6)


AFTER = {"normalize_weights": "after_dropping"}
BY_PRIORITY = {"capacity_order": "batch_prioritized"}


def capacity_of(factor: float) -> dict[str, Any]:
    return {"dispatch": "capacity", "capacity_factor": factor}


CASES = [
    {"router": router, "gate": gate, "top_k": top_k, **more}
    for router, gate, top_k, more in [
        ("xmoe", "softmax", 2, {}),
        ("xmoe", "softmax", 1, {}),
        ("xmoe", "sigmoid", 2, {}),
        ("xmoe", "sigmoid", 1, {"activation": "relu"}),
        ("xmoe", "softmax", 3, {"activation": "swish"}),
        ("linear", "sigmoid", 4, {"activation": "swiglu"}),
        ("linear", "softmax", 2, {"inner_norm": False}),
        ("linear", "softmax", 1, {"activation": "swiglu", "inner_norm": False}),
        ("linear", "softmax", 2, {"norm_eps": 0.3}),
        ("xmoe", "softmax", 2, {"normalize_tokens": False}),
        ("xmoe", "sigmoid", 1, {"learned_temperature": False}),
        ("xmoe", "softmax", 1, {"normalize_tokens": False, "learned_temperature": False}),
        ("xmoe", "softmax", 2, capacity_of(0.5)),
        ("linear", "sigmoid", 2, capacity_of(1.0)),
        ("xmoe", "sigmoid", 1, capacity_of(0.7)),
        ("xmoe", "softmax", 3, capacity_of(0.6)),
        ("xmoe", "softmax", 2, capacity_of(0.5) | AFTER),
        ("linear", "sigmoid", 3, capacity_of(0.7) | AFTER),
        ("linear", "softmax", 1, capacity_of(0.5) | AFTER),
        ("xmoe", "softmax", 2, capacity_of(0.6) | BY_PRIORITY),
        ("xmoe", "sigmoid", 2, capacity_of(0.6) | BY_PRIORITY),
        ("linear", "softmax", 3, capacity_of(0.4) | BY_PRIORITY | AFTER),
    ]
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_output_statistics_and_all_gradients_equal_a_loop_over_tokens(case: dict) -> None:
    shape = {key: case[key] for key in SHAPE if key in case}
    keys = {key: value for key, value in case.items() if key not in shape}
    moe = MoELayerConfig(num_experts=4, **keys)
    layer, x, upstream = build(**shape, num_experts=4, **keys), tokens(), tokens(1)
    capacity = None
    if moe.capacity_factor is not None:
        capacity = -int(-moe.capacity_factor * moe.top_k * N // 4)  # rounded up
    x.requires_grad_()
    out, stats = layer(x)
    ((out * upstream).sum() + stats.aux_loss + stats.z_loss).backward()

    expected, h, parameters = by_brute_force(
        layer, x, moe, case.get("activation", "gelu"), capacity, case.get("norm_eps", 1e-5)
    )
    loss = (expected.output.view(B, T, D) * upstream.double()).sum()
    (loss + expected.aux_loss + expected.z_loss).backward()
    assert (expected.dropped > 0) == (capacity is not None)
    assert_same_stats(stats, expected)
    torch.testing.assert_close(out.double().view(N, D), expected.output, **ROUNDING)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), h.grad, **ROUNDING)
    for name, parameter in layer.deepspeed_moe.named_parameters():
        reference = parameters[name].grad
        scale = reference.abs().max().item()  # gradients sum over up to 96 assignments
        torch.testing.assert_close(
            parameter.grad.double(), reference, rtol=1e-4, atol=5e-5 * max(1, scale), msg=name
        )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("d_model", "d_ff"), [(23, 37), (24, 37), (23, 40), (20, 36), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_widths_that_no_grouped_product_takes_equal_the_loop(
    dtype: torch.dtype, d_model: int, d_ff: int, training: bool
) -> None:
    layer = MoE(d_model, d_ff, MoELayerConfig(num_experts=4), "swiglu", True, 1.0)
    brute_force.randomize(layer)
    layer = layer.to(dtype).train(training)
    generator = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(2, B, T, d_model, generator=generator).to(dtype)
    x.requires_grad_()
    out, stats = layer(x)
    ((out * upstream).sum() + stats.aux_loss).backward()
    expected, h, parameters = by_brute_force(layer, x, layer.deepspeed_moe.moe, "swiglu")
    ((expected.output * upstream.double().view(N, -1)).sum() + expected.aux_loss).backward()
    # In bf16 some ten roundings; otherwise those of ROUNDING, as the router is float32 in float64
    # as well. Relative to the largest number of a tensor.
    rounding = 10 * 2**-8 if dtype == torch.bfloat16 else ROUNDING["rtol"]
    pairs = [(out.view(N, -1), expected.output), (x.grad.view(N, -1), h.grad.view(N, -1))]
    pairs += [(p.grad, parameters[n].grad) for n, p in layer.deepspeed_moe.named_parameters()]
    for found, wanted in pairs:
        atol = rounding * max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("normalize", ["before_dropping", "after_dropping"])
def test_a_token_without_any_expert_adds_zero_and_gets_no_gradient(normalize: Any) -> None:
    moe = MoELayerConfig(num_experts=4, **capacity_of(0.3), normalize_weights=normalize)
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
    assert torch.equal(out, dropless(tokens())[0])  # the same rows in the same order


def test_dropless_never_drops_even_when_all_tokens_want_one_expert() -> None:
    layer = build(top_k=1)
    x = tokens()[:1, :1].expand(B, T, D).contiguous()  # one token, N times
    out, stats = layer(x)
    assert stats.dropped == 0
    assert sorted(stats.load.tolist()) == [0, 0, 0, N]
    # The last rows of a block may have a kernel of their own.
    torch.testing.assert_close(out, out[:1, :1].expand(B, T, D), **OTHER_ORDER)
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
    # Nothing is dropped: the same rows in the same order go through the same operations.
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
    torch.testing.assert_close(after, before, **OTHER_ORDER)
    assert torch.equal(permuted_stats.load, stats.load[order])
    assert permuted_stats.aux_loss.item() == pytest.approx(
        stats.aux_loss.item(), rel=OTHER_ORDER["rtol"]
    )


def test_a_token_is_treated_alike_wherever_it_stands() -> None:
    layer, x = build(), tokens()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(4))
    out = layer(x)[0].view(N, D)[order]
    shuffled = layer(x.view(N, D)[order].view(B, T, D))[0].view(N, D)
    torch.testing.assert_close(shuffled, out, **OTHER_ORDER)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [({}, 0.4), ({"router": "linear"}, 1), ({"learned_temperature": False}, 1)],
)
def test_the_temperature_is_reported(keys: dict[str, Any], expected: float) -> None:
    layer = build(**keys)
    temperature = layer.deepspeed_moe.gate.temperature
    assert (temperature is not None) == (expected != 1)
    if temperature is not None:
        temperature.data.fill_(expected)
    assert layer(tokens())[1].temperature.item() == pytest.approx(
        expected, rel=2**-24
    )  # one float32


def test_a_bf16_layer_routes_like_float32_and_returns_bf16() -> None:
    layer, x = build().bfloat16(), tokens().bfloat16()
    out, stats = layer(x)
    assert out.dtype == torch.bfloat16
    assert stats.aux_loss.dtype == stats.load.dtype == stats.dropped.dtype == torch.float32
    exact, exact_stats = layer.float()(x.float())
    assert torch.equal(stats.load, exact_stats.load)
    # The router is in float32 in both.
    assert stats.aux_loss.item() == pytest.approx(
        exact_stats.aux_loss.item(), rel=OTHER_ORDER["rtol"]
    )
    # A handful of bf16 roundings of 4e-3 each, of sums of size 1 to 3.
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.1)


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


def some_padding() -> Tensor:
    """(B, T): the first sample's end, and two places of the second."""
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, 7:] = True
    padding[1, [0, 5]] = True
    return padding


@pytest.mark.parametrize(
    "keys",
    [{}, {"top_k": 1}, capacity_of(0.7), capacity_of(0.5) | AFTER | BY_PRIORITY],
    ids=str,
)
def test_padding_is_as_if_it_were_not_there(keys: dict) -> None:
    layer, padding, upstream = build(**keys), some_padding(), tokens(1)
    num_real = int((~padding).sum())
    results = []
    for x, mask in (
        (tokens(), padding),
        (tokens().masked_fill(padding.unsqueeze(-1), torch.nan), padding),
        (tokens()[~padding].unsqueeze(0), None),
    ):
        layer.zero_grad()
        x.requires_grad_()
        out, stats = layer(x, mask)
        real = slice(None) if mask is None else ~padding
        loss = (out[real] * upstream[~padding].view_as(out[real])).sum()
        (loss + stats.aux_loss + stats.z_loss).backward()
        if mask is not None:
            assert (out[padding] == 0).all()
            assert (x.grad[padding] == 0).all()
        own = [out[real].view(num_real, D), x.grad[real].view(num_real, D), *stats]
        results.append(own + [p.grad for p in layer.parameters()])
    # Padding is taken out before anything is computed, so the operations are the same.
    for with_padding, nan_padding, alone in zip(*results, strict=True):
        assert torch.equal(with_padding, alone)
        assert torch.equal(nan_padding, alone)
    assert stats.load.sum() == layer.deepspeed_moe.moe.top_k * num_real
    assert (stats.dropped > 0) == ("dispatch" in keys)


@pytest.mark.parametrize(
    ("keys", "padding"),
    [
        ({}, torch.zeros(B, T, dtype=torch.bool)),
        ({"route_padding": True} | capacity_of(0.7), some_padding()),
    ],
    ids=["no padding", "routed"],
)
def test_a_mask_that_keeps_no_token_from_the_router_changes_nothing(
    keys: dict[str, Any], padding: Tensor
) -> None:
    layer, x = build(**keys), tokens()
    (masked, masked_stats), (plain, plain_stats) = layer(x, padding), layer(x)
    # The same tokens in the same order, so the same operations.
    assert torch.equal(masked, plain)
    for ours, theirs in zip(masked_stats, plain_stats, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "keys", [{}, capacity_of(0.5) | AFTER, {"second_expert": "random"}, {"router": "linear"}]
)
def test_nothing_but_padding_gives_zeros_and_no_gradient(keys: dict) -> None:
    layer, x = build(**keys, jitter=0.1), tokens().requires_grad_()
    out, stats = layer(x, torch.ones(B, T, dtype=torch.bool))
    (out.sum() + stats.aux_loss + stats.z_loss).backward()
    assert (out == 0).all()
    for name in ("aux_loss", "mean_entropy", "dropped", "z_loss", "load"):
        assert (getattr(stats, name) == 0).all(), name
    for gradient in (x.grad, *(p.grad for p in layer.parameters())):
        assert gradient is None or (gradient == 0).all()


@pytest.mark.parametrize("padded", [False, True])
def test_time_major_fills_capacity_position_by_position(padded: bool) -> None:
    keys = capacity_of(0.5)
    padding = some_padding() if padded else None
    x = tokens()
    out, stats = build(**keys, time_major=True)(x, padding)
    turned = None if padding is None else padding.t()
    expected, expected_stats = build(**keys)(x.transpose(0, 1), turned)
    # The same tokens in the same order, so the same operations.
    assert torch.equal(out, expected.transpose(0, 1))
    assert torch.equal(stats.dropped, expected_stats.dropped)
    assert not torch.equal(out, build(**keys)(x, padding)[0]), "the order did not matter"


@pytest.mark.parametrize("keys", [{}, {"top_k": 1}, AFTER, capacity_of(9.0) | BY_PRIORITY | AFTER])
@pytest.mark.parametrize("padded", [False, True])
def test_outside_training_an_expert_takes_a_fraction_of_the_real_tokens(
    padded: bool, keys: dict
) -> None:
    padding = some_padding() if padded else torch.zeros(B, T, dtype=torch.bool)
    layer, x = build(eval_capacity_fraction=0.3, **keys), tokens()
    assert layer(x, padding)[1].dropped == 0, "training has another rule"
    layer.eval()
    capacity = {24: 8, 17: 6}[int((~padding).sum())]  # 0.3 of them, rounded up
    expected, _, _ = by_brute_force(layer, x[~padding], layer.deepspeed_moe.moe, capacity=capacity)
    out, stats = layer(x, padding)
    assert expected.dropped > 0
    assert_same_stats(stats, expected)
    torch.testing.assert_close(out[~padding].double(), expected.output, **ROUNDING)


def test_a_random_order_gives_every_token_of_an_expert_the_same_chance() -> None:
    layer = build(top_k=1, capacity_order="random", **capacity_of(1.0))
    x = tokens()[:1, :1].expand(B, T, D)  # one token, N times: one expert, capacity N / 4
    torch.manual_seed(0)
    draws = 400
    kept = sum((layer(x)[0].view(N, D) != 0).any(-1).double() for _ in range(draws)) / draws
    assert kept.sum().item() == pytest.approx(N / 4)
    # A share of 0.25 over 400 draws has a standard deviation of 0.022.
    torch.testing.assert_close(kept, torch.full_like(kept, 0.25), rtol=0, atol=0.1)


NOISE: list[dict[str, Any]] = [
    {"jitter": 0.3},
    {"second_expert": "sampled"},
    {"second_expert": "random"},
    {"capacity_order": "random", "top_k": 1} | capacity_of(0.5),
]


@pytest.mark.parametrize("keys", [*NOISE, {"activation_dropout": 0.5}], ids=str)
def test_noise_follows_the_seed_and_ends_with_training(keys: dict) -> None:
    layer, x = build(eval_capacity_fraction=0.3, **keys), tokens()
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(layer(x)[0])
    assert torch.equal(outs[0], outs[1])  # the same draws, the same call
    assert not torch.equal(outs[0], outs[2])
    quiet = build(eval_capacity_fraction=0.3, top_k=keys.get("top_k", 2))
    state = torch.get_rng_state()
    # Without noise both run the same operations.
    assert torch.equal(layer.eval()(x)[0], quiet.eval()(x)[0])
    assert torch.equal(torch.get_rng_state(), state), "evaluation drew a random number"


def test_jitter_reaches_the_router_and_not_the_experts() -> None:
    layer, x = build(num_experts=1, top_k=1, jitter=0.25), tokens().bfloat16()
    layer.bfloat16()
    seen = []
    layer.deepspeed_moe.gate.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    out, _ = layer(x)
    ratio = seen[0] / x.view(N, D).float()
    assert seen[0].dtype == torch.float32
    assert 0.75 <= ratio.min() < 0.8
    assert 1.2 < ratio.max() <= 1.25
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.05)
    layer.eval()
    # A single expert weighs 1 whatever its score.
    assert torch.equal(out, layer(x)[0]), "the only expert saw the noise"
    assert torch.equal(seen[1], x.view(N, D))


@pytest.mark.parametrize("keys", NOISE, ids=str)
def test_noise_is_a_function_of_the_samples_key(keys: dict[str, Any]) -> None:
    layer, x, sample_keys = build(**keys), tokens(), torch.tensor([5, 2**40])
    out = layer(x, None, sample_keys)[0]
    assert torch.equal(layer(x, None, sample_keys)[0], out)  # the same call
    assert not torch.equal(layer(x, None, sample_keys + 1)[0], out)
    assert not torch.equal(build(**keys, layer=1)(x, None, sample_keys)[0], out)
    swapped = layer(x.flip(0), None, sample_keys.flip(0))[0].flip(0)
    torch.testing.assert_close(swapped, out, **OTHER_ORDER)


@pytest.mark.parametrize("keys", NOISE[:3], ids=str)
def test_padding_takes_no_noise_from_a_token(keys: dict[str, Any]) -> None:
    layer, x, sample_keys = build(**keys), tokens(), torch.tensor([5, 2**40])
    padding = some_padding()
    real, whole = layer(x, padding, sample_keys)[0], layer(x, None, sample_keys)[0]
    torch.testing.assert_close(real[~padding], whole[~padding], **OTHER_ORDER)


def test_a_layer_without_noise_draws_nothing() -> None:
    for layer in (build(), build(**capacity_of(0.5)), build(jitter=0.3).eval()):
        before = torch.get_rng_state()
        layer(tokens())
        assert torch.equal(torch.get_rng_state(), before)


def test_an_unused_second_expert_is_no_assignment() -> None:
    keys: dict[str, Any] = {"second_expert": "random"} | capacity_of(0.7)
    layer, x = build(**keys), tokens()
    sample_keys = torch.arange(B)
    out, stats = layer(x, sample_keys=sample_keys)
    routing = layer.deepspeed_moe.gate(x.view(N, D), token_keys(sample_keys, T, 0).view(N))
    assert routing.used is not None
    used = routing.used.tolist()
    assert 0 < sum(second for _, second in used) < N
    assert all(first for first, _ in used)
    experts = routing.experts.tolist()
    wanted = [e for row, uses in zip(experts, used, strict=True) for e in compress(row, uses)]
    assert stats.load.tolist() == [wanted.count(expert) for expert in range(4)]
    kept = brute_force.kept_choices(experts, 4, math.ceil(0.7 * 2 * N / 4), used=used)
    assert stats.dropped.item() == len(wanted) - sum(map(sum, kept))
    assert stats.dropped > 0
    parameters = brute_force.float64_parameters(layer.deepspeed_moe)
    for token in range(N):
        expected = torch.zeros(D, dtype=torch.float64)
        for choice in range(2):
            if kept[token][choice]:
                expected = expected + routing.weights[token, choice].item() * (
                    brute_force.feed_forward(
                        parameters, x.view(N, D)[token].double(), "gelu", experts[token][choice]
                    )
                )
        torch.testing.assert_close(out.view(N, D)[token].double(), expected, **ROUNDING)


@pytest.mark.parametrize(
    ("frozen", "is_trained"),
    [
        ("none", lambda _: True),
        ("router", lambda name: ".experts." in name),
        ("router_and_experts", lambda _: False),
    ],
)
def test_what_is_frozen_gets_no_gradient_and_the_input_still_does(
    frozen: str, is_trained: Callable[[str], bool]
) -> None:
    layer, free = build("swiglu", frozen=frozen), build("swiglu")
    grads = []
    for each in (layer, free):
        x = tokens().requires_grad_()
        out, stats = each(x)
        (out.square().sum() + stats.aux_loss + stats.z_loss).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)  # what is frozen changes no operation on the input
    for name, parameter in layer.named_parameters():
        assert parameter.requires_grad == is_trained(name), name
        assert (parameter.grad is not None) == is_trained(name), name
