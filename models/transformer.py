"""The decoder: a causal language model of dense and MoE layers.

Letters: B batch, T tokens, D d_model, V vocab_size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import SelfAttention
from models.config import ModelConfig
from models.feed_forward import FeedForward
from models.init import RandomSource
from models.moe import MoE, RoutingStats
from models.norms import NORM_STYLES

IGNORE_INDEX = -100
# GPT-2's. The papers leave it open; TorchScale's 1/sqrt(D) starts a small model well above ln V.
EMBEDDING_STD = 0.02


class DecoderOutput(NamedTuple):
    """Logits and one RoutingStats for each MoE layer, first layer first.

    Attributes:
        logits: (B, T, V), in the model's dtype.
        routing: one entry for each MoE layer.
    """

    logits: Tensor
    routing: list[RoutingStats]


class Block(nn.Module):
    """Attention and a feed-forward network, dense or MoE; see `models.norms` for the picture."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        """Build the layer of this index (from 0)."""
        super().__init__()
        style = NORM_STYLES[config.norm]
        gain = style.gain(config.num_layers)
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.attention = SelfAttention(
            config.d_model, config.num_heads, config.attention_dropout, style.inner, gain
        )
        self.ffn_norm = nn.LayerNorm(config.d_model)
        shape = (config.d_model, config.d_ff)
        self.ffn: FeedForward | MoE
        if config.moe is not None and config.is_moe_layer(index):
            self.ffn = MoE(*shape, config.moe, config.activation, style.inner, gain)
        else:
            self.ffn = FeedForward(*shape, config.activation, style.inner, gain)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, RoutingStats | None]:
        """(B, T, D) -> (B, T, D), and the routing of a MoE layer."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        h = self.ffn(self.ffn_norm(x))
        h, routing = h if isinstance(h, tuple) else (h, None)
        return x + self.dropout(h), routing


class Decoder(nn.Module):
    """Embedding, blocks, final LayerNorm, output projection."""

    def __init__(self, config: ModelConfig) -> None:
        """Build the model of a resolved config (vocab_size not None), weights not yet drawn."""
        super().__init__()
        assert config.vocab_size is not None
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_seq_len, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.d_model)
        self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight

    def init_weights(self, source: RandomSource) -> None:
        """Embeddings, and an untied output, from N(0, 0.02^2), so that logits start near 0."""
        source.normal_(self.embedding.weight.data, "embedding.weight", EMBEDDING_STD)
        source.normal_(self.positions.weight.data, "positions.weight", EMBEDDING_STD)
        if not self.config.tie_embeddings:
            source.normal_(self.output.weight.data, "output.weight", EMBEDDING_STD)

    def forward(self, tokens: Tensor) -> DecoderOutput:
        """Predict the next token at every position.

        Args:
            tokens: (B, T) int64, T at most max_seq_len.
        """
        positions = torch.arange(tokens.size(1), device=tokens.device)
        x = self.dropout(self.embedding(tokens) + self.positions(positions))
        routing = []
        for block in self.blocks:
            x, stats = block(x)
            if stats is not None:
                routing.append(stats)
        return DecoderOutput(self.output(self.final_norm(x)), routing)


def build_model(config: ModelConfig, seed: int) -> Decoder:
    """The model of a resolved config with its initial weights, on the default device.

    The weights depend on the seed, on the parameters' names and, for experts, on their global
    indices; not on the number of ranks.
    """
    model = Decoder(config)
    for name, module in model.named_modules():
        if hasattr(module, "init_weights"):
            # An Experts module is drawn by its MoE layer, which knows the global indices.
            if name.endswith("deepspeed_moe.experts"):
                continue
            module.init_weights(RandomSource(seed, name))
    return model


def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy in nats and the number of targets that are not IGNORE_INDEX.

    Args:
        logits: (B, T, V) of any float dtype; the softmax is float32.
        targets: (B, T) int64.

    Returns:
        () float32 and () int64.
    """
    flat = logits.flatten(0, 1).float()
    total = F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total, (targets != IGNORE_INDEX).sum()


def num_parameters(config: ModelConfig) -> tuple[int, int]:
    """Parameters of the whole model over all ranks, and those that one token passes through.

    The second number counts top_k experts a MoE layer and leaves the two embedding tables out
    (a look-up costs nothing), but not the output projection: 6 FLOPs a token each, forward and
    backward.
    """
    assert config.vocab_size is not None
    d_model, d_ff = config.d_model, config.d_ff
    inner = NORM_STYLES[config.norm].inner
    attention = 4 * d_model * d_model + 4 * d_model + 2 * d_model * inner
    ffn = 2 * d_model * d_ff + d_ff + d_model + 2 * d_ff * inner
    norms = 4 * d_model
    total = active = 2 * d_model + config.vocab_size * d_model
    total += config.max_seq_len * d_model
    total += 0 if config.tie_embeddings else config.vocab_size * d_model
    for index in range(config.num_layers):
        moe = config.moe if config.is_moe_layer(index) else None
        router = _router_parameters(config) if moe else 0
        total += attention + norms + (moe.num_experts if moe else 1) * ffn + router
        active += attention + norms + (moe.top_k if moe else 1) * ffn + router
    return total, active


def _router_parameters(config: ModelConfig) -> int:
    assert config.moe is not None
    moe = config.moe
    if moe.router == "linear":
        return config.d_model * moe.num_experts
    return (config.d_model + moe.num_experts) * moe.router_width + 1


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Useful FLOPs of one training token, forward and backward, causal attention counted half."""
    _, active = num_parameters(config)
    attention = config.num_layers * 2 * seq_len * config.d_model / 2
    return 6.0 * active + 6.0 * attention
