"""Which experts a token goes to, and with what weight.

Letters: N tokens, D d_model, E experts, K top_k.

Everything here is float32: a softmax over scores divided by a temperature of 0.07 turns bf16's
three digits into different experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.init import RandomSource

# The fixed temperature tau_0 of the balance loss, and where the learnable tau starts
# (arXiv 2204.09179, sec. 4.1).
BALANCE_TEMPERATURE = {"softmax": 0.3, "sigmoid": 0.07}
# The learnable temperature is read as max(tau, this): at zero the gate would divide by nothing.
MIN_TEMPERATURE = 0.01


class Routing(NamedTuple):
    """What a router decides for N tokens.

    Attributes:
        experts: (N, K) int64, chosen experts, best first.
        weights: (N, K) float32, weight of each chosen expert's output.
        balance_probs: (N, E) float32, the distribution that the balance loss sees.
        entropy: () float32, mean entropy of softmax(scores / tau) over the tokens, in nats.
    """

    experts: Tensor
    weights: Tensor
    balance_probs: Tensor
    entropy: Tensor


def route(scores: Tensor, top_k: int, gate: str, balance_probs: Tensor) -> Routing:
    """Choose the top_k experts of every token by score.

    Args:
        scores: (N, E) float32, already divided by the gate's temperature.
        top_k: experts a token.
        gate: "softmax": an expert weighs its softmax probability over all experts.
            "sigmoid": the sigmoid of its own score. With top_k > 1 the weights of a token are
            normalised to sum 1, before any token is dropped (GShard, arXiv 2006.16668).
        balance_probs: (N, E) float32, passed through.
    """
    log_probs = F.log_softmax(scores, dim=-1)
    probs = log_probs.exp()
    top_scores, experts = scores.topk(top_k, dim=-1)  # (N, K)
    weights = top_scores.sigmoid() if gate == "sigmoid" else probs.gather(-1, experts)
    if top_k > 1:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    entropy = -(probs.detach() * log_probs.detach()).sum(-1).mean()
    return Routing(experts, weights, balance_probs, entropy)


class LinearRouter(nn.Module):
    """scores = W h, as in Switch (arXiv 2101.03961) and GShard."""

    def __init__(self, d_model: int, num_experts: int, top_k: int, gate: str) -> None:
        """Build the router; see `route` for top_k and gate."""
        super().__init__()
        self.top_k = top_k
        self.gate = gate
        self.wg = nn.Linear(d_model, num_experts, bias=False)

    def init_weights(self, source: RandomSource) -> None:
        """Xavier-normal, gain 1."""
        source.xavier_normal_(self.wg.weight.data, "wg.weight")

    def forward(self, h: Tensor) -> Routing:
        """(N, D) of any float dtype -> Routing."""
        scores = F.linear(h.float(), self.wg.weight.float())  # (N, E)
        return route(scores, self.top_k, self.gate, scores.softmax(-1))


class XMoERouter(nn.Module):
    """s_i = (W h . e_i) / (||W h|| ||e_i||), gated with a learnable temperature.

    arXiv 2204.09179, eq. 6-9: low-rank projection, L2 normalisation of both sides, softmax or
    sigmoid gate at temperature tau, balance probabilities at the fixed tau_0.

    Parameters: `projection.weight` (d_router, D) is W, `centroids` (E, d_router) are the e_i
    (DeepSpeed would take a name with "expert" in it for an expert's own weight), `temperature`
    (1,) is tau.
    """

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, gate: str, d_router: int
    ) -> None:
        """Build the router; d_router is the paper's d_e, typically num_experts / 2."""
        super().__init__()
        self.top_k = top_k
        self.gate = gate
        self.balance_temperature = BALANCE_TEMPERATURE[gate]
        self.projection = nn.Linear(d_model, d_router, bias=False)
        self.centroids = nn.Parameter(torch.empty(num_experts, d_router))
        # Shape (1,), not (): ZeRO cannot flatten a 0-dimensional bf16 tensor.
        self.temperature = nn.Parameter(torch.empty(1))

    def init_weights(self, source: RandomSource) -> None:
        """Xavier-normal projection, Gaussian directions for the experts, tau = tau_0."""
        source.xavier_normal_(self.projection.weight.data, "projection.weight")
        source.normal_(self.centroids.data, "centroids", 1.0)
        nn.init.constant_(self.temperature, self.balance_temperature)

    def cosine_scores(self, h: Tensor) -> Tensor:
        """(N, D) of any float dtype -> (N, E) float32 in [-1, 1] (eq. 6)."""
        projected = F.linear(h.float(), self.projection.weight.float())  # (N, d_router)
        return F.linear(F.normalize(projected, dim=-1), F.normalize(self.centroids.float(), dim=-1))

    def forward(self, h: Tensor) -> Routing:
        """(N, D) of any float dtype -> Routing."""
        scores = self.cosine_scores(h)
        tau = self.temperature.float()
        # Straight through: below the minimum the loss must still be able to raise tau again.
        temperature = tau + (tau.clamp_min(MIN_TEMPERATURE) - tau).detach()
        balance_probs = (scores / self.balance_temperature).softmax(-1)
        return route(scores / temperature, self.top_k, self.gate, balance_probs)


def balance_loss(balance_probs: Tensor, first_choice_fraction: Tensor) -> Tensor:
    """E * sum_i t_i * mean_tokens(p_i), 1 when the load is even (arXiv 2204.09179, eq. 9).

    Args:
        balance_probs: (N, E) float32, this rank's tokens.
        first_choice_fraction: (E,) float32, t_i: the share of the whole batch's tokens, over all
            ranks, whose first choice is expert i. It carries no gradient, so the mean over the
            ranks of this loss is the loss of the whole batch, gradient included.

    Returns:
        () float32.
    """
    num_experts = balance_probs.size(-1)
    return num_experts * (first_choice_fraction * balance_probs.mean(0)).sum()
