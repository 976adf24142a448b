"""Self-attention and cross-attention, with a cache of keys and values for decoding.

Letters: B batch, T queries, S keys, D d_model, H num_heads, G num_kv_heads, d head_dim.

With fewer heads of keys and values than of queries (arXiv 2305.13245) H / G neighbouring heads of
queries share one head of keys and values.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnetar.models.layers.feed_forward import Linear, zero_bias
from magnetar.models.layers.init import RandomSource
from magnetar.models.layers.multiway import Multiway, per_modality, pools
from magnetar.models.layers.norms import layer_norm
from magnetar.models.layers.positions import RelativeBias, Rotary


def expect_many_shapes() -> None:
    """Turn cuDNN's attention off in this process.

    It makes a plan for each new shape, which takes as long as a training step. Bins of sentence
    pairs and the steps of a search have hundreds of shapes.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass
class LayerCache:
    """Keys and values that one layer has computed so far.

    Attributes:
        own: self-attention's keys and values, (B, G, S, d) each; None before the first step.
        cross: cross-attention's keys and values, which never change; None before the first step.
    """

    own: tuple[Tensor, Tensor] | None = None
    cross: tuple[Tensor, Tensor] | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, G, T, d) and return all (B, G, S, d)."""
        if self.own is not None:
            keys = torch.cat([self.own[0], keys], dim=2)
            values = torch.cat([self.own[1], values], dim=2)
        self.own = keys, values
        return keys, values


class Cache:
    """Keys and values of every layer of a decoder.

    Attributes:
        layers: cache of each layer.
        length: number of positions in the cache.
    """

    def __init__(self, num_layers: int) -> None:
        """An empty cache."""
        self.layers = [LayerCache() for _ in range(num_layers)]
        self.length = 0

    @property
    def source_len(self) -> int | None:
        """Positions of the encoder's output; None before the first step or without an encoder."""
        cross = self.layers[0].cross
        return None if cross is None else cross[0].size(2)

    def select(self, rows: Tensor, own_only: bool = False) -> None:
        """Keep these rows (B',) of the batch in this order, for beam search.

        With own_only each row keeps its source, so the encoder's keys and values stay as they are.
        """
        for layer in self.layers:
            for name in ("own",) if own_only else ("own", "cross"):
                pair = getattr(layer, name)
                if pair is not None:
                    setattr(layer, name, tuple(tensor.index_select(0, rows) for tensor in pair))


