"""The keys under `magnetar.model.moe` of the JSON."""

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WrapValidator, model_validator

from magnetar.models.section import (
    Count,
    NonNegative,
    Positive,
    Share,
    StoredModel,
    StrictModel,
    WholeNumber,
    one_problem,
    strays,
)

# Larger than anybody trains, so that a typing error does not ask for terabytes or hours of
# building. Their products still fit 63 bits.
MAX_EXPERTS = 1 << 16
MAX_WIDTH = 1 << 20

ExpertCount = Annotated[int, Field(ge=1, le=MAX_EXPERTS)]
ExpertCounts = Annotated[ExpertCount | list[ExpertCount], WrapValidator(one_problem)]

# The keys that say on which ranks the experts are, with their values on a single rank.
ON_ONE_RANK: dict[str, Any] = {"ep_size": 1, "placement": "within_nodes"}


class MoEKeys(StoredModel):
    """The keys that most MoE models need."""

    retired: ClassVar[dict[str, tuple[Any, ...]]] = {
        "exchange": ("auto", "flat"),
        "exchange_chunks": (None, 1),
    }

    num_experts: ExpertCounts
    """Experts in each MoE layer, over the whole job. A list: one number for each MoE layer in
    order, the encoder's before the decoder's."""
    every: Count = 2
    """Distance n between MoE layers: layers n, 2n, 3n, ... counted from 1, in the encoder and in
    the decoder."""
    first_dense_layers: WholeNumber = 0
    """First layers of the encoder and of the decoder that have no experts, whatever `every` says
    (DeepSeek)."""
    expert_d_ff: int | None = Field(default=None, ge=1, le=4 * MAX_WIDTH)
    """Width of an expert. null: d_ff, which remains that of dense layers."""
    shared_d_ff: int | None = Field(default=None, ge=1, le=4 * MAX_WIDTH)
    """Width of a feed-forward network in each MoE layer that every token passes, beside its experts
    (shared experts, arXiv 2401.06066). null: none."""
    shared_gate: bool = False
    """Whether the output of the shared experts is multiplied by the sigmoid of a learned projection
    of the token (Qwen2-MoE). Only with shared_d_ff."""
    top_k: Count = 2
    """Experts that each token is sent to."""
    ep_size: Count = 1
    """Ranks that share one set of experts (expert parallelism). It must divide both num_experts and
    the number of ranks."""
    placement: Literal["within_nodes", "across_nodes"] = "within_nodes"
    """Ranks of one set of experts on several nodes. `within_nodes`: ep_size ranks one after the
    other. With ep_size up to the ranks of a node, tokens stay inside the node and experts'
    gradients travel between nodes. `across_nodes`: ranks as far apart as possible, so ranks with
    the same experts are neighbours. Tokens travel between nodes and experts' gradients inside them,
    which is less if experts are large and tokens few. It changes no number. Only with ep_size >
    1."""
    router: Literal["xmoe", "linear"] = "xmoe"
    """Kind of router. `xmoe`: low-rank cosine router with a learnable temperature (arXiv
    2204.09179). `linear`: one matrix, as in Switch and GShard."""
    gate: Literal["softmax", "sigmoid"] = "softmax"
    """Function that makes an expert's weight of its score: softmax over all experts, or the sigmoid
    of the chosen expert's own score."""
    weight_scale: Positive = 1.0
    """Factor of the weights of a token's experts (DeepSeek-V3: 2.5)."""
    d_router: int | None = Field(default=None, ge=1, le=MAX_WIDTH)
    """Width d_e of the X-MoE router's projection. null: num_experts / 2, at least 8. Only with
    router `xmoe`."""
    frozen: Literal["none", "router", "router_and_experts"] = "none"
    """Parts that do not train. The X-MoE paper freezes routers and experts in fine-tuning."""
    jitter: Share = 0.0
    """Half-width of the uniform noise in [1 - jitter, 1 + jitter] that multiplies the router's
    input in training (Switch)."""
    dispatch: Literal["dropless", "capacity"] = "dropless"
    """Limit on an expert's tokens. `dropless`: none, every token reaches its experts. `capacity`:
    in training, each expert takes up to capacity_factor * top_k * tokens / num_experts tokens,
    first choices first, then in capacity_order; the rest are dropped."""
    capacity_factor: Positive | None = None
    """Factor of an expert's capacity. Required with dispatch `capacity`, and only then."""
    capacity_order: Literal["first_come", "batch_prioritized", "random"] = "first_come"
    """Order in which tokens get the places of a full expert. `first_come`: by position.
    `batch_prioritized`: by the probability of the first choice (arXiv 2106.05974). `random`: drawn.
    Only with dispatch `capacity`."""
    capacity_scope: Literal["global", "rank"] = "global"
    """Tokens that share an expert's places. `global`: the micro-batches of all ranks together, so
    the number of ranks changes nothing. `rank`: each rank's own, as in GShard, without an exchange
    of choices. Only with dispatch `capacity`."""
    aux_loss_weight: NonNegative = 0.01
    """Weight of the balance loss, averaged over MoE layers."""
    balance_scope: Literal["micro_step", "batch"] = "micro_step"
    """Tokens that one balance loss counts, over all ranks. `micro_step`: one accumulation step.
    `batch`: the whole batch. The loss then does not depend on gradient_accumulation_steps; with
    several of them a pass without gradients counts first, a third more compute. Not with dispatch
    `capacity`."""
    router_z_loss_weight: NonNegative = 0.0
    """Weight of the mean of log^2 sum exp(router logits) (ST-MoE, arXiv 2202.08906: 1e-3), averaged
    over MoE layers."""


