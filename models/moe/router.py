"""Which experts a token goes to, and with what weight.

Letters: N tokens, D d_model, E experts, K top_k.

Everything here is float32: a softmax over scores divided by a temperature of 0.07 turns bf16's
three digits into different experts.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnetar.models.layers.feed_forward import WideLinear
from magnetar.models.layers.init import RandomSource
from magnetar.models.moe.config import MoELayerConfig
from magnetar.models.moe.noise import SECOND_EXPERT, uniform


class RoutingStats(NamedTuple):
    """What one MoE layer reports of one forward pass: sums over this rank's routed tokens.

    Being sums, they add up over ranks and micro-batches; only the temperature is the same on every
    rank.

    Attributes:
        probs: (E,) float32 with gradient, the distributions that the balance loss sees.
        first_choices: (E,) int64, tokens whose first choice is an expert; sums to all tokens.
        entropy: () float32, of the gate, in nats.
        log_z_squared: () float32 with gradient, log^2 sum exp(router logits) (ST-MoE, arXiv
            2202.08906, eq. 5).
        load: (E,) float32, assignments to each expert before any is dropped.
        dropped: () float32, assignments dropped.
        temperature: () float32, the router's tau; 1 for a router without one.
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
        """() float32, nats a token; ln E is indifferent, 0 decided."""
        return self.entropy / self.num_tokens


if TYPE_CHECKING:
    from magnetar.models.moe.kernels.fused_router import FusedRouting

# The fixed temperature tau_0 of the balance loss, and where the learnable tau starts
# (arXiv 2204.09179, sec. 4.1).
BALANCE_TEMPERATURE = {"softmax": 0.3, "sigmoid": 0.07}
# The learnable temperature is read as max(tau, this): at zero the gate would divide by nothing.
MIN_TEMPERATURE = 0.01
TINY = torch.finfo(torch.float32).tiny


class Routing(NamedTuple):
    """What a router decides for N tokens.

    Attributes:
        experts: (N, K) int64, chosen experts, best first.
        weights: (N, K) float32, weight of each chosen expert's output.
        used: (N, K) bool, False where a second expert was drawn not to be used; None: all are.
        first_probs: (N,) float32 without gradient, softmax probability of the first choice.
        balance_probs: (N, E) float32, the distribution that the balance loss sees.
        entropy: (N,) float32 without gradient, entropy of softmax(scores), in nats.
        log_z: (N,) float32, log sum exp(scores).
        temperature: () float32 without gradient, the router's tau; 1 for a router without one.
    """

    experts: Tensor
    weights: Tensor
    used: Tensor | None
    first_probs: Tensor
    balance_probs: Tensor
    entropy: Tensor
    log_z: Tensor
    temperature: Tensor


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
        top_k: experts a token.
        gate: "softmax": an expert weighs its softmax probability over all experts.
            "sigmoid": the sigmoid of its own score.
        balance_probs: (N, E) float32, passed through.
        second_expert: GShard's policy for the second of two (arXiv 2006.16668, sec. 3.1). "all":
            the second best. "sampled": drawn from the softmax over the others. "random": the
            second best, used with probability min(1, 2 * its weight).
        normalize: with top_k > 1, the weights of a token are made to sum 1 (GShard).
        keys: (N,) int64, what is drawn is a function of them; needed if second_expert draws.
    """
    log_probs = F.log_softmax(scores, dim=-1)
    probs = log_probs.exp()
    top_scores, experts = scores.topk(top_k, dim=-1)  # (N, K)
    if second_expert == "sampled":
        first = experts[:, :1]
        assert keys is not None
        draws = uniform(keys, scores.size(-1), SECOND_EXPERT)  # (N, E)
        experts = torch.cat([first, sample_other(scores.detach(), first, draws)], dim=-1)
        top_scores = scores.gather(-1, experts)
    weights = top_scores.sigmoid() if gate == "sigmoid" else probs.gather(-1, experts)
    if normalize:
        weights = normalized(weights)
    used = None
    if second_expert == "random":
        used = torch.ones_like(experts, dtype=torch.bool)
        assert keys is not None
        used[:, 1:] = 2 * weights.detach()[:, 1:] > uniform(keys, 1, SECOND_EXPERT)
        weights = weights * used
    with torch.no_grad():
        first_probs = probs.gather(-1, experts[:, :1]).squeeze(-1)
        entropy = -(probs * log_probs).sum(-1)
    log_z = scores.logsumexp(-1)
    one = scores.new_ones(())
    return Routing(experts, weights, used, first_probs, balance_probs, entropy, log_z, one)


def sample_other(scores: Tensor, first: Tensor, draws: Tensor) -> Tensor:
    """Draw an expert other than the first from the softmax over the others, by Gumbel-max.

    Args:
        scores: (N, E) float32.
        first: (N, 1) int64, the experts that are not drawn.
        draws: (N, E) float32, uniform in (0, 1).

    Returns:
        (N, 1) int64.
    """
    gumbel = -draws.log().neg().log()
    return (scores + gumbel).scatter(-1, first, -torch.inf).argmax(-1, keepdim=True)


def normalized(weights: Tensor) -> Tensor:
    """(N, K) float32 -> (N, K), rows that sum 1; a single weight, and a row of 0, as they are."""
    if weights.size(-1) == 1:
        return weights
    return weights / weights.sum(-1, keepdim=True).clamp_min(TINY)


class Router(nn.Module):
    """What the routers have in common: how scores become a decision."""

    def __init__(self, top_k: int, gate: str, second_expert: str, normalize: bool) -> None:
        """See `route`; the second expert's policy is for training, outside it is "all"."""
        super().__init__()
        self.top_k = top_k
        self.gate = gate
        self.second_expert = second_expert
        self.normalize = normalize

    def decide(self, scores: Tensor, balance_probs: Tensor, keys: Tensor | None) -> Routing:
        """Two (N, E) float32 and keys of (N,) int64 -> Routing; see `route`."""
        second_expert = self.second_expert if self.training else "all"
        return route(
            scores, self.top_k, self.gate, balance_probs, second_expert, self.normalize, keys
        )

    def decide_by_kernel(
        self, scores: Tensor, tau: Tensor | None, balance_temperature: float
    ) -> "tuple[FusedRouting, Tensor]":
        """`decide` with second_expert "all", on a GPU.

        Args:
            scores: (N, E) float32, not yet divided by a temperature.
            tau: (1,) of the gate; None: 1.
            balance_temperature: of the balance loss.

        Returns:
            The decision, and () float32 without gradient the temperature.
        """
        from magnetar.models.moe.kernels.fused_router import fused_route  # Triton is not everywhere

        routing = fused_route(
            scores,
            self.top_k,
            self.gate,
            tau=tau,
            balance_temperature=balance_temperature,
            normalize=self.normalize,
            lowest_temperature=MIN_TEMPERATURE,
        )
        temperature = scores.new_ones(()) if tau is None else tau.detach().squeeze().clone()
        return routing, temperature


