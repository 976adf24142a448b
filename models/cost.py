"""How large a model is, and how much it computes."""

import torch
from torch import nn

from magnetar.models.config import ModelConfig
from magnetar.models.moe.config import ON_ONE_RANK
from magnetar.models.moe.layer import MoE
from magnetar.models.transformer import empty_model


def num_parameters(config: ModelConfig) -> tuple[int, int]:
    """Parameters of the whole model over all ranks, and those that one token passes through.

    The second number counts top_k experts a MoE layer and leaves embedding and position tables
    out (a look-up costs nothing), but not the output projection: 6 FLOPs a token each, forward
    and backward.
    """
    if config.moe is not None:
        config = config.model_copy(update={"moe": config.moe.model_copy(update=ON_ONE_RANK)})
    with torch.device("meta"):
        model = empty_model(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    active = total
    for module in model.modules():
        if isinstance(module, MoE):
            moe = module.deepspeed_moe.moe
            experts = sum(p.numel() for p in module.deepspeed_moe.experts.parameters())
            active -= experts * (moe.num_experts - moe.top_k) // moe.num_experts
    tables = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    }
    active -= sum(table.numel() for table in tables.values())
    if config.output_projection and config.tie_embeddings:
        assert config.vocab_size is not None
        active += config.vocab_size * config.d_model
    return total, active


def in_words(config: ModelConfig) -> dict[str, str]:
    """A few lines for a person, by what they say: `model`, `size` and, if there are, `experts`."""
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
    """Useful FLOPs of one training token, forward and backward, causal attention counted half.

    In an encoder-decoder a token is one of the source and one of the target, of equal lengths.
    """
    _, active = num_parameters(config)
    # Pairs of tokens, in units of seq_len: all in an encoder and in cross-attention, else half.
    crossed = config.decoder_depth if config.architecture == "encoder_decoder" else 0
    pairs = config.encoder_depth + config.decoder_depth / 2 + crossed
    return 6.0 * active + 6.0 * 2 * pairs * seq_len * config.d_model