class TorchScaleMoEKeys(StrictModel):
    """The keys of imported models, which keep what TorchScale 0.3.0 does."""

    second_expert: Literal["all", "sampled", "random"] = "all"
    """GShard's policy for the second expert in training, with top_k 2. `all`: the second best,
    always. `sampled`: drawn from the softmax over the others. `random`: the second best, kept with
    probability min(1, 2 * its weight). Outside training `all`."""
    normalize_weights: Literal["before_dropping", "after_dropping", "never"] = "before_dropping"
    """Experts whose weights are made to sum 1 for a token, with top_k > 1: its choices, the choices
    that were not dropped, or none, so that the gate's values are the weights (OLMoE)."""
    normalize_tokens: bool = True
    """Whether scores are cosines. false: only the experts' side is normalised, as in TorchScale
    0.3.0. Only with router `xmoe`."""
    learned_temperature: bool = True
    """Whether scores are divided by a learned temperature, in the balance loss by the paper's fixed
    one. false: by nothing, as in TorchScale 0.3.0. Only with router `xmoe`."""
    eval_capacity_fraction: float | None = Field(default=None, gt=0, le=1)
    """Largest share of a forward pass's tokens that an expert takes outside training. TorchScale
    0.3.0: 0.25. null: nothing is dropped."""
    route_padding: bool = False
    """Whether padding is routed, takes capacity and counts in the balance loss. TorchScale 0.3.0:
    true."""
    time_major: bool = False
    """Whether an encoder that fills capacity in order of position counts a position across the
    batch before the next position. TorchScale 0.3.0: true."""


class MoEConfig(TorchScaleMoEKeys, MoEKeys):  # MoEKeys come first in the JSON
    """The MoE layers: which layers have experts, how many, and how tokens are routed to them."""

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
        elif self.ep_size == 1:
            wrong += [
                f"{name}={value} belongs to ep_size > 1, where tokens travel: leave it out, or "
                "use a larger ep_size"
                for name, usual in ON_ONE_RANK.items()
                if (value := getattr(self, name)) != usual
            ]
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
        of_capacity = strays(self, "dispatch", "capacity", ("capacity_order", "capacity_scope"))
        wrong += [f"{line} with a capacity_factor" for line in of_capacity]
        if self.dispatch == "capacity" and self.balance_scope == "batch":
            wrong.append(
                "balance_scope='batch' does not go with dispatch 'capacity', where each "
                "accumulation step drops its own tokens: use balance_scope 'micro_step', or "
                "dispatch 'dropless'"
            )
        of_xmoe = ("d_router", "normalize_tokens", "learned_temperature")
        wrong += strays(self, "router", "xmoe", of_xmoe)
        if self.shared_gate and self.shared_d_ff is None:
            wrong.append(
                "shared_gate=true belongs to shared experts, and shared_d_ff is null: leave it "
                "out, or give shared_d_ff"
            )
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
        """Numbers of experts: one for all layers, or one for each layer."""
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

    num_experts: Count
    """Experts of the layer, over the whole job."""

    @property
    def router_width(self) -> int:
        """Width d_e of the X-MoE projection (the paper: num_experts / 2)."""
        return self.d_router or max(8, self.num_experts // 2)
