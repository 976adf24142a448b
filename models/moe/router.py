"""The routers: which experts a token is sent to, and with what weight.

Letters: N tokens, D d_model, E experts, K top_k.

    h (N, D) -> scores (N, E) -> / temperature -> top_k -> experts (N, K), weights (N, K)

Everything here is float32. A score is divided by a temperature of 0.07, so bf16's three digits
would choose other experts.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnetar.models.layers.feed_forward import WideLinear
from magnetar.models.layers.init import RandomSource
from magnetar.models.moe.config import MoELayerConfig
from magnetar.models.moe.dispatch import expert_counts
from magnetar.models.moe.noise import SECOND_EXPERT, uniform


class RoutingStats(NamedTuple):
    """The statistics of one MoE layer in one forward pass: sums over this rank's routed tokens.

    Sums add up over ranks and micro-batches. The temperature is no sum; every rank has the same.

    Attributes:
        probs: (E,) float32 with gradient, sum of the distributions in the balance loss.
        first_choices: (E,) int64, tokens whose first choice is this expert; they sum to N.
        entropy: () float32, summed entropy of the gate, in nats.
        log_z_squared: () float32 with gradient, sum of log^2 sum exp(router logits) (ST-MoE,
            arXiv 2202.08906, eq. 5).
        load: (E,) float32, assignments to each expert before any is dropped.
        dropped: () float32, dropped assignments.
        temperature: () float32, tau of the router; 1 for a router without one.
    """

    probs: Tensor
    first_choices: Tensor
    entropy: Tensor
    log_z_squared: Tensor
    load: Tensor
    dropped: Tensor
    temperature: Tensor

    @property
    def num_tokens(self) -> Tensor:
        """() int64, at least 1: a batch may be all padding."""
        return self.first_choices.sum().clamp(min=1)

    @property
    def aux_loss(self) -> Tensor:
        """() float32, the balance loss of these tokens alone."""
        return balance_loss(self.probs, self.first_choices)

    @property
    def z_loss(self) -> Tensor:
        """() float32, the router z-loss of these tokens alone."""
        return self.log_z_squared / self.num_tokens

    @property
    def mean_entropy(self) -> Tensor:
        """() float32, nats per token: 0 for one certain expert, ln E for a uniform choice."""
        return self.entropy / self.num_tokens


# The fixed temperature tau_0 of the balance loss, and the initial value of the learnable tau
# (arXiv 2204.09179, sec. 4.1).
BALANCE_TEMPERATURE = {"softmax": 0.3, "sigmoid": 0.07}
# The learnable temperature is read as max(tau, MIN_TEMPERATURE), so the gate never divides by 0.
MIN_TEMPERATURE = 0.01
TINY = torch.finfo(torch.float32).tiny


class Routing(NamedTuple):
    """A router's decision for N tokens, and its statistics.

    Attributes:
        experts: (N, K) int64, chosen experts, best first; int32 from the kernel.
        weights: (N, K) float32, weight of each chosen expert's output.
        used: (N, K) bool, False for a second expert that the draw left out; None if all are used.
        first_probs: (N,) float32 without gradient, softmax probability of the first choice.
        load: (E,) int64, assignments to each expert.
        stats: sums over the tokens; nothing is dropped yet.
        block_counts: (E, blocks) int32, assignments to each expert by each block of tokens, for
            models.moe.kernels.counting_sort; None from the plain path.
    """

    experts: Tensor
    weights: Tensor
    used: Tensor | None
    first_probs: Tensor
    load: Tensor
    stats: RoutingStats
    block_counts: Tensor | None = None


def route(
    scores: Tensor,
    top_k: int,
    gate: str,
    balance_probs: Tensor,
    second_expert: str = "all",
    normalize: bool = True,
    keys: Tensor | None = None,
) -> Routing:
    """Choose the top_k experts of every token by score.

    Args:
        scores: (N, E) float32, already divided by the gate's temperature.
        top_k: K, experts per token.
        gate: weight of an expert. "softmax": its softmax probability over all experts. "sigmoid":
            the sigmoid of its own score.
        balance_probs: (N, E) float32, distribution in the balance loss.
        second_expert: GShard's policy for the second of two (arXiv 2006.16668, sec. 3.1). "all":
            the second best. "sampled": one drawn from the softmax over the others. "random": the
            second best, used with probability min(1, 2 * its weight).
        normalize: whether the weights of a token sum to 1 (GShard), if top_k > 1.
        keys: (N,) int64, keys of the draws; None if second_expert draws nothing.
    """
    log_probs = F.log_softmax(scores, dim=-1)  # (N, E)
    probs = log_probs.exp()  # (N, E)
    top_scores, experts = scores.topk(top_k, dim=-1)  # (N, K)
    if second_expert == "sampled":
        first = experts[:, :1]  # (N, 1)
        assert keys is not None
        draws = uniform(keys, scores.size(-1), SECOND_EXPERT)  # (N, E)
        experts = torch.cat([first, sample_other(scores.detach(), first, draws)], dim=-1)  # (N, 2)
        top_scores = scores.gather(-1, experts)  # (N, 2)
    weights = top_scores.sigmoid() if gate == "sigmoid" else probs.gather(-1, experts)  # (N, K)
    if normalize:
        weights = normalized(weights)
    used = None
    if second_expert == "random":
        used = torch.ones_like(experts, dtype=torch.bool)  # (N, 2)
        assert keys is not None
        used[:, 1:] = 2 * weights.detach()[:, 1:] > uniform(keys, 1, SECOND_EXPERT)
        weights = weights * used
    with torch.no_grad():
        first_probs = probs.gather(-1, experts[:, :1]).squeeze(-1)  # (N,)
        entropy = -(probs * log_probs).sum(-1)  # (N,)
    num_experts = scores.size(-1)
    load = expert_counts(experts, num_experts, used)  # (E,)
    stats = RoutingStats(
        probs=balance_probs.sum(0),
        first_choices=expert_counts(experts[:, 0], num_experts),
        entropy=entropy.sum(),
        log_z_squared=scores.logsumexp(-1).square().sum(),
        load=load.float(),
        dropped=entropy.new_zeros(()),
        temperature=scores.new_ones(()),
    )
    return Routing(experts, weights, used, first_probs, load, stats)


def sample_other(scores: Tensor, first: Tensor, draws: Tensor) -> Tensor:
    """(N, 1) int64, an expert drawn from the softmax over all but the first, by Gumbel-max.

    Scores and draws, which are uniform in (0, 1), are (N, E) float32, first choices (N, 1) int64.
    """
    gumbel = -draws.log().neg().log()
    return (scores + gumbel).scatter(-1, first, -torch.inf).argmax(-1, keepdim=True)


def normalized(weights: Tensor) -> Tensor:
    """(N, K) float32 -> (N, K), rows that sum to 1; a single weight and a row of 0 are kept."""
    if weights.size(-1) == 1:
        return weights
    return weights / weights.sum(-1, keepdim=True).clamp_min(TINY)


class Router(nn.Module, ABC):
    """From tokens to a decision; a subclass has the scores.

    Attributes:
        balance_temperature: tau_0, which divides the scores in the balance loss.
        temperature: (1,) parameter tau, which divides the scores in the gate; None: 1.
    """

    temperature: nn.Parameter | None

    def __init__(self, moe: MoELayerConfig) -> None:
        """Keep the keys of `route`; outside training second_expert is "all"."""
        super().__init__()
        self.top_k, self.gate = moe.top_k, moe.gate
        self.second_expert = moe.second_expert
        self.normalize = moe.normalize_weights == "before_dropping"
        self.balance_temperature = 1.0
        self.temperature = None

    @abstractmethod
    def scores(self, h: Tensor) -> Tensor:
        """(N, D) of any float dtype -> (N, E) float32, not yet divided by a temperature."""

    def fused_scores(self, h: Tensor) -> Tensor:
        """`scores` by a kernel, if there is one for these tokens."""
        return self.scores(h)

    def forward(self, h: Tensor, keys: Tensor | None = None, by_kernel: bool = False) -> Routing:
        """(N, D) of any float dtype, and (N,) int64 keys of the draws -> Routing.

        by_kernel runs the kernels of moe/kernels/, which draw nothing.
        """
        tau = None if self.temperature is None else self.temperature.float()  # (1,)
        if by_kernel:
            # Imported here, since Triton is not installed everywhere.
            from magnetar.models.moe.kernels.fused_router import fused_route

            return fused_route(
                self.fused_scores(h),
                self.top_k,
                self.gate,
                tau=tau,
                balance_temperature=self.balance_temperature,
                normalize=self.normalize,
                lowest_temperature=MIN_TEMPERATURE,
            )
        scores = self.scores(h)  # (N, E)
        balance_probs = (scores / self.balance_temperature).softmax(-1)  # (N, E)
        if tau is not None:
            # Straight through: below the minimum the loss must still be able to raise tau again.
            scores = scores / (tau + (tau.clamp_min(MIN_TEMPERATURE) - tau).detach())
        second_expert = self.second_expert if self.training else "all"
        routing = route(
            scores, self.top_k, self.gate, balance_probs, second_expert, self.normalize, keys
        )
        if tau is None:
            return routing
        temperature = tau.detach().squeeze().clone()
        return routing._replace(stats=routing.stats._replace(temperature=temperature))


class LinearRouter(Router):
    """scores = W h, as in Switch (arXiv 2101.03961) and GShard."""

    def __init__(self, d_model: int, moe: MoELayerConfig) -> None:
        """Build the router of a layer."""
        super().__init__(moe)
        self.wg = WideLinear(d_model, moe.num_experts, bias=False)

    def init_weights(self, source: RandomSource) -> None:
        """Xavier-normal, gain 1."""
        source.xavier_normal_(self.wg.weight.data, "wg.weight")

    def scores(self, h: Tensor) -> Tensor:
        """(N, D) of any float dtype -> (N, E) float32."""
        out: Tensor = self.wg(h)
        return out


class XMoERouter(Router):
    """s_i = (W h . e_i) / (||W h|| ||e_i||), gated with a learnable temperature.

    arXiv 2204.09179, eq. 6-9: low-rank projection, L2 normalisation of both sides, softmax or
    sigmoid gate at temperature tau, balance probabilities at the fixed tau_0. TorchScale 0.3.0
    has neither the tokens' normalisation nor a temperature.

    Parameters: `projection.weight` (d_router, D) is W, `centroids` (E, d_router) are the e_i
    (DeepSpeed would take a name with "expert" in it for an expert's own weight), `temperature`
    (1,) is tau, None if it is not learned.
    """

    def __init__(self, d_model: int, moe: MoELayerConfig) -> None:
        """Build the router of a layer; the paper's d_e is moe.router_width."""
        super().__init__(moe)
        self.normalize_tokens = moe.normalize_tokens
        self.projection = WideLinear(d_model, moe.router_width, bias=False)
        self.centroids = nn.Parameter(torch.empty(moe.num_experts, moe.router_width))
        if moe.learned_temperature:
            self.balance_temperature = BALANCE_TEMPERATURE[moe.gate]
            # Shape (1,), not (): ZeRO cannot flatten a 0-dimensional bf16 tensor.
            self.temperature = nn.Parameter(torch.empty(1))

    def init_weights(self, source: RandomSource) -> None:
        """Xavier-normal projection, Gaussian directions for the experts, tau = tau_0."""
        source.xavier_normal_(self.projection.weight.data, "projection.weight")
        source.normal_(self.centroids.data, "centroids", 1.0)
        if self.temperature is not None:
            nn.init.constant_(self.temperature, self.balance_temperature)

    def scores(self, h: Tensor) -> Tensor:
        """(N, D) of any float dtype -> (N, E) float32, cosines (eq. 6) with normalize_tokens."""
        projected = self.projection(h)  # (N, d_router)
        if self.normalize_tokens:
            projected = F.normalize(projected, dim=-1)
        return F.linear(projected, F.normalize(self.centroids.float(), dim=-1))  # (N, E)

    def fused_scores(self, h: Tensor) -> Tensor:
        """`scores` by a kernel, if there is one for these tokens."""
        # Imported here, since Triton is not installed everywhere.
        from magnetar.models.moe.kernels.fused_cosines import MAX_D_ROUTER, fused_cosines

        weight, d_router = self.projection.weight, self.projection.out_features
        # A sharded weight is whole only while the module that owns it, the projection, runs.
        is_whole = weight.numel() == d_router * self.projection.in_features
        if h.dtype != torch.bfloat16 or not is_whole or d_router > MAX_D_ROUTER:
            return self.scores(h)
        return fused_cosines(h, weight, self.centroids, normalize_tokens=self.normalize_tokens)


def build_router(d_model: int, moe: MoELayerConfig) -> LinearRouter | XMoERouter:
    """The router of a MoE layer, before its weights are drawn."""
    return (LinearRouter if moe.router == "linear" else XMoERouter)(d_model, moe)


def balance_loss(probs: Tensor, first_choices: Tensor) -> Tensor:
    """E * sum_i t_i * mean_tokens(p_i), 1 when the load is even (arXiv 2204.09179, eq. 9).

    t_i is the share of the whole batch's tokens whose first choice is expert i; it carries no
    gradient. The loss is linear in p, so the losses of the parts of a batch sum to the batch's.

    Probs (E,) float32 is p summed over the tokens of a part of the batch, first_choices (E,) int64
    counts those of the whole batch. The result () float32 is the share of this part in the batch's
    loss, 0 without tokens.
    """
    num_tokens = first_choices.sum().clamp(min=1)
    return probs.size(-1) * (first_choices / num_tokens * probs).sum() / num_tokens
