"""Magnetar's decoders, encoders and encoder-decoders for transformers, in this one file.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

`magnetar convert to-hf` copies it beside the weights, whose names are Magnetar's own. The key
`model` of config.json has the keys of the training's `magnetar.model`. Padding may be on either
side.

Letters: B batch, T tokens, S keys, D d_model, H num_heads, d = D / H, E experts, K top_k.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    Seq2SeqLMOutput,
)

# Whether a LayerNorm stands before each sublayer or after each sum, and which sublayers have one
# before (inner) or after (output) their last matrix.
NORMS: dict[str, dict[str, Any]] = {
    "pre": {"before": True},
    "post": {"before": False},
    "subln": {"before": True, "inner": ("attention", "cross_attention", "ffn")},
    "deepnorm": {"before": False},
    "normformer": {"before": True, "inner": ("ffn",), "output": ("attention",)},
    "admin": {"before": False},
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "swish": F.silu,
    "swiglu": F.silu,
}
MIN_TEMPERATURE = 0.01


class MagnetarConfig(PreTrainedConfig):
    """The config of a model; `model` has Magnetar's keys."""

    model_type = "magnetar"

    def __init__(self, model: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Take the keys, and give transformers the names that it reads."""
        self.model = model or {}
        if model:
            self.vocab_size, self.hidden_size = model["vocab_size"], model["d_model"]
            self.num_hidden_layers = model["num_decoder_layers"] or model["num_layers"]
            self.num_attention_heads = model["num_heads"]
            self.max_position_embeddings = model["max_seq_len"]
            kwargs["is_encoder_decoder"] = model["architecture"] == "encoder_decoder"
            kwargs["tie_word_embeddings"] = model["tie_embeddings"] or model["share_embeddings"]
        super().__init__(**kwargs)


class Context(NamedTuple):
    """What every block of a stack reads; masks are summands of attention logits."""

    mask: Tensor
    rotary: tuple[Tensor, Tensor, Tensor, Tensor] | None
    memory: Tensor | None
    memory_mask: Tensor | None
    cache: Cache | EncoderDecoderCache | None


def alpha(keys: dict[str, Any], in_encoder: bool) -> float:
    """DeepNorm's scale of the residual (arXiv 2203.00555, fig. 2); 1 with other norms."""
    if keys["norm"] != "deepnorm":
        return 1.0
    encoder, decoder = keys["num_layers"], keys["num_decoder_layers"] or keys["num_layers"]
    if keys["architecture"] != "encoder_decoder":
        return (2 * encoder) ** 0.25
    return 0.81 * (encoder**4 * decoder) ** (1 / 16) if in_encoder else (3 * decoder) ** 0.25


class Residual(nn.Module):
    """LayerNorms and residual sum around a sublayer."""

    def __init__(self, keys: dict[str, Any], sublayer: str, in_encoder: bool) -> None:
        super().__init__()
        style, width, eps = NORMS[keys["norm"]], keys["d_model"], keys["norm_eps"]
        self.starts_with_norm = style["before"]
        self.alpha = alpha(keys, in_encoder)
        self.norm = nn.LayerNorm(width, eps)
        has_output_norm = sublayer in style.get("output", ())
        self.output_norm = nn.LayerNorm(width, eps) if has_output_norm else nn.Identity()
        self.omega = nn.Parameter(torch.ones(width)) if keys["norm"] == "admin" else None
        self.dropout = nn.Dropout(keys["dropout"])

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        output = sublayer(self.norm(x) if self.starts_with_norm else x)
        x = x * (self.alpha if self.omega is None else self.omega)
        x = x + self.dropout(self.output_norm(output))
        return x if self.starts_with_norm else self.norm(x)


class Attention(nn.Module):
    """Self-attention, or cross-attention to the encoder's output."""

    def __init__(self, keys: dict[str, Any], layer: int, is_cross: bool) -> None:
        super().__init__()
        width, eps = keys["d_model"], keys["norm_eps"]
        d_head = width // keys["num_heads"]
        self.num_heads, self.layer, self.is_cross = keys["num_heads"], layer, is_cross
        self.dropout = keys["attention_dropout"]
        self.q_norm = nn.LayerNorm(d_head, eps) if keys["qk_norm"] else nn.Identity()
        self.k_norm = nn.LayerNorm(d_head, eps) if keys["qk_norm"] else nn.Identity()
        has_scale = keys["norm"] == "normformer" and not is_cross
        self.head_scale = nn.Parameter(torch.ones(self.num_heads)) if has_scale else None
        has_inner_norm = keys["norm"] == "subln" and (
            keys["cross_attention_inner_norm"] or not is_cross
        )
        self.inner_norm = nn.LayerNorm(width, eps) if has_inner_norm else nn.Identity()
        self.out_proj = nn.Linear(width, width)
        if is_cross:
            self.q_proj, self.kv_proj = nn.Linear(width, width), nn.Linear(width, 2 * width)
        else:
            self.qkv_proj = nn.Linear(width, 3 * width)

    def heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, T, parts * D) -> parts tensors (B, H, T, d)."""
        return x.unflatten(-1, (parts, self.num_heads, -1)).transpose(1, 3).unbind(2)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.is_cross:
            (q,) = self.heads(self.q_proj(x), 1)
            q, (k, v), mask = self.q_norm(q), self.memory(context), context.memory_mask
        else:
            q, k, v = self.heads(self.qkv_proj(x), 3)
            q, k, mask = self.q_norm(q), self.k_norm(k), context.mask
            if context.rotary is not None:
                q_cos, q_sin, k_cos, k_sin = context.rotary
                q, k = turn(q, q_cos, q_sin), turn(k, k_cos, k_sin)
            cache = context.cache
            if isinstance(cache, EncoderDecoderCache):
                cache = cache.self_attention_cache
            if cache is not None:
                k, v = cache.update(k, v, self.layer)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        if self.head_scale is not None:
            out = out * self.head_scale.view(-1, 1, 1)
        return self.out_proj(self.inner_norm(out.transpose(1, 2).flatten(-2)))

    def memory(self, context: Context) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's output, computed once for each source."""
        cache = context.cache
        if isinstance(cache, EncoderDecoderCache) and cache.is_updated.get(self.layer):
            kept = cache.cross_attention_cache.layers[self.layer]
            return kept.keys, kept.values
        k, v = self.heads(self.kv_proj(context.memory), 2)
        k = self.k_norm(k)
        if isinstance(cache, EncoderDecoderCache):
            cache.is_updated[self.layer] = True
            cache.cross_attention_cache.update(k, v, self.layer)
        return k, v


