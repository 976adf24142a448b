"""The size of a model and its computation per token."""

import torch
from torch import nn

from magnetar.models.config import ModelConfig, on_one_rank
from magnetar.models.moe.layer import MoE
from magnetar.models.transformer import empty_model


def num_parameters(config: ModelConfig) -> tuple[int, int]:
    """Parameters of the whole model over all ranks, and active parameters per token.

    The active parameters cost 6 FLOPs each per token, forward and backward: top_k experts of each
    MoE layer and the output projection count, embedding and position tables do not.
    """
    with torch.device("meta"):
        model = empty_model(on_one_rank(config))
    total = sum(parameter.numel() for parameter in model.parameters())
    active = total
    for module in model.modules():
        if isinstance(module, MoE):
            moe = module.deepspeed_moe.moe
            experts = sum(p.numel() for p in module.deepspeed_moe.experts.parameters())
            active -= experts * (moe.num_experts - moe.top_k) // moe.num_experts
        elif isinstance(module, nn.Embedding):
            active -= module.weight.numel()
    if config.output_projection and config.tie_embeddings:
        assert config.vocab_size is not None
        active += config.vocab_size * config.d_model
    return total, active


def in_words(config: ModelConfig) -> dict[str, str]:
    """Lines for a person, by name: `model`, `size` and, in a MoE model, `experts`."""
    total, active = num_parameters(config)
    depth = f"{config.num_layers}"
    if config.architecture == "encoder_decoder":
        depth = f"{config.encoder_depth} + {config.decoder_depth}"
    lines = {
        "model": f"{config.architecture}, {depth} layers, d_model {config.d_model}, {config.norm}",
        "size": f"{total:,} parameters, {active:,} a token",
    }
    if (moe := config.moe) is not None:
        nth = {1: "", 2: "2nd ", 3: "3rd "}.get(moe.every, f"{moe.every}th ")
        counts = ", ".join(map(str, moe.expert_counts))
        lines["experts"] = (
            f"{counts} in every {nth}layer, {moe.router} router, top-{moe.top_k}, {moe.dispatch}"
        )
    return lines


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Useful FLOPs per training token, forward and backward; causal attention counts half.

    In an encoder-decoder a token is one source token and one target token, with equal lengths.
    """
    _, active = num_parameters(config)
    # Attended pairs per token and layer, in units of seq_len: 1 in an encoder and in
    # cross-attention, 1/2 in causal attention.
    crossed = config.decoder_depth if config.architecture == "encoder_decoder" else 0
    pairs = config.encoder_depth + config.decoder_depth / 2 + crossed
    return 6.0 * active + 6.0 * 2 * pairs * seq_len * config.num_heads * config.head_width
