"""Parity with the authors' own code, torchscale 0.3.0, where it follows its papers.

torchscale imports fairscale and timm for features that are off here (checkpointing, stochastic
depth), so these two are stood in for: `pip install --no-deps torchscale==0.3.0` is enough.
"""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.moe import expert_capacity, sort_assignments
from models.router import balance_loss, route
from models.transformer import Decoder
from tests.models.brute_force import randomize

REASON = "not installed; to run this: pip install --no-deps torchscale==0.3.0"


@pytest.fixture(scope="module", autouse=True)
def torchscale() -> Iterator[None]:
    stand_ins = {
        "timm": {},
        "timm.models": {},
        "timm.models.layers": {"drop_path": None},
        "fairscale": {},
        "fairscale.nn": {"checkpoint_wrapper": None, "wrap": None},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, attributes in stand_ins.items():
            module = ModuleType(name)
            vars(module).update(attributes)
            patch.setitem(sys.modules, name, module)
        pytest.importorskip("torchscale", reason=REASON)
        import torchscale.architecture.decoder  # noqa: F401

        # Its statistics take a histogram of integers, which CPUs refuse.
        histc = torch.histc
        patch.setattr(torch, "histc", lambda x, *args, **keys: histc(x.float(), *args, **keys))
        yield


def torchscale_decoder(model: Decoder, subln: bool) -> nn.Module:
    """The authors' decoder with this model's weights."""
    from torchscale.architecture.config import DecoderConfig
    from torchscale.architecture.decoder import Decoder as TorchScaleDecoder

    config = model.config
    arguments = DecoderConfig(
        decoder_embed_dim=config.d_model,
        decoder_attention_heads=config.num_heads,
        decoder_ffn_embed_dim=config.d_ff,
        decoder_layers=config.num_layers,
        activation_fn=config.activation,
        vocab_size=config.vocab_size,
        subln=subln,
    )

    class Positions(nn.Module):
        def forward(self, tokens: Tensor, **_: Any) -> Tensor:
            return model.positions.weight[: tokens.size(1)].expand(*tokens.shape, -1)

    theirs = TorchScaleDecoder(
        arguments, model.embedding, Positions(), model.output, is_encoder_decoder=False
    )
    state = {"layer_norm": model.final_norm}
    for index, block in enumerate(model.blocks):
        layer = f"layers.{index}"
        state |= {
            f"{layer}.self_attn_layer_norm": block.attention_norm,
            f"{layer}.final_layer_norm": block.ffn_norm,
            f"{layer}.self_attn.out_proj": block.attention.out_proj,
            f"{layer}.ffn.fc1": block.ffn.w1,
            f"{layer}.ffn.fc2": block.ffn.w2,
        }
        if subln:
            state[f"{layer}.self_attn.inner_attn_ln"] = block.attention.inner_norm
            state[f"{layer}.ffn.ffn_layernorm"] = block.ffn.inner_norm
        for part, name in enumerate("qkv"):
            projection = nn.Linear(config.d_model, config.d_model)
            projection.weight.data = block.attention.qkv_proj.weight.chunk(3)[part].data
            projection.bias.data = block.attention.qkv_proj.bias.chunk(3)[part].data
            state[f"{layer}.self_attn.{name}_proj"] = projection
    weights = {
        f"{name}.{parameter}": value
        for name, module in state.items()
        for parameter, value in module.state_dict().items()
    }
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert {name.split(".")[0] for name in missing} <= {"embed_tokens", "output_projection"}
    return theirs


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm", ["subln", "pre"])
def test_the_decoder_equals_torchscales(norm: str, activation: str) -> None:
    config = ModelConfig(
        vocab_size=50,
        num_layers=3,
        d_model=32,
        d_ff=48,
        num_heads=4,
        max_seq_len=20,
        norm=norm,
        activation=activation,
        tie_embeddings=False,
    )
    model = Decoder(config)
    randomize(model, std=0.2)
    tokens = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(0))
    theirs, _ = torchscale_decoder(model, norm == "subln")(tokens)
    # float32 through three layers in another order; logits are of size 1 to 4.
    torch.testing.assert_close(model(tokens).logits, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2])
def test_dispatch_weights_dropping_and_balance_loss_equal_torchscales(top_k: int) -> None:
    from torchscale.component.xmoe.routing import top1gating, top2gating

    num_tokens, num_experts = 24, 4
    logits = 2 * torch.randn(
        num_tokens, num_experts, generator=torch.Generator().manual_seed(top_k)
    )
    logits[:, 0] += 1.0  # so that an expert overflows
    if top_k == 1:
        aux_loss, combine, _, _ = top1gating(logits.clone())
    else:
        aux_loss, combine, _, _ = top2gating(
            logits.clone(),
            second_expert_policy="all",
            normalize_gate_prob_before_dropping=True,
        )
    routing = route(logits, top_k, "softmax", logits.softmax(-1))
    capacity = expert_capacity(num_tokens, num_experts, top_k, 1.0)
    assert capacity == combine.size(-1)
    kept = sort_assignments(routing.experts, num_experts, capacity)
    assert kept.counts.sum() < kept.load.sum(), "nothing was dropped"
    ours = torch.zeros(num_tokens, num_experts)
    chosen = routing.experts.t().flatten()[kept.order]
    ours[kept.order % num_tokens, chosen] = routing.weights.t().flatten()[kept.order]
    # Softmax in float32, summed in another order.
    torch.testing.assert_close(ours, combine.sum(-1), rtol=0, atol=1e-6)
    share = routing.experts[:, 0].bincount(minlength=num_experts) / num_tokens
    loss = balance_loss(routing.balance_probs, share)
    assert loss.item() == pytest.approx(aux_loss.item(), rel=1e-5)