class LinearRouter(Router):
    """scores = W h, as in Switch (arXiv 2101.03961) and GShard."""

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        gate: str,
        *,
        second_expert: str = "all",
        normalize: bool = True,
    ) -> None:
        """Build the router; see `route` for the other arguments."""
        super().__init__(top_k, gate, second_expert, normalize)
        self.wg = WideLinear(d_model, num_experts, bias=False)

    def init_weights(self, source: RandomSource) -> None:
        """Xavier-normal, gain 1."""
        source.xavier_normal_(self.wg.weight.data, "wg.weight")

    def forward(
        self, h: Tensor, keys: Tensor | None = None, by_kernel: bool = False
    ) -> "Routing | tuple[FusedRouting, Tensor]":
        """(N, D) of any float dtype and (N,) int64, for what is drawn -> Routing."""
        scores = self.wg(h)  # (N, E)
        if by_kernel:
            return self.decide_by_kernel(scores, None, 1.0)
        return self.decide(scores, scores.softmax(-1), keys)


class XMoERouter(Router):
    """s_i = (W h . e_i) / (||W h|| ||e_i||), gated with a learnable temperature.

    arXiv 2204.09179, eq. 6-9: low-rank projection, L2 normalisation of both sides, softmax or
    sigmoid gate at temperature tau, balance probabilities at the fixed tau_0. TorchScale 0.3.0
    has neither the tokens' normalisation nor a temperature.

    Parameters: `projection.weight` (d_router, D) is W, `centroids` (E, d_router) are the e_i
    (DeepSpeed would take a name with "expert" in it for an expert's own weight), `temperature`
    (1,) is tau, None where it is not learned.
    """

    temperature: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        gate: str,
        d_router: int,
        *,
        second_expert: str = "all",
        normalize: bool = True,
        normalize_tokens: bool = True,
        learned_temperature: bool = True,
    ) -> None:
        """Build the router; see `route` for what is not named here.

        Args:
            d_model: width of the tokens.
            num_experts: experts of the layer.
            top_k: experts a token.
            gate: "softmax" or "sigmoid".
            d_router: the paper's d_e, typically num_experts / 2.
            second_expert: policy for the second expert.
            normalize: make a token's weights sum 1.
            normalize_tokens: divide by ||W h||.
            learned_temperature: divide by tau in the gate and tau_0 in the balance loss; else by
                nothing.
        """
        super().__init__(top_k, gate, second_expert, normalize)
        self.normalize_tokens = normalize_tokens
        self.balance_temperature = BALANCE_TEMPERATURE[gate] if learned_temperature else 1.0
        self.projection = WideLinear(d_model, d_router, bias=False)
        self.centroids = nn.Parameter(torch.empty(num_experts, d_router))
        # Shape (1,), not (): ZeRO cannot flatten a 0-dimensional bf16 tensor.
        self.temperature = nn.Parameter(torch.empty(1)) if learned_temperature else None

    def init_weights(self, source: RandomSource) -> None:
        """Xavier-normal projection, Gaussian directions for the experts, tau = tau_0."""
        source.xavier_normal_(self.projection.weight.data, "projection.weight")
        source.normal_(self.centroids.data, "centroids", 1.0)
        if self.temperature is not None:
            nn.init.constant_(self.temperature, self.balance_temperature)

    def cosine_scores(self, h: Tensor) -> Tensor:
        """(N, D) of any float dtype -> (N, E) float32, cosines (eq. 6) with normalize_tokens."""
        projected = self.projection(h)  # (N, d_router)
        if self.normalize_tokens:
            projected = F.normalize(projected, dim=-1)
        return F.linear(projected, F.normalize(self.centroids.float(), dim=-1))

    def _cosines(self, h: Tensor) -> Tensor:
        """`cosine_scores` by a kernel, where there is one for these tokens."""
        from magnetar.models.moe.kernels.fused_cosines import MAX_D_ROUTER, fused_cosines

        weight = self.projection.weight
        # ZeRO 3 brings a parameter back only for the module that owns it.
        is_away = weight.numel() != self.projection.out_features * self.projection.in_features
        if h.dtype != torch.bfloat16 or is_away or len(weight) > MAX_D_ROUTER:
            return self.cosine_scores(h)
        return fused_cosines(h, weight, self.centroids, normalize_tokens=self.normalize_tokens)

    def forward(
        self, h: Tensor, keys: Tensor | None = None, by_kernel: bool = False
    ) -> "Routing | tuple[FusedRouting, Tensor]":
        """(N, D) of any float dtype and (N,) int64, for what is drawn -> Routing."""
        if by_kernel:
            gate_tau = None if self.temperature is None else self.temperature.float()
            return self.decide_by_kernel(self._cosines(h), gate_tau, self.balance_temperature)
        scores = self.cosine_scores(h)
        balance_probs = (scores / self.balance_temperature).softmax(-1)
        if self.temperature is not None:
            tau = self.temperature.float()
            # Straight through: below the minimum the loss must still be able to raise tau again.
            scores = scores / (tau + (tau.clamp_min(MIN_TEMPERATURE) - tau).detach())
        routing = self.decide(scores, balance_probs, keys)
        if self.temperature is not None:
            routing = routing._replace(temperature=tau.detach().squeeze().clone())
        return routing


