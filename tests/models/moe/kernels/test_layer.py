"""The whole layer with kernels against the same layer without, on a GPU."""

import pytest
import torch

from magnetar.models.moe.config import MoEConfig
from magnetar.models.moe.layer import MoE

pytestmark = pytest.mark.gpu
KEYS = [
    {},
    {"router": "linear", "gate": "sigmoid", "top_k": 1},
    {"top_k": 3, "num_experts": 6},
    {"num_experts": 1, "top_k": 1, "router": "linear"},
    {"dispatch": "capacity", "capacity_factor": 0.5},
    {"dispatch": "capacity", "capacity_factor": 1.0, "capacity_order": "batch_prioritized"},
    {"dispatch": "capacity", "capacity_factor": 1.0, "top_k": 1},
]


def gradients(layer: MoE, x: torch.Tensor, padding: torch.Tensor | None) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out, stats = layer(x, padding)
    loss = out.float().square().mean() + 0.1 * stats.aux_loss + 0.01 * stats.z_loss
    found = torch.autograd.grad(loss, [x, *layer.parameters()])
    return [out.detach(), *(value.detach() for value in stats), *found]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("inner_norm", [False, True])
@pytest.mark.parametrize("keys", KEYS)
def test_with_and_without(
    keys: dict, inner_norm: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    moe = MoEConfig.model_validate({"num_experts": 8, "top_k": 2} | keys).of_layer(0)
    with torch.device("cuda"):
        layer = MoE(128, 256, moe, "gelu", inner_norm, 1.0)
        for name, parameter in layer.named_parameters():
            torch.nn.init.normal_(parameter, 0.3 if "temperature" in name else 0.0, 0.1)
        x = torch.randn(4, 50, 128)
        padding = torch.rand(4, 50) < 0.2 if padded else None
    with_kernels = gradients(layer, x, padding)
    again = gradients(layer, x, padding)
    assert all(map(torch.equal, with_kernels, again))  # the same bits, run after run
    monkeypatch.setattr("magnetar.models.kernels.usable", lambda _: False)
    without = gradients(layer, x, padding)
    for one, other in zip(with_kernels, without, strict=True):
        scale = max(1e-6, other.double().abs().max().item())
        assert (one.double() - other.double()).abs().max().item() <= 2e-5 * scale


def test_gradients_of_several_passes_grow_in_place() -> None:
    torch.manual_seed(0)
    moe = MoEConfig.model_validate({"num_experts": 8, "top_k": 2}).of_layer(0)
    with torch.device("cuda"):
        layer = MoE(128, 256, moe, "gelu", True, 1.0)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.1)
        layer = layer.bfloat16()
        passes = torch.randn(3, 4, 50, 128, dtype=torch.bfloat16)
    experts = layer.deepspeed_moe.experts
    expected = {name: 0.0 for name, _ in experts.named_parameters()}
    places = []
    for x in passes:
        layer(x)[0].float().square().mean().backward()
        places.append((experts.w1.grad.data_ptr(), experts.w2.grad.data_ptr()))
    for x in passes:
        loss = layer(x)[0].float().square().mean()
        found = torch.autograd.grad(loss, [*experts.parameters()])
        for (name, _), gradient in zip(experts.named_parameters(), found, strict=True):
            expected[name] += gradient.double()
    assert places[0] == places[1] == places[2]
    for name, parameter in experts.named_parameters():
        scale = expected[name].abs().max().item()
        assert (parameter.grad.double() - expected[name]).abs().max().item() <= 2**-7 * scale
