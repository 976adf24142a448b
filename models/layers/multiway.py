"""Multiway modules: a pool of parameters for each of two modalities (BEiT-3, arXiv 2208.10442).

Letters: B batch, T tokens, D width.
"""

import copy

import torch
from torch import Tensor, nn


class Multiway(nn.Module):
    """Two copies of a token-wise module, one for each modality."""

    def __init__(self, module: nn.Module) -> None:
        """Build the pools from one module; `build_model` draws each with its own numbers."""
        super().__init__()
        self.pools = nn.ModuleList([module, copy.deepcopy(module)])

    def forward(self, x: Tensor, split_position: int | None) -> Tensor:
        """(B, T, D) -> (B, T, ...): positions before the split by pool 0, the others by pool 1.

        Args:
            x: (B, T, D).
            split_position: number of positions of the first modality; None: all positions.
        """
        if split_position is None or split_position >= x.size(1):
            return self.pools[0](x)
        if split_position <= 0:
            return self.pools[1](x)
        first, second = x[:, :split_position], x[:, split_position:]
        return torch.cat([self.pools[0](first), self.pools[1](second)], dim=1)


def per_modality(module: nn.Module, x: Tensor, split_position: int | None) -> Tensor:
    """Apply a module that may have a pool of parameters for each modality."""
    return module(x, split_position) if isinstance(module, Multiway) else module(x)


def pools(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """The pools of a Multiway module with their names; any other module alone, with its name."""
    if isinstance(module, Multiway):
        return [(f"{name}.pools.{index}", pool) for index, pool in enumerate(module.pools)]
    return [(name, module)]