def rotary_tables(
    keys: dict[str, Any], positions: Tensor, max_len: int
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Cosines and sines of queries and keys, (B, 1, T, d) float32 (RoFormer, xPos)."""
    if keys["attention_positions"] not in ("rotary", "xpos", "xpos_relative"):
        return None
    d_head = keys["d_model"] // keys["num_heads"]
    share = torch.arange(0, d_head, 2, dtype=torch.float64, device=positions.device) / d_head
    at = positions.double().unsqueeze(-1)  # (B, T, 1)
    angles, scale = at / 10000.0**share, torch.ones_like(at)
    if keys["attention_positions"] != "rotary":
        scale = ((share + 0.4) / 1.4) ** ((at - max_len // 2) / keys["xpos_scale_base"])
    tables = (
        angles.cos() * scale,
        angles.sin() * scale,
        angles.cos() / scale,
        angles.sin() / scale,
    )
    q_cos, q_sin, k_cos, k_sin = (
        table.float().repeat_interleave(2, dim=-1).unsqueeze(1) for table in tables
    )
    return q_cos, q_sin, k_cos, k_sin


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin) for each pair."""
    pairs = x.float().unflatten(-1, (-1, 2))
    crossed = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return (x.float() * cos + crossed * sin).to(x.dtype)


class RelativeBias(nn.Embedding):
    """A bias of attention logits for each head and bucket of distance (T5)."""

    def __init__(self, keys: dict[str, Any], both: bool) -> None:
        super().__init__(keys["relative_buckets"], keys["num_heads"])
        self.max_distance, self.both = keys["relative_max_distance"], both

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:  # type: ignore[override]
        """Positions (B, T) and (B, S) -> (B, H, T, S)."""
        behind = queries.unsqueeze(-1) - keys.unsqueeze(-2)  # (B, T, S)
        buckets, offset = self.num_embeddings, torch.zeros_like(behind)
        if self.both:
            buckets //= 2
            offset, behind = (behind < 0).long() * buckets, behind.abs()
        behind, exact = behind.clamp_min(0), buckets // 2
        growth = torch.log(behind.clamp_min(1).float() / exact)
        growth = growth / math.log(self.max_distance / exact) * (buckets - exact)
        large = (exact + growth.long()).clamp_max(buckets - 1)
        return super().forward(offset + torch.where(behind < exact, behind, large)).movedim(-1, 1)


class FeedForward(nn.Module):
    """w2(LN(activation(w1 x))), with swiglu w2(LN(silu(w1 x) * (w3 x)))."""

    def __init__(self, keys: dict[str, Any]) -> None:
        super().__init__()
        width, d_ff = keys["d_model"], keys["d_ff"]
        self.activation = ACTIVATIONS[keys["activation"]]
        self.w1 = nn.Linear(width, d_ff)
        self.w3 = nn.Linear(width, d_ff) if keys["activation"] == "swiglu" else None
        has_norm = "ffn" in NORMS[keys["norm"]].get("inner", ())
        self.inner_norm = nn.LayerNorm(d_ff, keys["norm_eps"]) if has_norm else nn.Identity()
        self.dropout = nn.Dropout(keys["activation_dropout"])
        self.w2 = nn.Linear(d_ff, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.w1(x))
        h = h if self.w3 is None else h * self.w3(x)
        return self.w2(self.inner_norm(self.dropout(h)))


class Expert(nn.Module):
    """The same network with Magnetar's names of an expert's tensors; matrices are (in, out)."""

    w1: Tensor
    b1: Tensor
    w3: Tensor
    b3: Tensor

    def __init__(self, keys: dict[str, Any]) -> None:
        super().__init__()
        width, d_ff = keys["d_model"], keys["d_ff"]
        self.activation, self.eps = ACTIVATIONS[keys["activation"]], keys["norm_eps"]
        self.is_gated = keys["activation"] == "swiglu"
        for name in ("w1", "w3") if self.is_gated else ("w1",):
            self.register_parameter(name, nn.Parameter(torch.empty(width, d_ff)))
            self.register_parameter(name.replace("w", "b"), nn.Parameter(torch.empty(d_ff)))
        self.has_norm = "ffn" in NORMS[keys["norm"]].get("inner", ())
        if self.has_norm:
            self.norm_weight, self.norm_bias = (nn.Parameter(torch.empty(d_ff)) for _ in range(2))
        self.w2, self.b2 = nn.Parameter(torch.empty(d_ff, width)), nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(x @ self.w1 + self.b1)
        if self.is_gated:
            h = h * (x @ self.w3 + self.b3)
        if self.has_norm:
            h = F.layer_norm(h, h.shape[-1:], self.norm_weight, self.norm_bias, self.eps)
        return h @ self.w2 + self.b2


class Router(nn.Module):
    """Experts (N, K) and their weights, in float32: X-MoE's cosines (arXiv 2204.09179) or W h."""

    def __init__(self, keys: dict[str, Any], num_experts: int) -> None:
        super().__init__()
        self.moe = moe = keys["moe"]
        if moe["router"] == "linear":
            self.wg = nn.Linear(keys["d_model"], num_experts, bias=False)
            return
        width = moe["d_router"] or max(8, num_experts // 2)
        self.projection = nn.Linear(keys["d_model"], width, bias=False)
        self.centroids = nn.Parameter(torch.empty(num_experts, width))
        if moe["learned_temperature"]:
            self.temperature = nn.Parameter(torch.empty(1))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        moe = self.moe
        if moe["router"] == "linear":
            scores = F.linear(h.float(), self.wg.weight.float())
        else:
            scores = F.linear(h.float(), self.projection.weight.float())
            if moe["normalize_tokens"]:
                scores = F.normalize(scores, dim=-1)
            scores = F.linear(scores, F.normalize(self.centroids.float(), dim=-1))
            if moe["learned_temperature"]:
                scores = scores / self.temperature.float().clamp_min(MIN_TEMPERATURE)
        top_scores, experts = scores.topk(moe["top_k"], dim=-1)
        weights = top_scores.sigmoid()
        if moe["gate"] == "softmax":
            weights = scores.softmax(-1).gather(-1, experts)
        if moe["top_k"] > 1 and moe["normalize_weights"] != "never":
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(
                torch.finfo(torch.float32).tiny
            )
        return experts, weights


class MoE(nn.Module):
    """Every token's top_k experts, weighted; nothing is dropped."""

    def __init__(self, keys: dict[str, Any], number: int) -> None:
        super().__init__()
        counts = keys["moe"]["num_experts"]
        count = counts[number] if isinstance(counts, list) else counts
        experts = nn.ModuleList(Expert(keys) for _ in range(count))
        inner = nn.ModuleDict({"deepspeed_experts": experts})
        self.deepspeed_moe = nn.ModuleDict({"gate": Router(keys, count), "experts": inner})

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(0, 1)  # (N, D)
        chosen, weights = self.deepspeed_moe["gate"](h)
        out = torch.zeros_like(h)
        inner: Any = self.deepspeed_moe["experts"]
        for index, expert in enumerate(inner.deepspeed_experts):
            token, choice = (chosen == index).nonzero(as_tuple=True)
            if len(token):
                rows = expert(h[token]) * weights[token, choice].unsqueeze(-1).to(h.dtype)
                out.index_add_(0, token, rows)
        return out.view_as(x)


class Block(nn.Module):
    """Self-attention, cross-attention in the decoder of two, feed-forward network or MoE layer."""

    def __init__(self, keys: dict[str, Any], layer: int, in_encoder: bool) -> None:
        super().__init__()
        has_encoder = keys["architecture"] == "encoder_decoder" and not in_encoder
        self.attention_residual = Residual(keys, "attention", in_encoder)
        self.attention = Attention(keys, layer, is_cross=False)
        self.cross_attention = None
        if has_encoder:
            self.cross_attention_residual = Residual(keys, "cross_attention", in_encoder)
            self.cross_attention = Attention(keys, layer, is_cross=True)
        self.ffn_residual = Residual(keys, "ffn", in_encoder)
        every = keys["moe"]["every"] if keys["moe"] else 0
        if every and (layer + 1) % every == 0:
            earlier = keys["num_layers"] // every if has_encoder else 0
            self.ffn: nn.Module = MoE(keys, earlier + layer // every)
        else:
            self.ffn = FeedForward(keys)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = self.attention_residual(x, lambda h: self.attention(h, context))
        if self.cross_attention is not None:
            x = self.cross_attention_residual(x, lambda h: self.cross_attention(h, context))
        return self.ffn_residual(x, self.ffn)


def build_stack(stack: Any, keys: dict[str, Any], in_encoder: bool, has_output: bool) -> None:
    """Give a module the parts of one stack, under the names of Magnetar's weights."""
    is_second = keys["architecture"] == "encoder_decoder" and not in_encoder
    width, eps = keys["d_model"], keys["norm_eps"]
    stack.keys, stack.is_causal = keys, not in_encoder
    stack.max_len = (is_second and keys["max_target_len"]) or keys["max_seq_len"]
    stack.embedding = nn.Embedding(keys["vocab_size"], width)
    stack.token_norm = nn.LayerNorm(width, eps) if keys["stable_embedding"] else None
    default = "learned" if keys["attention_positions"] == "none" else "none"
    stack.absolute = keys["positions"] or default
    stack.positions = nn.Embedding(stack.max_len, width) if stack.absolute == "learned" else None
    stack.embedding_norm = nn.LayerNorm(width, eps) if keys["embedding_norm"] else None
    stack.relative_bias = stack.cross_relative_bias = None
    if keys["attention_positions"] in ("relative", "xpos_relative"):
        both = keys["relative_bidirectional"] or in_encoder
        stack.relative_bias = RelativeBias(keys, both)
        if is_second:
            stack.cross_relative_bias = RelativeBias(keys, both=True)
    stack.dropout = nn.Dropout(keys["dropout"])
    depth = (is_second and keys["num_decoder_layers"]) or keys["num_layers"]
    stack.blocks = nn.ModuleList(Block(keys, layer, in_encoder) for layer in range(depth))
    stack.final_norm = nn.LayerNorm(width, eps) if NORMS[keys["norm"]]["before"] else None
    stack.output = nn.Linear(width, keys["vocab_size"], bias=False) if has_output else None


def positions_of(mask: Tensor | None, length: int, like: Tensor) -> Tensor:
    """(B or 1, length) int64, counted from each row's first token that is no padding."""
    if mask is None:
        return torch.arange(length, device=like.device).unsqueeze(0)
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def absolute_positions(stack: Any, positions: Tensor) -> Tensor:
    """(B, T) -> (B, T, D) of a learned or a sinusoidal table."""
    if stack.positions is not None:
        return stack.positions(positions)
    half = stack.keys["d_model"] // 2
    index = torch.arange(half, device=positions.device)
    if stack.absolute == "sinusoidal_fairseq":
        frequencies = torch.exp(index.float() * -(math.log(10000) / (half - 1)))
        angles = (positions + 2).float().unsqueeze(-1) * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
    angles = positions.double().unsqueeze(-1) / 10000.0 ** (index.double() / half)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2).float()


def run_stack(
    stack: Any,
    tokens: Tensor,
    mask: Tensor | None = None,
    cache: Any = None,
    memory: Tensor | None = None,
    memory_padding_mask: Tensor | None = None,
) -> Tensor:
    """Tokens (B, T), mask (B, S) of all keys, 0 at padding -> features (B, T, D)."""
    keys, first = stack.keys, cache.get_seq_length() if cache is not None else 0
    last = first + tokens.size(1)
    all_positions = positions_of(mask, last, tokens)  # (B, S)
    positions = all_positions[:, first:]  # (B, T)
    if int(positions.max()) >= stack.max_len:
        raise ValueError(f"position {int(positions.max())} exceeds the model's {stack.max_len}")
    x = stack.embedding(tokens)
    if stack.token_norm is not None:
        x = stack.token_norm(x)
    if keys["scale_embedding"]:
        x = x * math.sqrt(x.size(-1))
    if stack.absolute != "none":
        x = x + absolute_positions(stack, positions).to(x.dtype)
    if stack.embedding_norm is not None:
        x = stack.embedding_norm(x)
    x = stack.dropout(x)
    if mask is not None and not stack.is_causal:
        x = x * mask.unsqueeze(-1).to(x.dtype)

    def summand(bias: Any, key_positions: Tensor, hidden: Tensor) -> Tensor:
        values = x.new_zeros(1) if bias is None else bias(positions, key_positions).to(x.dtype)
        return values.masked_fill(hidden, torch.finfo(x.dtype).min)

    hidden = torch.zeros(1, 1, 1, last, dtype=torch.bool, device=x.device)
    if mask is not None:
        hidden = mask[:, None, None, :] == 0
    if stack.is_causal:
        index = torch.arange(last, device=x.device)
        hidden = hidden | (index > index[first:, None])
    memory_mask = None
    if memory is not None:
        source_positions = positions_of(memory_padding_mask, memory.size(1), tokens)
        none = torch.zeros(1, 1, 1, memory.size(1), dtype=torch.bool, device=x.device)
        padding = none if memory_padding_mask is None else memory_padding_mask[:, None, None] == 0
        memory_mask = summand(stack.cross_relative_bias, source_positions, padding)
    context = Context(
        summand(stack.relative_bias, all_positions, hidden),
        rotary_tables(keys, positions, stack.max_len),
        memory,
        memory_mask,
        cache,
    )
    for block in stack.blocks:
        x = block(x, context)
    return x if stack.final_norm is None else stack.final_norm(x)


class Stack(nn.Module):
    """One of the two stacks of an encoder-decoder."""

    main_input_name = "input_ids"  # which generate reads of an encoder
    embedding: nn.Embedding
    output: nn.Linear

    def __init__(self, keys: dict[str, Any], in_encoder: bool) -> None:
        super().__init__()
        build_stack(self, keys, in_encoder, has_output=not in_encoder)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        return BaseModelOutput(last_hidden_state=run_stack(self, input_ids, attention_mask))


class MagnetarPreTrainedModel(PreTrainedModel):
    """What the models share."""

    config_class = MagnetarConfig
    _supports_sdpa = True
    _tied_weights_keys = {"output.weight": "embedding.weight"}

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.output


class MagnetarForCausalLM(MagnetarPreTrainedModel, GenerationMixin):
    """A decoder."""

    def __init__(self, config: MagnetarConfig) -> None:
        super().__init__(config)
        build_stack(self, config.model, in_encoder=False, has_output=True)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        x = run_stack(self, input_ids, attention_mask, cache)
        logits = self.output(x[:, -logits_to_keep:] if logits_to_keep else x)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.size(-1), **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)


class MagnetarForMaskedLM(MagnetarPreTrainedModel):
    """An encoder."""

    def __init__(self, config: MagnetarConfig) -> None:
        super().__init__(config)
        build_stack(self, config.model, in_encoder=True, has_output=True)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        x = run_stack(self, input_ids, attention_mask)
        logits = self.output(x)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=(x,))


class MagnetarForSeq2SeqLM(MagnetarPreTrainedModel, GenerationMixin):
    """An encoder-decoder."""

    def __init__(self, config: MagnetarConfig) -> None:
        super().__init__(config)
        self.decoder = Stack(config.model, in_encoder=False)
        self.encoder = Stack(config.model, in_encoder=True)
        self._tied_weights_keys = {}
        if config.model["tie_embeddings"]:
            self._tied_weights_keys["decoder.output.weight"] = "decoder.embedding.weight"
        if config.model["share_embeddings"]:
            self._tied_weights_keys["encoder.embedding.weight"] = "decoder.embedding.weight"
        self.post_init()

    def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
        return self.encoder

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.output

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> Seq2SeqLMOutput:
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask)
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        if decoder_input_ids is None:
            raise ValueError("decoder_input_ids is missing: the target, after the start token")
        memory = encoder_outputs[0]
        x = run_stack(
            self.decoder, decoder_input_ids, decoder_attention_mask, cache, memory, attention_mask
        )
        logits = self.decoder.output(x)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Seq2SeqLMOutput(
            loss=loss, logits=logits, cache=cache, encoder_last_hidden_state=memory
        )
