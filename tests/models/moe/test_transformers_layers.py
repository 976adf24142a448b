"""MoE layers with shared experts against those of the transformers package, in float32."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from magnetar.models.moe.config import MoELayerConfig
from magnetar.models.moe.layer import MoE

transformers = pytest.importorskip("transformers")

D, F, SHARED, E = 16, 12, 24, 6
SIZES = {"hidden_size": D, "moe_intermediate_size": F, "num_experts_per_tok": 3}
# Sums of 24 products of numbers around 1 in another order: 24 * 2^-24, of a scale of 5.
TOLERANCE = 1e-5


def deepseek_v3(normalized: bool) -> tuple[nn.Module, dict[str, Any], str]:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = transformers.DeepseekV3Config(
        **SIZES,
        n_routed_experts=E,
        n_shared_experts=SHARED // F,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.5,
        norm_topk_prob=normalized,
    )
    return DeepseekV3MoE(config), {"gate": "sigmoid", "weight_scale": 2.5}, "shared_experts"


def qwen2_moe(normalized: bool) -> tuple[nn.Module, dict[str, Any], str]:
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = transformers.Qwen2MoeConfig(
        **SIZES,
        num_experts=E,
        shared_expert_intermediate_size=SHARED,
        norm_topk_prob=normalized,
    )
    return Qwen2MoeSparseMoeBlock(config), {"shared_gate": True}, "shared_expert"


def theirs_by_our_names(tensors: dict[str, Tensor], shared: str) -> dict[str, Tensor]:
    up = tensors["experts.gate_up_proj"]  # (E, 2 F, D)
    found = {
        "deepspeed_moe.gate.wg.weight": tensors["gate.weight"],
        "deepspeed_moe.experts.w1": up[:, :F].transpose(1, 2),
        "deepspeed_moe.experts.w3": up[:, F:].transpose(1, 2),
        "deepspeed_moe.experts.w2": tensors["experts.down_proj"].transpose(1, 2),
        "shared.w1.weight": tensors[f"{shared}.gate_proj.weight"],
        "shared.w3.weight": tensors[f"{shared}.up_proj.weight"],
        "shared.w2.weight": tensors[f"{shared}.down_proj.weight"],
    }
    if f"{shared}_gate.weight" in tensors:
        found["shared.weight_proj.weight"] = tensors[f"{shared}_gate.weight"]
    return found


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("build", [deepseek_v3, qwen2_moe])
def test_outputs_and_gradients_are_those_of_transformers(build: Any, normalized: bool) -> None:
    theirs, keys, shared = build(normalized)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    normalize = {} if normalized else {"normalize_weights": "never"}
    moe = MoELayerConfig(
        num_experts=E, top_k=3, router="linear", shared_d_ff=SHARED, **keys | normalize
    )
    ours = MoE(D, F, moe, "swiglu", False, 1.0, bias=False)
    named = dict(ours.named_parameters())
    values = theirs_by_our_names(dict(theirs.named_parameters()), shared)
    assert set(values) == set(named)
    for name, value in values.items():
        named[name].data.copy_(value)
    x = torch.randn(2, 9, D, generator=generator)
    expected, (out, _) = theirs(x), ours(x)
    largest = expected.abs().max().item()
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE * largest)
    upstream = torch.randn(x.shape, generator=generator)
    expected.backward(upstream)
    out.backward(upstream)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, gradient in theirs_by_our_names(gradients, shared).items():
        found = named[name].grad
        assert found is not None
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found, gradient, rtol=0, atol=TOLERANCE * scale, msg=name)
