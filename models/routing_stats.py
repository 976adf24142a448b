"""What a MoE layer reports of a forward pass.

Letters: E experts.
"""

from typing import NamedTuple

from torch import Tensor

from models.router import balance_loss


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
