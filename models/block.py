"""One layer of a Transformer: attention, cross-attention, and a feed-forward network or MoE layer.

Letters: B batch, T tokens, S keys, D d_model, H num_heads.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

from magnetar.models.config import ModelConfig
from magnetar.models.layers.attention import CrossAttention, LayerCache, SelfAttention
from magnetar.models.layers.feed_forward import FeedForward
from magnetar.models.layers.multiway import Multiway, per_modality
from magnetar.models.layers.norms import NORM_STYLES, Depths, Residual, Sublayer
from magnetar.models.layers.positions import Rotary
from magnetar.models.moe.layer import MoE, RoutingStats


class Context(NamedTuple):
    """The inputs of every block of a stack, beside the residual stream.

    Attributes:
        mask: summand of self-attention's logits, broadcast to (B, H, T, S), or None.
        is_causal: whether self-attention sees only the past; False if the mask hides the future.
        rotary: rotation of queries and keys, or None.
        first_position: position of the first token.
        split_position: number of tokens of the first modality, or None.
        padding: (B, T) bool, tokens that no MoE layer routes, or None.
        memory: (B, S, D), output of the encoder, or None.
        memory_mask: summand of cross-attention's logits, broadcast to (B, H, T, S), or None.
        sample_keys: (B,) int64, keys of the routers' noise, or None.
    """

    mask: Tensor | None
    is_causal: bool
    rotary: Rotary | None
    first_position: int
    split_position: int | None
    padding: Tensor | None
    memory: Tensor | None
    memory_mask: Tensor | None
    sample_keys: Tensor | None = None


class Block(nn.Module):
    """Self-attention, cross-attention in the decoder of an encoder-decoder, feed-forward or MoE.

    `models.layers.norms` has the picture of each sublayer's residual stream.
    """

    def __init__(
        self, config: ModelConfig, depths: Depths, index: int, moe_class: type[MoE] = MoE
    ) -> None:
        """Build the layer with this index (from 0) of a stack."""
        super().__init__()
        style = NORM_STYLES[config.norm]
        alpha, gain = style.alpha(depths), style.gain(depths)
        drop_path = config.drop_path * index / max(1, depths.own - 1)

        kinds: dict[str, Any] = {"norm_type": config.norm_type, "bias": config.bias}

        def residual(sublayer: Sublayer) -> Residual:
            return Residual(
                style,
                sublayer,
                config.d_model,
                alpha,
                dropout=config.dropout,
                drop_path=drop_path,
                norm_eps=config.norm_eps,
                multiway=config.multiway,
                **kinds,
            )

        heads = (config.d_model, config.num_heads, config.attention_dropout)
        of_attention = kinds | {
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "qk_norm": config.qk_norm,
            "qk_norm_over": config.qk_norm_over,
            "norm_eps": config.norm_eps,
        }
        self.attention_residual = residual("attention")
        self.attention = SelfAttention(
            *heads,
            "attention" in style.inner,
            gain,
            head_scale=style.head_scale,
            multiway=config.multiway,
            **of_attention,
        )
        self.cross_attention: CrossAttention | None = None
        if not depths.is_alone and not depths.in_encoder:
            self.cross_attention_residual = residual("cross_attention")
            self.cross_attention = CrossAttention(
                *heads,
                "cross_attention" in style.inner and config.cross_attention_inner_norm,
                gain,
                **of_attention,
            )
        self.ffn_residual = residual("ffn")
        has_inner_norm = "ffn" in style.inner
        options = (gain, config.norm_eps, config.activation_dropout)
        self.ffn: nn.Module
        if config.moe is not None and config.is_moe_layer(index):
            # MoE layers are numbered through the encoder first, then through the decoder.
            earlier = 0 if depths.in_encoder else depths.encoder
            number = sum(map(config.moe_layers_among, (earlier, index)))
            self.ffn = moe_class(
                config.d_model,
                config.moe.expert_d_ff or config.d_ff,
                config.moe.of_layer(number),
                config.activation,
                has_inner_norm,
                *options,
                **kinds,
                time_major=config.moe.time_major and depths.in_encoder,
                layer=earlier + index,
            )
        else:
            shape = (config.d_model, config.d_ff, config.activation, has_inner_norm)
            ffn = FeedForward(*shape, *options, **kinds)
            self.ffn = Multiway(ffn) if config.multiway else ffn

    def forward(
        self, x: Tensor, context: Context, cache: LayerCache | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, T, D) -> (B, T, D), and the routing of a MoE layer."""
        split = context.split_position
        h = self.attention(
            self.attention_residual.before(x, split),
            context.mask,
            context.is_causal,
            rotary=context.rotary,
            first_position=context.first_position,
            cache=cache,
            split_position=split,
        )
        x = self.attention_residual(x, h, split)
        if self.cross_attention is not None:
            h = self.cross_attention_residual.before(x)
            h = self.cross_attention(h, context.memory, context.memory_mask, cache)
            x = self.cross_attention_residual(x, h)
        h, routing = self.ffn_residual.before(x, split), None
        if isinstance(self.ffn, MoE):
            h, routing = self.ffn(h, context.padding, context.sample_keys)  # (B, T, D)
        else:
            h = per_modality(self.ffn, h, split)
        return self.ffn_residual(x, h, split), routing
