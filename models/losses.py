"""What the output of a language model costs: sums over the tokens that count.

Letters: B batch, T tokens, V vocab_size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


class TokenLosses(NamedTuple):
    """Sums over the targets that count.

    Attributes:
        cross_entropy: () float32, nats.
        z_loss: () float32, log^2 Z of the output logits (arXiv 2309.14322); 0 if not asked for.
        num_tokens: () int64, targets that are not IGNORE_INDEX.
    """

    cross_entropy: Tensor
    z_loss: Tensor
    num_tokens: Tensor


def token_losses(logits: Tensor, targets: Tensor, with_z_loss: bool = False) -> TokenLosses:
    """The losses of a batch, summed over its tokens.

    Args:
        logits: (B, T, V) of any float dtype; the softmax is float32.
        targets: (B, T) int64; IGNORE_INDEX does not count.
        with_z_loss: whether to compute it.
    """
    flat, flat_targets = logits.flatten(0, 1).float(), targets.flatten()
    total = F.cross_entropy(flat, flat_targets, ignore_index=IGNORE_INDEX, reduction="sum")
    counted = flat_targets != IGNORE_INDEX
    z_loss = torch.zeros_like(total)
    if with_z_loss:
        z_loss = (flat.logsumexp(-1).square() * counted).sum()
    return TokenLosses(total, z_loss, counted.sum())
