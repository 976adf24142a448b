"""An exponential moving average (EMA) of the weights, beside each tensor that an optimizer updates.

With d = `training.ema_decay`, w_t the weights after update t and w_0 the first ones:

    ema_0 = w_0,   ema_t = d * ema_{t-1} + (1 - d) * w_t

Each element is computed by itself, in float32 from the master weights. So no layout changes it, and
a checkpoint holds it as one more state of a tensor.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

EMA = "ema"


def keep_ema(optimizer: Any, tensors: Iterable[Tensor], decay: float) -> None:
    """Make an optimizer keep the average of its tensors; a step that is left out leaves it."""
    averages = {tensor: tensor.detach().clone() for tensor in tensors}

    def follow(optimizer: Any, *_: object) -> None:
        # ZeRO hands its partitions over one by one, so those of this update are in the groups.
        updated = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        if updated:
            weights = [tensor.detach() for tensor in updated]
            torch._foreach_lerp_([averages[tensor] for tensor in updated], weights, 1 - decay)

    optimizer.ema = averages
    optimizer.register_step_post_hook(follow)


def ema_of(optimizer: Any, tensor: Tensor) -> dict[str, Tensor]:
    """The (n,) average of an optimizer's tensor under its name in checkpoints; empty without."""
    averages = getattr(optimizer, "ema", {})
    return {EMA: averages[tensor].view(-1)} if tensor in averages else {}
