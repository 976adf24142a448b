"""The keys under `magnetar.model` of the JSON."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from magnetar.models.moe.config import MAX_WIDTH, ON_ONE_RANK, MoEConfig
from magnetar.models.section import Count, Positive, Share, StrictModel, strays

# Larger than anybody trains: a slip of the keyboard must not ask for terabytes.
MAX_LAYERS = 10_000
MAX_LENGTH = 1 << 24

NormName = Literal["pre", "post", "subln", "deepnorm", "normformer", "admin"]

Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
Length = Annotated[int, Field(ge=1, le=MAX_LENGTH)]


class RopeScalingConfig(StrictModel):
    """Slower rotary frequencies, for more positions than a model was first trained with."""

    factor: float = Field(ge=1)
    """Divisor of the frequencies."""
    original_max_seq_len: Length | None = None
    """Positions that the model was first trained with. null: every frequency is divided. Otherwise
    only those of pairs of numbers that turn seldom within so many positions (Llama 3.1)."""
    low_freq_factor: Positive = 1.0
    """Turns up to which a pair's frequency is divided by the whole factor. Only with
    original_max_seq_len."""
    high_freq_factor: Positive = 4.0
    """Turns from which a pair keeps its frequency. Between the two the share that is kept grows
    linearly. Only with original_max_seq_len."""

    @model_validator(mode="after")
    def _frequencies_fit(self) -> "RopeScalingConfig":
        if self.original_max_seq_len is None:
            for name in ("low_freq_factor", "high_freq_factor"):
                if getattr(self, name) != RopeScalingConfig.model_fields[name].default:
                    raise ValueError(
                        f"{name}={getattr(self, name)} belongs to original_max_seq_len, which is "
                        "null: leave it out, or give original_max_seq_len"
                    )
        elif self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must exceed "
                f"low_freq_factor={self.low_freq_factor}: use {2 * self.low_freq_factor}, say"
            )
        return self


class ModelKeys(StrictModel):
    """The keys that most models need."""

    architecture: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
    """Kind of Transformer. `decoder`: a causal language model. `encoder`: bidirectional, a masked
    language model. `encoder_decoder`: both, joined by cross-attention."""
    vocab_size: int | None = Field(default=None, ge=2, le=1 << 24)
    """Rows of the embedding. null: the size of the data's vocabulary, plus a mask token if masking
    needs one. A larger number pads it (a multiple of 64 is faster on a GPU)."""
    num_layers: Layers
    """Transformer layers; the encoder's layers in an `encoder_decoder`."""
    num_decoder_layers: Layers | None = None
    """Layers of the decoder in an `encoder_decoder`. null: num_layers."""
    d_model: int = Field(ge=2, le=MAX_WIDTH)
    """Width of the residual stream."""
    d_ff: int = Field(ge=1, le=4 * MAX_WIDTH)
    """Width of a feed-forward network, and of each expert if moe.expert_d_ff is null."""
    num_heads: Count
    """Attention heads; must divide d_model if head_dim is null."""
    num_kv_heads: Count | None = None
    """Heads of keys and values, each shared by num_heads / num_kv_heads heads of queries
    (grouped-query attention, arXiv 2305.13245). It must divide num_heads. null: num_heads."""
    head_dim: int | None = Field(default=None, ge=1, le=MAX_WIDTH)
    """Width of a head. null: d_model / num_heads."""
    max_seq_len: Length
    """Positions, in tokens; the encoder's positions in an `encoder_decoder`."""
    max_target_len: Length | None = None
    """Positions of the decoder in an `encoder_decoder`, in tokens. null: max_seq_len."""
    norm: NormName = "subln"
    """Places of the LayerNorms, scale of the residuals and initial weights: `subln` (Magneto, arXiv
    2210.06423), `deepnorm` (arXiv 2203.00555), `normformer` (arXiv 2110.09456), `pre` (Pre-LN),
    `post` (Post-LN) or `admin` (arXiv 2004.08249). `admin` starts from a profile that magnetar
    profile-admin makes; give it embedding_norm or stable_embedding."""
    norm_type: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of every norm. `rmsnorm`: x / sqrt(mean(x^2) + norm_eps) * weight, without mean and bias
    (arXiv 1910.07467)."""
    norm_eps: Positive = 1e-5
    """Epsilon of the norms."""
    bias: bool = True
    """Whether the matrices of attention, feed-forward networks and experts, and LayerNorms, have
    biases."""
    activation: Literal["gelu", "gelu_tanh", "relu", "swish", "swiglu"] = "gelu"
    """Activation of the feed-forward networks. `gelu_tanh`: GPT-2's approximation of gelu.
    `swiglu`: swish(w1 x) * (w3 x), with a third matrix (arXiv 2002.05202)."""
    positions: Literal["learned", "sinusoidal", "sinusoidal_fairseq", "none"] | None = None
    """Positions added to the embedding. null: `none` if attention_positions is set, else `learned`.
    `sinusoidal`: the Transformer paper's. `sinusoidal_fairseq`: fairseq's, for imported weights."""
    attention_positions: Literal["none", "relative", "rotary", "xpos", "xpos_relative"] = "none"
    """Positions inside attention. `relative`: a learned bias by bucket of distance, one table for
    all layers (T5). `rotary` (arXiv 2104.09864). `xpos`: rotary with decay (arXiv 2212.10554).
    `xpos_relative`: both."""
    relative_buckets: int = Field(default=32, ge=4, le=MAX_WIDTH)
    """Buckets of `relative` positions."""
    relative_max_distance: int = Field(default=128, ge=2)
    """Distance, in tokens, from which `relative` positions share the last bucket."""
    rope_theta: Positive = 10000.0
    """Base of the frequencies of `rotary` and `xpos`: pair i of a head turns by
    rope_theta^(-2i / head_dim) from one position to the next."""
    rope_scaling: RopeScalingConfig | None = None
    """Slower frequencies of `rotary` and `xpos`. null: those of rope_theta alone."""
    xpos_scale_base: Positive = 512.0
    """Distance, in tokens, over which `xpos` decays."""
    dropout: Share = 0.0
    """Dropout of embeddings and sublayer outputs."""
    attention_dropout: Share = 0.0
    """Dropout of attention probabilities."""
    activation_dropout: Share = 0.0
    """Dropout after the feed-forward activation."""
    drop_path: Share = 0.0
    """Probability that a sample skips a sublayer of the last layer (stochastic depth). It rises
    linearly from 0 in the first layer."""
    qk_norm: bool = False
    """Whether a norm acts on queries and keys (arXiv 2309.14322)."""
    qk_norm_over: Literal["head", "all_heads"] = "head"
    """Numbers that a norm of qk_norm spans. `head`: those of each head, with one weight for all
    heads (Qwen3). `all_heads`: those of all heads together (OLMoE)."""
    scale_embedding: bool = False
    """Whether token embeddings are multiplied by sqrt(d_model)."""
    embedding_norm: bool = False
    """Whether a LayerNorm follows the sum of token and position embeddings."""
    stable_embedding: bool = False
    """Whether token embeddings start Xavier-uniform and have a LayerNorm before positions are added
    (arXiv 2110.02861)."""
    tie_embeddings: bool = True
    """Whether the output projection is the (decoder's) embedding matrix."""
    share_embeddings: bool = False
    """Whether encoder and decoder of an `encoder_decoder` have one embedding matrix."""
    moe: MoEConfig | None = None
    """MoE layers. null: a dense model."""


class TorchScaleModelKeys(StrictModel):
    """The keys of imported models, which keep what TorchScale 0.3.0 and its examples do."""

    cross_attention_inner_norm: bool = True
    """Whether Sub-LN's inner LayerNorm is in cross-attention too, as in its paper. TorchScale
    0.3.0: false. Only with norm `subln` in an `encoder_decoder`."""
    relative_bidirectional: bool = False
    """Whether a causal decoder gives half of its `relative` buckets to the future, which it never
    sees. TorchScale 0.3.0: true. Encoders and cross-attention always do."""
    output_projection: bool = True
    """Whether the model returns logits. false: it returns the last LayerNorm's output, as imported
    feature extractors do, and cannot be trained."""
    multiway: bool = False
    """Whether norms, attention and dense feed-forward networks of an `encoder` have two pools of
    parameters, one for each modality (BEiT-3, arXiv 2208.10442). Positions before the split use the
    first pool, the others the second."""


class ModelConfig(TorchScaleModelKeys, ModelKeys):  # ModelKeys come first in the JSON
    """The Transformer: its shape, its norms, its positions, its regularisation."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> "ModelConfig":
        wrong = []
        if self.head_dim is None and self.d_model % self.num_heads:
            heads = [n for n in range(1, self.d_model + 1) if self.d_model % n == 0]
            nearest = min(heads, key=lambda n: abs(n - self.num_heads))
            wrong.append(
                f"d_model={self.d_model} must be a multiple of num_heads={self.num_heads}: "
                f"use {nearest} heads, or d_model "
                f"{-(-self.d_model // self.num_heads) * self.num_heads}, or a head_dim"
            )
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            fitting = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            wrong.append(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}: use one "
                f"of {', '.join(map(str, fitting))}"
            )
        deepest = max(self.num_layers, self.decoder_depth)
        if self.moe is not None and self.moe.every > deepest:
            key = "num_layers" if deepest == self.num_layers else "num_decoder_layers"
            wrong.append(
                f"moe.every={self.moe.every} exceeds {key}={deepest}, so no layer "
                f"would be a MoE layer: use at most {deepest}, or moe null"
            )
        elif self.moe is not None and self.num_moe_layers == 0:
            wrong.append(
                f"moe.first_dense_layers={self.moe.first_dense_layers} leaves no MoE layer among "
                f"{deepest}, of which moe.every={self.moe.every} chooses: use "
                f"{deepest // self.moe.every * self.moe.every - 1} or fewer, or moe null"
            )
        wrong += self._contradictions()
        if self.moe is not None and isinstance(self.moe.num_experts, list) and not wrong:
            num_counts, needed = len(self.moe.num_experts), self.num_moe_layers
            if num_counts != needed:
                wrong.append(
                    f"moe.num_experts={self.moe.num_experts} must have one number for each MoE "
                    f"layer, of which moe.every={self.moe.every} makes {needed}, not {num_counts}: "
                    "give as many, or one number for all"
                )
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    def _contradictions(self) -> list[str]:
        """The problems of keys that belong to another value of another key."""
        two_stacks = self.architecture == "encoder_decoder"
        is_xpos = self.is_rotary and self.attention_positions != "rotary"
        of_two_stacks = ("num_decoder_layers", "max_target_len", "share_embeddings")
        of_relative = ("relative_buckets", "relative_max_distance", "relative_bidirectional")
        wrong = [
            *strays(self, "architecture", "encoder_decoder", of_two_stacks),
            *strays(self, "architecture", "encoder", ["multiway"]),
            *strays(self, "attention_positions", "relative", of_relative, self.is_relative),
            *strays(self, "attention_positions", "xpos", ["xpos_scale_base"], is_xpos),
            *strays(self, "attention_positions", "rotary", ["rope_theta"], self.is_rotary),
        ]
        if not self.cross_attention_inner_norm and not (two_stacks and self.norm == "subln"):
            wrong.append(
                "cross_attention_inner_norm=false belongs to norm 'subln' in architecture "
                f"'encoder_decoder', not to norm {self.norm!r} in {self.architecture!r}: leave it "
                "out"
            )
        if self.rope_scaling is not None and not self.is_rotary:
            wrong.append(
                "rope_scaling belongs to attention_positions 'rotary', but attention_positions is "
                f"{self.attention_positions!r}: leave it out, or use attention_positions 'rotary'"
            )
        if self.qk_norm_over != "head" and not self.qk_norm:
            wrong.append(
                f"qk_norm_over={self.qk_norm_over!r} belongs to qk_norm true: leave it out, or use "
                "qk_norm true"
            )
        if self.multiway and self.moe is not None:
            wrong.append(
                "multiway=true and moe contradict each other, both replace the feed-forward "
                "network: keep one of them"
            )
        if not self.output_projection and self.tie_embeddings:
            wrong.append(
                "output_projection=false leaves nothing to tie, and magnetar train nothing to "
                "learn: set tie_embeddings false as well for a model that is not trained"
            )
        return wrong + self._position_problems()

    def _position_problems(self) -> list[str]:
        wrong = []
        if self.is_rotary and self.head_dim is not None and self.head_dim % 2:
            wrong.append(
                f"attention_positions={self.attention_positions!r} turns pairs of numbers, but "
                f"head_dim={self.head_dim} is odd: use {self.head_dim + 1}"
            )
        elif self.is_rotary and self.head_width % 2:
            fitting = [str(n) for n in range(1, self.d_model) if self.d_model % (2 * n) == 0]
            way_out = f"a num_heads among {', '.join(fitting)}" if fitting else "an even d_model"
            wrong.append(
                f"attention_positions={self.attention_positions!r} turns pairs of numbers, but a "
                f"head has d_model / num_heads = {self.head_width}: use {way_out}"
            )
        positions = max(self.max_seq_len, self.max_target_len or 0)
        if self.is_rotary and self.attention_positions != "rotary":
            # A query times a key grows to 3.5^(positions / base), where 1 / 3.5 is the smallest
            # zeta. 3.5^64 leaves room in float32 for the queries and keys themselves.
            least = positions / 64
            if self.xpos_scale_base < least:
                wrong.append(
                    f"xpos_scale_base={self.xpos_scale_base} is too small for {positions} "
                    "positions, whose products reach 3.5^(positions / xpos_scale_base) and leave "
                    f"float32: use at least {least}, or fewer positions"
                )
        if self.is_relative:
            both = self.architecture == "encoder" or self.relative_bidirectional
            exact = self.relative_buckets // (4 if both else 2)
            if self.relative_max_distance <= exact:
                wrong.append(
                    f"relative_max_distance={self.relative_max_distance} must exceed {exact}: of "
                    f"relative_buckets={self.relative_buckets}, so many hold one small distance "
                    f"each: use {exact + 1} or more, or fewer buckets"
                )
        sinusoidal = self.positions in ("sinusoidal", "sinusoidal_fairseq")
        if sinusoidal and (self.d_model % 2 or self.d_model < 4):
            wrong.append(
                f"positions={self.positions!r} needs an even d_model of at least 4, not "
                f"{self.d_model}: use another d_model, or positions 'learned'"
            )
        return wrong

    @property
    def decoder_depth(self) -> int:
        """Layers of the decoder; 0 in an encoder."""
        if self.architecture == "encoder_decoder":
            return self.num_decoder_layers or self.num_layers
        return self.num_layers if self.architecture == "decoder" else 0

    @property
    def encoder_depth(self) -> int:
        """Layers of the encoder; 0 in a decoder."""
        return 0 if self.architecture == "decoder" else self.num_layers

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def absolute_positions(self) -> str:
        """The kind of positions that the embedding adds; null is resolved."""
        return self.positions or ("learned" if self.attention_positions == "none" else "none")

    @property
    def is_relative(self) -> bool:
        """Whether attention has a relative-position bias."""
        return self.attention_positions in ("relative", "xpos_relative")

    @property
    def is_rotary(self) -> bool:
        """Whether queries and keys are rotated by their positions."""
        return self.attention_positions in ("rotary", "xpos", "xpos_relative")

    def is_moe_layer(self, index: int) -> bool:
        """Whether the layer of this index (from 0) of a stack is a MoE layer."""
        moe = self.moe
        return moe is not None and index >= moe.first_dense_layers and (index + 1) % moe.every == 0

    def moe_layers_among(self, num_layers: int) -> int:
        """MoE layers among the first ones of a stack."""
        return sum(map(self.is_moe_layer, range(num_layers)))

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of all stacks."""
        return sum(map(self.moe_layers_among, (self.encoder_depth, self.decoder_depth)))


def on_one_rank(config: ModelConfig) -> ModelConfig:
    """The config of the same model with all experts on one rank."""
    if config.moe is None:
        return config
    return config.model_copy(update={"moe": config.moe.model_copy(update=ON_ONE_RANK)})
