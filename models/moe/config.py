"""The keys under `magnetar.model.moe` of the JSON."""

import math
from typing import Annotated, Any, Literal

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


def one_problem(value: object, validate: ValidatorFunctionWrapHandler) -> Any:
    """Report one problem of a union, that of the type that the user meant."""
    try:
        return validate(value)
    except ValidationError as error:
        problem = error.errors()[-1 if isinstance(value, list) else 0]
        kind, context = problem["type"], problem.get("ctx")
        raise PydanticKnownError(kind, context) from None  # type: ignore[arg-type]


# Larger than anybody trains, so that a typing error does not ask for terabytes or hours of
# building. Their products still fit 63 bits.
MAX_EXPERTS = 1 << 16
MAX_WIDTH = 1 << 20

Count = Annotated[int, Field(ge=1)]
ExpertCount = Annotated[int, Field(ge=1, le=MAX_EXPERTS)]
ExpertCounts = Annotated[ExpertCount | list[ExpertCount], WrapValidator(one_problem)]


# The keys that say on which ranks the experts are, with their values on a single rank.
ON_ONE_RANK: dict[str, Any] = {"ep_size": 1, "placement": "within_nodes"}

# Keys of earlier versions. Stored configs hold them with one of these values, which describe what
# happens today; any other value is refused.
RETIRED_KEYS: dict[str, tuple[Any, ...]] = {
    "exchange": ("auto", "flat"),
    "exchange_chunks": (None, 1),
}


def without_retired_keys(moe: Any) -> Any:
    """A `moe` section of any version without the retired keys that ask for nothing special."""
    if not isinstance(moe, dict):
        return moe
    return {
        key: value
        for key, value in moe.items()
        if key not in RETIRED_KEYS or value not in RETIRED_KEYS[key] or isinstance(value, bool)
    }


class MoEConfig(StrictModel):
    """The MoE layers: which layers have experts, how many, and how tokens are routed to them."""

    num_experts: ExpertCounts = Field(
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
    placement: Literal["within_nodes", "across_nodes"] = Field(
        default="within_nodes",
        description="Which ranks share a set of experts. `within_nodes`: consecutive ranks, so "
        "with ep_size up to the ranks of a node tokens stay inside it, and experts' gradients "
        "travel between nodes. `across_nodes`: ranks as far apart as possible, so tokens travel "
        "between nodes and the experts' gradients stay inside, which is less traffic if experts "
        "are large and tokens few. It changes no number. Only with ep_size > 1.",
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
        le=MAX_WIDTH,
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
        description="Which tokens a full expert keeps. `first_come`: the earlier position. "
        "`batch_prioritized`: the token whose first choice has the higher probability (arXiv "
        "2106.05974). `random`: drawn. Only with dispatch `capacity`.",
    )
    capacity_scope: Literal["global", "rank"] = Field(
        default="global",
        description="The tokens that compete for an expert's capacity. `global`: those of the "
        "micro-batches of all ranks, so the number of ranks changes nothing. `rank`: each rank's "
        "own, as in GShard, without gathering all choices. Only with dispatch `capacity`.",
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
        description="true: an encoder fills capacity position by position across the batch, as in "
        "TorchScale 0.3.0, not sequence by sequence. It matters if earlier positions go first.",
    )
    aux_loss_weight: float = Field(
        default=0.01, ge=0, description="Weight of the balance loss, averaged over MoE layers."
    )
    balance_scope: Literal["micro_step", "batch"] = Field(
        default="micro_step",
        description="The tokens of one balance loss, over all ranks. `micro_step`: those of each "
        "accumulation step. `batch`: those of the whole batch. With `batch` and dispatch "
        "`dropless` the numbers no longer depend on gradient_accumulation_steps, and several "
        "steps cost a third more compute: a pass without gradients counts before the training "
        "pass. Not with dispatch `capacity`.",
    )
    router_z_loss_weight: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the mean of log^2 sum exp(router logits) (ST-MoE, arXiv "
        "2202.08906: 1e-3), averaged over MoE layers.",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_any_version(cls, section: Any) -> Any:
        return without_retired_keys(section)

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
        if self.dispatch == "dropless":
            wrong += [
                f"{name}={getattr(self, name)!r} belongs to dispatch 'capacity': leave it out, or "
                "use dispatch 'capacity' with a capacity_factor"
                for name in ("capacity_order", "capacity_scope")
                if getattr(self, name) != type(self).model_fields[name].default
            ]
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

    num_experts: int = Field(ge=1, description="Experts of the layer, over the whole job.")

    @property
    def router_width(self) -> int:
        """Width d_e of the X-MoE projection (the paper: num_experts / 2)."""
        return self.d_router or max(8, self.num_experts // 2)
