"""bitsandbytes' 8-bit AdamW, with the number of bits a choice of the parameter group.

Import this where the optimizer is made, and nowhere else: it needs the package bitsandbytes.
"""

from typing import Any

from bitsandbytes.optim import AdamW8bit
from torch import Tensor


class BlockwiseAdamW(AdamW8bit):
    """AdamW whose moments have `optim_bits` (8 or 32) of each group.

    bitsandbytes itself exempts a parameter by its id(). Under ZeRO the optimizer updates flat
    partitions instead, which take a group's place and keep its options.
    """

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """What bitsandbytes reads for every update; its own looks the parameter up by its id()."""
        names = ("lr", "betas", "eps", "weight_decay", "optim_bits")
        own = {name: group[name] for name in names}
        return own | {"min_8bit_size": 0, "max_unorm": 0.0, "skip_zeros": False}

    def make_states(self, group: dict[str, Any], tensor: Tensor, step: int) -> dict[str, Any]:
        """The states of one tensor after so many updates, all of them zero."""
        self.init_state(group, tensor, 0, 0)
        self.state[tensor]["step"] = step
        return self.state[tensor]