class _Attention(nn.Module, ABC):
    """Common base of self-attention and cross-attention: heads, norms, output projection."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dropout: float,
        inner_norm: bool,
        gain: float,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        head_scale: bool = False,
        qk_norm: bool = False,
        qk_norm_over: str = "head",
        norm_eps: float = 1e-5,
        norm_type: str = "layernorm",
        bias: bool = True,
        multiway: bool = False,
    ) -> None:
        """Build the layer.

        Args:
            d_model: width of the residual stream.
            num_heads: heads of queries.
            dropout: probability of dropping an attention weight in training.
            inner_norm: whether a LayerNorm precedes the output projection (Sub-LN).
            gain: initial gain of the value and output projections.
            num_kv_heads: heads of keys and values; divides num_heads. None: num_heads.
            head_dim: width of a head. None: d_model / num_heads.
            head_scale: whether each head's output has a learned factor (NormFormer).
            qk_norm: whether queries and keys have a norm (arXiv 2309.14322).
            qk_norm_over: numbers that one such norm spans, those of a "head" or of "all_heads".
            norm_eps: epsilon of the norms.
            norm_type: kind of the norms, see `layer_norm`.
            bias: whether projections and LayerNorms have biases.
            multiway: whether each modality has projections of its own.
        """
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim or d_model // num_heads
        self.dropout = dropout
        self.gain = gain
        self.norms_all_heads = qk_norm and qk_norm_over == "all_heads"
        self.d_model = d_model
        self.width, self.kv_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim

        def norm(num_numbers: int, multiway: bool = False) -> nn.Module:
            return layer_norm(num_numbers, norm_eps, norm_type, bias, multiway=multiway)

        widths = (self.head_dim, self.head_dim)
        if self.norms_all_heads:
            widths = (self.width, self.kv_width)
        self.q_norm, self.k_norm = (norm(n) if qk_norm else nn.Identity() for n in widths)
        self.head_scale = nn.Parameter(torch.ones(num_heads)) if head_scale else None
        self.inner_norm = norm(self.width, multiway) if inner_norm else nn.Identity()
        self.out_proj = _linear(self.width, d_model, bias, multiway)
        self._build_projections(bias, multiway)

    @abstractmethod
    def _build_projections(self, bias: bool, multiway: bool) -> None:
        """Make the projections of queries, keys and values."""

    def _init_projection(
        self, source: RandomSource, name: str, rows: tuple[int, ...], gains: tuple[float, ...]
    ) -> None:
        """Xavier-normal, each of the stacked matrices with its rows and its gain; biases 0."""
        for path, linear in pools(getattr(self, name), name):
            matrices = linear.weight.data.split(rows)  # type: ignore[operator]
            for part, (matrix, gain) in enumerate(zip(matrices, gains, strict=True)):
                source.xavier_normal_(matrix, f"{path}.weight", gain, part=part)
            zero_bias(linear)

    def _heads(self, x: Tensor, *num_heads: int) -> tuple[Tensor, ...]:
        """(B, T, d * sum of num_heads) -> for each of them a tensor (B, heads, T, d)."""
        heads = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, all heads, T, d)
        return heads.split(num_heads, dim=1)

    def _normed(self, norm: nn.Module, heads: Tensor) -> Tensor:
        """Queries or keys (B, H, T, d) after their norm."""
        if not self.norms_all_heads:
            return norm(heads)
        return self._heads(norm(heads.transpose(1, 2).flatten(-2)), heads.size(1))[0]

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        split_position: int | None = None,
    ) -> Tensor:
        """Queries (B, H, T, d), keys and values (B, G, S, d) -> (B, T, D)."""
        heads = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        if self.head_scale is not None:
            heads = heads * self.head_scale.view(-1, 1, 1)
        merged = heads.transpose(1, 2).flatten(-2)
        merged = per_modality(self.inner_norm, merged, split_position)
        return per_modality(self.out_proj, merged, split_position)


def _linear(d_in: int, d_out: int, bias: bool, multiway: bool) -> nn.Module:
    linear = Linear(d_in, d_out, bias)
    return Multiway(linear) if multiway else linear


class SelfAttention(_Attention):
    """Multi-head attention of a sequence to itself."""

    def _build_projections(self, bias: bool, multiway: bool) -> None:
        self.qkv_proj = _linear(self.d_model, self.width + 2 * self.kv_width, bias, multiway)

    def init_weights(self, source: RandomSource) -> None:
        """Xavier-normal: gain 1 for query and key, `gain` for value and output; biases 0."""
        rows = (self.width, self.kv_width, self.kv_width)
        self._init_projection(source, "qkv_proj", rows, (1.0, 1.0, self.gain))
        self._init_projection(source, "out_proj", (self.d_model,), (self.gain,))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        rotary: Rotary | None = None,
        first_position: int = 0,
        cache: LayerCache | None = None,
        split_position: int | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D) in the dtype of x.

        Args:
            x: (B, T, D).
            mask: summand of the attention logits, broadcast to (B, H, T, S); None: nothing.
            is_causal: whether a position sees only those up to its own; only without a mask.
            rotary: rotation of queries and keys; None: nothing.
            first_position: position of x's first token.
            cache: earlier keys and values, to which those of x are appended.
            split_position: number of tokens of the first modality, see `models.layers.multiway`.
        """
        qkv = per_modality(self.qkv_proj, x, split_position)
        q, k, v = self._heads(qkv, self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        if rotary is not None:
            q, k = rotary(q, k, first_position)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self._attend(q, k, v, mask, is_causal, split_position)


class CrossAttention(_Attention):
    """Multi-head attention of a decoder to the encoder's output."""

    def _build_projections(self, bias: bool, multiway: bool) -> None:
        assert not multiway, "cross-attention sees two sequences, not two modalities"
        self.q_proj = Linear(self.d_model, self.width, bias)
        self.kv_proj = Linear(self.d_model, 2 * self.kv_width, bias)

    def init_weights(self, source: RandomSource) -> None:
        """Xavier-normal: gain 1 for query and key, `gain` for value and output; biases 0."""
        self._init_projection(source, "q_proj", (self.width,), (1.0,))
        self._init_projection(source, "kv_proj", (self.kv_width,) * 2, (1.0, self.gain))
        self._init_projection(source, "out_proj", (self.d_model,), (self.gain,))

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """(B, T, D) and the encoder's output (B, S, D) -> (B, T, D) in the dtype of x.

        The memory may be None once the cache holds its keys and values. The mask is a summand of
        the attention logits, broadcast to (B, H, T, S).
        """
        (q,) = self._heads(self.q_proj(x), self.num_heads)
        if cache is not None and cache.cross is not None:
            k, v = cache.cross
        else:
            assert memory is not None, "the first step needs the encoder's output"
            k, v = self._heads(self.kv_proj(memory), self.num_kv_heads, self.num_kv_heads)
            k = self._normed(self.k_norm, k)  # (B, G, S, d), as v
        if cache is not None:
            cache.cross = k, v
        return self._attend(self._normed(self.q_norm, q), k, v, mask, is_causal=False)


def attention_mask(
    bias: RelativeBias | None,
    padding: Tensor | None,
    is_causal: bool,
    first: int,
    shape: tuple[int, int],
    like: Tensor,
) -> Tensor | None:
    """The summand of the attention logits; None if plain (causal) attention needs none.

    Hidden keys get the lowest finite number, not -inf: a query that sees no key would become NaN.

    Args:
        bias: bias of the distances, or None.
        padding: (B, S) bool, True at keys that no query sees, or None.
        is_causal: whether queries see only the past.
        first: position of the first query.
        shape: (T, S).
        like: tensor with the mask's dtype and device.

    Returns:
        Tensor that broadcasts to (B, H, T, S).
    """
    if bias is None and padding is None and not (is_causal and first):
        return None
    hidden = torch.zeros(1, 1, *shape, dtype=torch.bool, device=like.device)
    if is_causal:
        queries = torch.arange(first, first + shape[0], device=like.device)
        hidden = hidden | (torch.arange(shape[1], device=like.device) > queries.unsqueeze(1))
    if padding is not None:
        hidden = hidden | padding[:, None, None, :]
    values = like.new_zeros(1) if bias is None else bias(first, *shape).to(like.dtype)
    return values.masked_fill(hidden, torch.finfo(like.dtype).min)
