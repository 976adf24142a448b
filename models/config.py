"""What a model is: the keys under `magnetar.model` of the JSON."""

import math
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticKnownError


class StrictModel(BaseModel):
    """Base of every section: immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _one_problem(value: object, validate: ValidatorFunctionWrapHandler) -> int | list[int]:
    """A union's problems are those of each of its types: only one of them is the user's."""
    try:
        return validate(value)
    except ValidationError as error:
        found = error.errors()[-1 if isinstance(value, list) else 0]
        raise PydanticKnownError(found["type"], found.get("ctx")) from None  # type: ignore[arg-type]


Count = Annotated[int, Field(ge=1)]
Counts = Annotated[Count | list[Count], WrapValidator(_one_problem)]


class MoEConfig(StrictModel):
    """The mixture-of-experts layers: which layers, how many experts, how tokens reach them."""

    num_experts: Counts = Field(
        description="Experts in each MoE layer, over the whole job. A list: those of the first MoE "
        "layer, of the second and so on, the encoder's before the decoder's.",
    )
    every: int = Field(
        default=2,
        ge=1,
        description="Every n-th layer is a MoE layer: layers n, 2n, 3n, ... counted from 1, in "
        "the encoder and in the decoder.",
    )
    top_k: int = Field(default=2, ge=1, description="Experts that each token is sent to.")
    ep_size: int = Field(
        default=1,
        ge=1,
        description="Ranks that share one set of experts (expert parallelism). It must divide "
        "both num_experts and the number of ranks.",
    )
    router: Literal["xmoe", "linear"] = Field(
        default="xmoe",
        description="`xmoe`: low-rank cosine router with a learnable temperature "
        "(arXiv 2204.09179). `linear`: one matrix, as in Switch and GShard.",
    )
    gate: Literal["softmax", "sigmoid"] = Field(
        default="softmax",
        description="How a score becomes the weight of an expert: softmax over all experts, or "
        "the sigmoid of the chosen expert's own score.",
    )
    d_router: int | None = Field(
        default=None,
        ge=1,
        description="Width d_e of the X-MoE router's projection. null: num_experts / 2, at "
        "least 8. Only with router `xmoe`.",
    )
    normalize_tokens: bool = Field(
        default=True,
        description="Scores are cosines. false: only the experts' side is normalised, as in "
        "TorchScale 0.3.0. Only with router `xmoe`.",
    )
    learned_temperature: bool = Field(
        default=True,
        description="Scores are divided by a learned temperature, in the balance loss by the "
        "paper's fixed one. false: by nothing, as in TorchScale 0.3.0. Only with router `xmoe`.",
    )
    frozen: Literal["none", "router", "router_and_experts"] = Field(
        default="none",
        description="What does not train: the X-MoE paper freezes routers and experts in "
        "fine-tuning.",
    )
    jitter: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="In training, the router sees its input times uniform noise from "
        "[1 - jitter, 1 + jitter] (Switch).",
    )
    second_expert: Literal["all", "sampled", "random"] = Field(
        default="all",
        description="GShard's policies for the second expert in training, with top_k 2. `all`: the "
        "second best, always. `sampled`: drawn from the softmax over the others. `random`: the "
        "second best, kept with probability min(1, 2 * its weight). Outside training `all`.",
    )
    normalize_weights: Literal["before_dropping", "after_dropping"] = Field(
        default="before_dropping",
        description="With top_k > 1 a token's weights are made to sum 1: over its choices, or over "
        "those that were not dropped.",
    )
    dispatch: Literal["dropless", "capacity"] = Field(
        default="dropless",
        description="`dropless`: every token reaches its experts. `capacity`: in training, each "
        "expert takes at most capacity_factor * top_k * tokens / num_experts tokens of what "
        "capacity_scope names, first choices first, then in capacity_order; the rest are dropped.",
    )
    capacity_factor: float | None = Field(
        default=None,
        gt=0,
        description="Required with dispatch `capacity`, and only then allowed.",
    )
    capacity_order: Literal["first_come", "batch_prioritized", "random"] = Field(
        default="first_come",
        description="Who gets the places of a full expert: `first_come`: the earlier position. "
        "`batch_prioritized`: the token whose first choice has the higher probability (arXiv "
        "2106.05974). `random`: drawn. Only with dispatch `capacity`.",
    )
    capacity_scope: Literal["global", "rank"] = Field(
        default="global",
        description="Whose tokens share an expert's places. `global`: those of the micro-batches "
        "of all ranks together, so that the number of ranks changes nothing. `rank`: each rank's "
        "own, as in GShard, without an exchange of choices. Only with dispatch `capacity`.",
    )
    eval_capacity_fraction: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Outside training each expert takes at most this share of the tokens of a "
        "forward pass, as in TorchScale 0.3.0 (0.25 there). null: nothing is dropped.",
    )
    route_padding: bool = Field(
        default=False,
        description="true: padding is routed, takes capacity and counts in the balance loss, as "
        "in TorchScale 0.3.0.",
    )
    time_major: bool = Field(
        default=False,
        description="Where capacity is filled in order of position, an encoder counts positions "
        "across the batch before the next position, as in TorchScale 0.3.0.",
    )
    aux_loss_weight: float = Field(
        default=0.01, ge=0, description="Weight of the balance loss, averaged over MoE layers."
    )
    balance_scope: Literal["micro_step", "batch"] = Field(
        default="micro_step",
        description="Whose tokens the balance loss is about: those of each accumulation step by "
        "itself, over all ranks, or those of the whole `batch`. That makes the loss independent "
        "of gradient_accumulation_steps, and costs a third more compute where there are several: "
        "a pass without gradients counts before the training pass. Not with dispatch `capacity`.",
    )
    router_z_loss_weight: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the mean of log^2 sum exp(router logits) (ST-MoE, arXiv "
        "2202.08906: 1e-3), averaged over MoE layers.",
    )

    @model_validator(mode="after")
    def _no_contradictions(self) -> "MoEConfig":
        wrong = []
        if not self.expert_counts:
            raise ValueError("num_experts=[] has no layer: give one number for each MoE layer")
        uneven = [count for count in self.expert_counts if count % self.ep_size]
        if uneven:
            near = -(-uneven[0] // self.ep_size) * self.ep_size
            which = "" if self.num_experts == uneven[0] else f" ({uneven[0]} is not)"
            wrong.append(
                f"num_experts={self.num_experts} must be a multiple of ep_size={self.ep_size}"
                f"{which}: use {near} experts, or one of the ep_size {self.possible_ep_sizes}"
            )
        fewest = min(self.expert_counts)
        if self.top_k > fewest:
            wrong.append(
                f"top_k={self.top_k} must not exceed num_experts={self.num_experts}: "
                f"use top_k {fewest}, or more experts"
            )
        if (self.dispatch == "capacity") != (self.capacity_factor is not None):
            wrong.append(
                f"capacity_factor={self.capacity_factor or 'null'} does not fit "
                f"dispatch={self.dispatch!r}: set capacity_factor (1.0, say) with dispatch "
                "'capacity', and leave it out with 'dropless'"
            )
        if self.dispatch == "dropless" and self.capacity_order != "first_come":
            wrong.append(
                f"capacity_order={self.capacity_order!r} belongs to dispatch 'capacity': leave it "
                "out, or use dispatch 'capacity' with a capacity_factor"
            )
        if self.dispatch == "dropless" and self.capacity_scope != "global":
            wrong.append(
                f"capacity_scope={self.capacity_scope!r} belongs to dispatch 'capacity': leave it "
                "out, or use dispatch 'capacity' with a capacity_factor"
            )
        if self.dispatch == "capacity" and self.balance_scope == "batch":
            wrong.append(
                "balance_scope='batch' does not go with dispatch 'capacity', where each "
                "accumulation step drops its own tokens: use balance_scope 'micro_step', or "
                "dispatch 'dropless'"
            )
        if self.router == "linear":
            if self.d_router is not None:
                wrong.append(
                    f"d_router={self.d_router} belongs to router 'xmoe': leave it out, or use "
                    "router 'xmoe'"
                )
            wrong += [
                f"{name}=false belongs to router 'xmoe': leave it out, or use router 'xmoe'"
                for name in ("normalize_tokens", "learned_temperature")
                if not getattr(self, name)
            ]
        if fewest == 1 and self.gate == "sigmoid":
            wrong.append(
                "gate='sigmoid' would weigh a single expert by its score, and there is nothing to "
                "choose: use gate 'softmax', which makes it the dense network, or more experts"
            )
        if self.second_expert != "all" and self.top_k != 2:
            wrong.append(
                f"second_expert={self.second_expert!r} needs top_k 2, not {self.top_k}: use "
                "second_expert 'all', or top_k 2"
            )
        if self.second_expert == "random" and self.gate == "sigmoid":
            wrong.append(
                "second_expert='random' needs gate 'softmax', whose weights are probabilities: "
                "use second_expert 'all', or gate 'softmax'"
            )
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @property
    def expert_counts(self) -> list[int]:
        """The numbers of experts that layers have: one for all of them, or one for each."""
        return self.num_experts if isinstance(self.num_experts, list) else [self.num_experts]

    @property
    def possible_ep_sizes(self) -> list[int]:
        """Every ep_size that divides the experts of every layer."""
        common = math.gcd(*self.expert_counts)
        return [size for size in range(1, common + 1) if common % size == 0]

    def of_layer(self, number: int) -> "MoELayerConfig":
        """The keys of one MoE layer, counted from 0 through the encoder and then the decoder."""
        counts = self.expert_counts
        count = counts[number] if isinstance(self.num_experts, list) else counts[0]
        return MoELayerConfig.model_construct(**{**dict(self), "num_experts": count})


class MoELayerConfig(MoEConfig):
    """The keys of one MoE layer."""

    num_experts: int = Field(ge=1, description="Experts of the layer, over the whole job.")

    @property
    def router_width(self) -> int:
        """Width d_e of the X-MoE projection (the paper: num_experts / 2)."""
        return self.d_router or max(8, self.num_experts // 2)


class ModelConfig(StrictModel):
    """The Transformer: its shape, its norms, its positions, its regularisation."""

    architecture: Literal["decoder", "encoder", "encoder_decoder"] = Field(
        default="decoder",
        description="`decoder`: a causal language model. `encoder`: bidirectional, a masked "
        "language model. `encoder_decoder`: both, joined by cross-attention.",
    )
    vocab_size: int | None = Field(
        default=None,
        ge=2,
        le=1 << 24,  # no vocabulary is larger, and a slip must not ask for terabytes
        description="null: the size of the data's vocabulary (and a mask token, where masking "
        "asks for one). A larger number pads the embedding (a multiple of 64 is faster on a GPU).",
    )
    num_layers: int = Field(
        ge=1, description="Transformer layers; those of the encoder in an `encoder_decoder`."
    )
    num_decoder_layers: int | None = Field(
        default=None,
        ge=1,
        description="Layers of the decoder of an `encoder_decoder`. null: num_layers.",
    )
    d_model: int = Field(ge=2, description="Width of the residual stream.")
    d_ff: int = Field(ge=1, description="Width of a feed-forward network, and of each expert.")
    num_heads: int = Field(ge=1, description="Attention heads; must divide d_model.")
    max_seq_len: int = Field(
        ge=1, description="Positions, in tokens; those of the encoder in an `encoder_decoder`."
    )
    max_target_len: int | None = Field(
        default=None,
        ge=1,
        description="Positions of the decoder of an `encoder_decoder`. null: max_seq_len.",
    )
    norm: Literal["pre", "post", "subln", "deepnorm", "normformer", "admin"] = Field(
        default="subln",
        description="Where the LayerNorms stand, how residuals are scaled and how weights start: "
        "`subln` (Magneto, arXiv 2210.06423), `deepnorm` (arXiv 2203.00555), `normformer` (arXiv "
        "2110.09456), `admin` (arXiv 2004.08249; profile first, with launchers.profile_admin, and "
        "give it embedding_norm or stable_embedding), "
        "`pre` (Pre-LN) or `post` (Post-LN).",
    )
    norm_eps: float = Field(default=1e-5, gt=0, description="Epsilon of the LayerNorms.")
    cross_attention_inner_norm: bool = Field(
        default=True,
        description="Sub-LN's inner LayerNorm in cross-attention too, as in its paper. false: not "
        "there, as in TorchScale 0.3.0. Only with norm `subln` in an `encoder_decoder`.",
    )
    activation: Literal["gelu", "relu", "swish", "swiglu"] = Field(
        default="gelu",
        description="Activation of the feed-forward networks. `swiglu`: swish(w1 x) * (w3 x), a "
        "third matrix (arXiv 2002.05202).",
    )
    positions: Literal["learned", "sinusoidal", "sinusoidal_fairseq", "none"] | None = Field(
        default=None,
        description="Positions added to the embedding. null: `learned`, or `none` where "
        "attention_positions are given. `sinusoidal`: the Transformer paper's. "
        "`sinusoidal_fairseq`: fairseq's, for imported weights.",
    )
    attention_positions: Literal["none", "relative", "rotary", "xpos", "xpos_relative"] = Field(
        default="none",
        description="Positions inside attention. `relative`: a learned bias by bucket of distance, "
        "one table for all layers (T5). `rotary` (arXiv 2104.09864). `xpos`: rotary with decay "
        "(arXiv 2212.10554). `xpos_relative`: both.",
    )
    relative_buckets: int = Field(default=32, ge=4, description="Buckets of `relative` positions.")
    relative_max_distance: int = Field(
        default=128,
        ge=2,
        description="Distance, in tokens, from which `relative` positions share the last bucket.",
    )
    relative_bidirectional: bool = Field(
        default=False,
        description="Give half the buckets of a causal decoder to the future, which it never sees, "
        "as in TorchScale 0.3.0. Encoders and cross-attention always do.",
    )
    xpos_scale_base: float = Field(
        default=512.0, gt=0, description="Distance, in tokens, over which `xpos` decays."
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout of embeddings and sublayer outputs."
    )
    attention_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout of attention probabilities."
    )
    activation_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout after the feed-forward activation."
    )
    drop_path: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Probability that a sample skips a sublayer (stochastic depth): 0 in the first "
        "layer, rising linearly to this in the last.",
    )
    qk_norm: bool = Field(
        default=False,
        description="A LayerNorm on each head's queries and keys (arXiv 2309.14322).",
    )
    scale_embedding: bool = Field(
        default=False, description="Multiply token embeddings by sqrt(d_model)."
    )
    embedding_norm: bool = Field(
        default=False, description="A LayerNorm after token and position embeddings are added."
    )
    stable_embedding: bool = Field(
        default=False,
        description="Xavier-uniform token embeddings with a LayerNorm after the lookup, before "
        "positions are added (arXiv 2110.02861).",
    )
    tie_embeddings: bool = Field(
        default=True, description="The output projection is the (decoder's) embedding matrix."
    )
    share_embeddings: bool = Field(
        default=False,
        description="Encoder and decoder of an `encoder_decoder` have one embedding matrix.",
    )
    output_projection: bool = Field(
        default=True,
        description="false: the model returns the last LayerNorm's output in place of logits; for "
        "imported feature extractors.",
    )
    multiway: bool = Field(
        default=False,
        description="Two pools of parameters, one a modality, in norms, attention and dense "
        "feed-forward networks of an `encoder` (BEiT-3, arXiv 2208.10442): positions before the "
        "split use the first, the others the second.",
    )
    moe: MoEConfig | None = Field(default=None, description="null: a dense model.")

    @model_validator(mode="after")
    def _shapes_fit(self) -> "ModelConfig":
        wrong = []
        if self.d_model % self.num_heads:
            heads = [n for n in range(1, self.d_model + 1) if self.d_model % n == 0]
            nearest = min(heads, key=lambda n: abs(n - self.num_heads))
            wrong.append(
                f"d_model={self.d_model} must be a multiple of num_heads={self.num_heads}: "
                f"use {nearest} heads, or d_model "
                f"{-(-self.d_model // self.num_heads) * self.num_heads}"
            )
        deepest = max(self.num_layers, self.decoder_depth)
        if self.moe is not None and self.moe.every > deepest:
            key = "num_layers" if deepest == self.num_layers else "num_decoder_layers"
            wrong.append(
                f"moe.every={self.moe.every} exceeds {key}={deepest}, so no layer "
                f"would be a MoE layer: use at most {deepest}, or moe null"
            )
        wrong += self._contradictions()
        if self.moe is not None and isinstance(self.moe.num_experts, list) and not wrong:
            given, needed = len(self.moe.num_experts), self.num_moe_layers
            if given != needed:
                wrong.append(
                    f"moe.num_experts={self.moe.num_experts} must have one number for each MoE "
                    f"layer, of which moe.every={self.moe.every} makes {needed}, not {given}: "
                    "give as many, or one number for all"
                )
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    def _contradictions(self) -> list[str]:
        """What only makes sense together with something else that is not there."""
        wrong = []
        two_stacks = self.architecture == "encoder_decoder"
        for name in ("num_decoder_layers", "max_target_len", "share_embeddings"):
            if getattr(self, name) and not two_stacks:
                wrong.append(
                    f"{name}={str(getattr(self, name)).lower()} belongs to architecture "
                    f"'encoder_decoder', but architecture is {self.architecture!r}: leave it out"
                )
        if not self.cross_attention_inner_norm and not (two_stacks and self.norm == "subln"):
            wrong.append(
                "cross_attention_inner_norm=false belongs to norm 'subln' in architecture "
                f"'encoder_decoder', not to norm {self.norm!r} in {self.architecture!r}: leave it "
                "out"
            )
        if self.multiway and self.architecture != "encoder":
            wrong.append(
                f"multiway=true belongs to architecture 'encoder', but architecture is "
                f"{self.architecture!r}: leave it out"
            )
        if self.multiway and self.moe is not None:
            wrong.append(
                "multiway=true and moe contradict each other, both replace the feed-forward "
                "network: keep one of them"
            )
        if not self.output_projection and self.tie_embeddings:
            wrong.append(
                "output_projection=false leaves nothing to tie, and launchers.train nothing to "
                "learn: set tie_embeddings false as well for a model that is not trained"
            )
        wrong += self._position_problems()
        is_xpos = self.is_rotary and self.attention_positions != "rotary"
        for name, fits, place in (
            ("relative_buckets", self.is_relative, "attention_positions 'relative'"),
            ("relative_max_distance", self.is_relative, "attention_positions 'relative'"),
            ("relative_bidirectional", self.is_relative, "attention_positions 'relative'"),
            ("xpos_scale_base", is_xpos, "attention_positions 'xpos'"),
        ):
            value = getattr(self, name)
            if not fits and value != type(self).model_fields[name].default:
                wrong.append(
                    f"{name}={str(value).lower()} belongs to {place}, but attention_positions is "
                    f"{self.attention_positions!r}: leave it out"
                )
        return wrong

    def _position_problems(self) -> list[str]:
        wrong = []
        if self.is_rotary and (self.d_model // self.num_heads) % 2:
            fitting = [str(n) for n in range(1, self.d_model) if self.d_model % (2 * n) == 0]
            way_out = f"a num_heads among {', '.join(fitting)}" if fitting else "an even d_model"
            wrong.append(
                f"attention_positions={self.attention_positions!r} turns pairs of numbers, but a "
                f"head has d_model / num_heads = {self.d_model // self.num_heads}: use {way_out}"
            )
        positions = max(self.max_seq_len, self.max_target_len or 0)
        if self.is_rotary and self.attention_positions != "rotary":
            # A query times a key reaches 3.5^(positions / base), 3.5 being the inverse of the
            # smallest zeta, and 3.5^64 leaves room for what queries and keys are themselves.
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
    def absolute_positions(self) -> str:
        """The kind of positions that are added to the embedding, null resolved."""
        return self.positions or ("learned" if self.attention_positions == "none" else "none")

    @property
    def is_relative(self) -> bool:
        """Whether attention has a relative-position bias."""
        return self.attention_positions in ("relative", "xpos_relative")

    @property
    def is_rotary(self) -> bool:
        """Whether queries and keys are turned by their positions."""
        return self.attention_positions in ("rotary", "xpos", "xpos_relative")

    def is_moe_layer(self, index: int) -> bool:
        """Whether the layer of this index (from 0) of a stack is a MoE layer."""
        return self.moe is not None and (index + 1) % self.moe.every == 0

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of all stacks."""
        if self.moe is None:
            return 0
        return self.encoder_depth // self.moe.every + self.decoder_depth // self.moe.every
