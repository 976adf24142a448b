"""Lion (Chen et al., arXiv 2302.06675, algorithm 2): the sign of a mix of momentum and gradient."""

from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Lion with decoupled weight decay.

    With gradient g, momentum m and learning rate lr:

        w = (1 - lr * weight_decay) * w - lr * sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g

    The state `exp_avg` is m, `step` the number of updates.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, _closure: None = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient."""
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(weight)}
                state["step"] += 1
                momentum = state["exp_avg"]
                weight.mul_(1 - lr * group["weight_decay"])
                weight.add_(momentum.lerp(weight.grad, 1 - beta1).sign_(), alpha=-lr)
                momentum.lerp_(weight.grad, 1 - beta2)