def build_router(d_model: int, moe: MoELayerConfig) -> Router:
    """The router of a MoE layer, weights not yet drawn."""
    shape = (d_model, moe.num_experts, moe.top_k, moe.gate)
    normalize = moe.normalize_weights == "before_dropping"
    if moe.router == "linear":
        return LinearRouter(*shape, second_expert=moe.second_expert, normalize=normalize)
    return XMoERouter(
        *shape,
        moe.router_width,
        second_expert=moe.second_expert,
        normalize=normalize,
        normalize_tokens=moe.normalize_tokens,
        learned_temperature=moe.learned_temperature,
    )


def balance_loss(probs: Tensor, first_choices: Tensor) -> Tensor:
    """E * sum_i t_i * mean_tokens(p_i), 1 when the load is even (arXiv 2204.09179, eq. 9).

    Being linear in p, it is the sum of what any parts of the batch add to it: t_i, the share of
    tokens whose first choice is expert i, is the whole batch's and carries no gradient.

    Args:
        probs: (E,) float32, p summed over the tokens of a part of the batch, or of all of it.
        first_choices: (E,) int64, the whole batch's first choices; they sum to its tokens.

    Returns:
        () float32, what the part adds; 0 where there are no tokens.
    """
    num_tokens = first_choices.sum().clamp(min=1)
    return probs.size(-1) * (first_choices / num_tokens * probs).sum() / num_tokens
