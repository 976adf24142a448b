"""What a model is: the keys under `magnetar.model` of the JSON."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class StrictModel(BaseModel):
    """Base of every section: immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class MoEConfig(StrictModel):
    """The mixture-of-experts layers: which layers, how many experts, how tokens reach them."""

    num_experts: int = Field(ge=1, description="Experts in each MoE layer, over the whole job.")
    every: int = Field(
        default=2,
        ge=1,
        description="Every n-th layer is a MoE layer: layers n, 2n, 3n, ... counted from 1.",
    )
    top_k: Literal[1, 2] = Field(default=2, description="Experts that each token is sent to.")
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
    dispatch: Literal["dropless", "capacity"] = Field(
        default="dropless",
        description="`dropless`: every token reaches its experts. `capacity`: in training, each "
        "expert takes at most capacity_factor * top_k * tokens / num_experts tokens of a rank's "
        "micro-batch, first choices first, then in order of position; the rest are dropped.",
    )
    capacity_factor: float | None = Field(
        default=None,
        gt=0,
        description="Required with dispatch `capacity`, and only then allowed.",
    )
    aux_loss_weight: float = Field(
        default=0.01, ge=0, description="Weight of the balance loss, averaged over MoE layers."
    )

    @model_validator(mode="after")
    def _no_contradictions(self) -> "MoEConfig":
        wrong = []
        if self.num_experts % self.ep_size:
            sizes = [n for n in range(1, self.num_experts + 1) if self.num_experts % n == 0]
            near = -(-self.num_experts // self.ep_size) * self.ep_size
            wrong.append(
                f"num_experts={self.num_experts} must be a multiple of ep_size={self.ep_size}: "
                f"use {near} experts, or one of the ep_size {sizes}"
            )
        if self.top_k > self.num_experts:
            wrong.append(
                f"top_k={self.top_k} must not exceed num_experts={self.num_experts}: "
                f"use top_k {self.num_experts}, or more experts"
            )
        if (self.dispatch == "capacity") != (self.capacity_factor is not None):
            wrong.append(
                f"capacity_factor={self.capacity_factor or 'null'} does not fit "
                f"dispatch={self.dispatch!r}: set capacity_factor (1.0, say) with dispatch "
                "'capacity', and leave it out with 'dropless'"
            )
        if self.router == "linear" and self.d_router is not None:
            wrong.append(
                f"d_router={self.d_router} belongs to router 'xmoe': leave it out, or use "
                "router 'xmoe'"
            )
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @property
    def router_width(self) -> int:
        """Width d_e of the X-MoE projection (the paper: num_experts / 2)."""
        return self.d_router or max(8, self.num_experts // 2)


class ModelConfig(StrictModel):
    """The Transformer: its shape, its norms, its regularisation."""

    architecture: Literal["decoder"] = Field(
        default="decoder", description="`decoder`: a causal language model."
    )
    vocab_size: int | None = Field(
        default=None,
        ge=2,
        le=1 << 24,  # no vocabulary is larger, and a slip must not ask for terabytes
        description="null: the size of the data's vocabulary. A larger number pads the "
        "embedding (a multiple of 64 is faster on a GPU).",
    )
    num_layers: int = Field(ge=1, description="Transformer layers.")
    d_model: int = Field(ge=2, description="Width of the residual stream.")
    d_ff: int = Field(ge=1, description="Width of a feed-forward network, and of each expert.")
    num_heads: int = Field(ge=1, description="Attention heads; must divide d_model.")
    max_seq_len: int = Field(ge=1, description="Positions, in tokens.")
    norm: Literal["subln", "pre"] = Field(
        default="subln",
        description="Where the LayerNorms stand and how weights start: `subln` "
        "(Magneto, arXiv 2210.06423) or `pre` (Pre-LN).",
    )
    activation: Literal["gelu", "relu"] = Field(
        default="gelu", description="Activation of the feed-forward networks."
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout of embeddings and sublayer outputs."
    )
    attention_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout of attention probabilities."
    )
    tie_embeddings: bool = Field(
        default=True, description="The output projection is the embedding matrix."
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
        if self.moe is not None and self.moe.every > self.num_layers:
            wrong.append(
                f"moe.every={self.moe.every} exceeds num_layers={self.num_layers}, so no layer "
                f"would be a MoE layer: use at most {self.num_layers}, or moe null"
            )
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    def is_moe_layer(self, index: int) -> bool:
        """Whether the layer of this index (from 0) is a MoE layer."""
        return self.moe is not None and (index + 1) % self.moe.every == 0
