"""The MoE layer against torchscale 0.3.0's gates, with its departures from the papers switched on.

torchscale's layer needs process groups of its own, so its gates decide here (dispatch, weights,
dropping, losses) and the float64 reference applies the experts.
"""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from magnetar.models.moe.config import MoELayerConfig
from magnetar.models.moe.layer import MoE
from magnetar.models.moe.noise import SECOND_EXPERT, token_keys, uniform
from tests.models import brute_force

REASON = "not installed; to run this: pip install --no-deps torchscale==0.3.0"
B, T, D, F, E = 4, 8, 12, 16, 4
N = B * T
SAMPLE_KEYS = torch.arange(B)


@pytest.fixture(scope="module", autouse=True)
def gates() -> Iterator[ModuleType]:
    """torchscale.component.xmoe.routing."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fairscale", "fairscale.nn"):
            module = ModuleType(name)
            vars(module).update(checkpoint_wrapper=None, wrap=None)
            patch.setitem(sys.modules, name, module)
        pytest.importorskip("torchscale", reason=REASON)
        from torchscale.component.xmoe import routing

        # Its statistics take a histogram of integers, which CPUs refuse.
        histc = torch.histc
        patch.setattr(torch, "histc", lambda x, *args, **keys: histc(x.float(), *args, **keys))
        yield routing


def tokens(seed: int = 0) -> Tensor:
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed))
    x[..., 0] += 3.0  # a common direction, so that an expert overflows
    return x


def some_padding() -> Tensor:
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1, 5:] = padding[2, 3:] = True  # 24 of 32 are real
    return padding


def build(router: str, **keys: Any) -> MoE:
    if router == "xmoe":
        keys |= {"d_router": 16, "normalize_tokens": False, "learned_temperature": False}
    layer = MoE(D, F, MoELayerConfig(num_experts=E, router=router, **keys), "gelu", True, 1.0)
    brute_force.randomize(layer)
    return layer


def their_gate(gates: ModuleType, layer: MoE, **keys: Any) -> nn.Module:
    """torchscale's gate with our weights, in the mode of our layer."""
    router, top_k = layer.deepspeed_moe.gate, layer.deepspeed_moe.moe.top_k
    is_xmoe = layer.deepspeed_moe.moe.router == "xmoe"
    gate = (gates.Top1Gate if top_k == 1 else gates.Top2Gate)(D, E, use_xmoe=is_xmoe, **keys)
    if is_xmoe:
        # A copy: it writes to its weight in every forward pass.
        state = {"wg_reduction.weight": router.projection.weight, "wg": router.centroids.clone()}
    else:
        state = {"wg.weight": router.wg.weight}
    gate.load_state_dict(state)
    return gate.train(layer.training)


def assert_equal_to(layer: MoE, gate: nn.Module, x: Tensor, padding: Tensor | None = None) -> None:
    """Our layer computes what their combine weights say."""
    mask = None if padding is None else padding.reshape(-1)
    aux_loss, combine, _, metadata = gate(x.reshape(-1, D), mask)
    out, stats = layer(x, padding, SAMPLE_KEYS)
    weights = combine.sum(-1).double()  # (N, E)
    parameters = brute_force.float64_parameters(layer.deepspeed_moe)
    expected = torch.zeros(N, D, dtype=torch.float64)
    for token, expert in weights.nonzero().tolist():
        row = brute_force.feed_forward(parameters, x.view(N, D)[token].double(), "gelu", expert)
        expected[token] += weights[token, expert] * row.detach()
    # float32 through a softmax, a LayerNorm and two matrices.
    torch.testing.assert_close(out.double().view(N, D), expected, rtol=1e-4, atol=5e-5)
    assert (stats.load.sum() - stats.dropped).item() == (combine > 0).sum()
    assert stats.dropped > 0
    if padding is None:  # theirs counts padding in the means even where it is not routed
        assert stats.aux_loss.item() == pytest.approx(aux_loss.item(), rel=1e-5)
        assert stats.mean_entropy.item() == pytest.approx(
            metadata["entropy_gating"].item(), rel=1e-5
        )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", ["xmoe", "linear"])
def test_one_expert_a_token(gates: ModuleType, router: str, training: bool, padded: bool) -> None:
    real = 24 if padded else N
    # Theirs counts padded tokens in the capacity even where they are not routed.
    layer = build(
        router,
        top_k=1,
        dispatch="capacity",
        capacity_factor=N / real,
        eval_capacity_fraction=0.25 * N / real,
    ).train(training)
    assert_equal_to(layer, their_gate(gates, layer), tokens(), some_padding() if padded else None)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("router", ["xmoe", "linear"])
def test_two_experts_a_token(
    gates: ModuleType, router: str, before: bool, prioritized: bool, training: bool, padded: bool
) -> None:
    real = 24 if padded else N
    layer = build(
        router,
        dispatch="capacity",
        capacity_factor=N / real,
        eval_capacity_fraction=0.25 * N / real,
        normalize_weights="before_dropping" if before else "after_dropping",
        capacity_order="batch_prioritized" if prioritized else "first_come",
    ).train(training)
    gate = their_gate(
        gates,
        layer,
        second_expert_policy="all",
        normalize_gate_prob_before_dropping=before,
        batch_prioritized_routing=prioritized,
    )
    # Two experts of four: half of all tokens in the mean, and a quarter of them fits.
    assert_equal_to(layer, gate, tokens(), some_padding() if padded else None)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("policy", ["sampled", "random"])
def test_noisy_second_experts(
    gates: ModuleType, monkeypatch: pytest.MonkeyPatch, policy: str, before: bool
) -> None:
    keys = token_keys(SAMPLE_KEYS, T, 0).view(N)
    draws = uniform(keys, E if policy == "sampled" else 1, SECOND_EXPERT)
    monkeypatch.setattr(gates, "gumbel_rsample", lambda shape, device: -(-draws.log()).log())
    monkeypatch.setattr(torch, "rand_like", lambda like: draws.view_as(like))
    layer = build(
        "xmoe",
        dispatch="capacity",
        capacity_factor=1.0,
        second_expert=policy,
        normalize_weights="before_dropping" if before else "after_dropping",
    )
    gate = their_gate(
        gates,
        layer,
        second_expert_policy={"sampled": "sampling", "random": "random"}[policy],
        normalize_gate_prob_before_dropping=before,
    )
    assert_equal_to(layer, gate, tokens())


def test_routed_padding_is_what_their_layers_do(gates: ModuleType) -> None:
    keys: dict[str, Any] = {"eval_capacity_fraction": 0.25, "route_padding": True}
    layer = build("xmoe", top_k=1, **keys).eval()
    gate = their_gate(gates, layer)
    x = tokens()
    # Padding is routed, so the same operations run.
    assert torch.equal(layer(x, some_padding())[0], layer(x)[0])
    assert_equal_to(layer, gate, x)
