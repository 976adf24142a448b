"""Initial weights that depend on the seed and on a tensor's role, never on its rank.

Every tensor has a generator of its own, keyed by the seed, the parameter's name and, for an expert,
its global index. So a model starts with the same weights on any number of ranks.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomSource:
    """Generators for the tensors of one module, keyed by the seed and the module's name.

    Attributes:
        seed: seed of the model.
        module_name: name of the module in the model.
        device: device whose generator draws, since each kind draws other numbers; None: the
            tensor's own device.
    """

    seed: int
    module_name: str
    device: torch.device | None = None

    def _fill(
        self,
        tensor: Tensor,
        parameter: str,
        expert: int | None,
        draw: Callable[..., Tensor],
        *numbers: float,
    ) -> None:
        """Fill a parameter (of one expert, by its global index) from a generator of its own."""
        key = f"{self.seed}/{self.module_name}/{parameter}/{expert}"
        digest = hashlib.sha256(key.encode()).digest()
        device = self.device or tensor.device
        # 63 bits: torch refuses seeds above the signed range on some devices.
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        drawn = torch.empty_like(tensor, device=device)
        tensor.data.copy_(draw(drawn, *numbers, generator=generator))

    def xavier_normal_(
        self,
        tensor: Tensor,
        parameter: str,
        gain: float = 1.0,
        expert: int | None = None,
        part: int = 0,
    ) -> None:
        """Fill a matrix in place from N(0, gain^2 * 2 / (fan_in + fan_out)).

        Args:
            tensor: (rows, columns), in either order, since Xavier's formula is symmetric.
            parameter: name of the parameter inside its module.
            gain: gamma of Sub-LN, beta of DeepNorm, or 1.
            expert: global index of the expert that owns the matrix.
            part: index of the matrix inside a parameter that packs several.
        """
        fan_out, fan_in = tensor.shape
        std = gain * math.sqrt(2.0 / (fan_in + fan_out))
        self.normal_(tensor, f"{parameter}.{part}", std, expert)

    def xavier_uniform_(self, tensor: Tensor, parameter: str) -> None:
        """Fill a matrix in place from U(-a, a), a^2 = 6 / (fan_in + fan_out)."""
        limit = math.sqrt(6.0 / sum(tensor.shape))
        self._fill(tensor, parameter, None, Tensor.uniform_, -limit, limit)

    def normal_(
        self, tensor: Tensor, parameter: str, std: float, expert: int | None = None
    ) -> None:
        """Fill a tensor in place from N(0, std^2)."""
        self._fill(tensor, parameter, expert, Tensor.normal_, 0.0, std)
