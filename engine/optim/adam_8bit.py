"""bitsandbytes' 8-bit AdamW, with the number of bits a choice of the parameter group.

Only the code that makes the optimizer imports this, since it needs the package bitsandbytes.
"""

from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit
from torch import Tensor

from magnetar.engine.optim.adam import MOMENTS


class BlockwiseAdamW(AdamW8bit):
    """AdamW whose moments have the `optim_bits` (8 or 32) of their group.

    bitsandbytes itself exempts a parameter by its id(). Under ZeRO the optimizer updates flat
    partitions, which keep the options of the group that they stand for.
    """

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """The options of an update, from the group; bitsandbytes looks them up by id()."""
        names = ("lr", "betas", "eps", "weight_decay", "optim_bits")
        own = {name: group[name] for name in names}
        return own | {"min_8bit_size": 0, "max_unorm": 0.0, "skip_zeros": False}

    def make_states(self, group: dict[str, Any], tensor: Tensor, step: int) -> None:
        """Make a tensor's states as after `step` updates, with moments that are to be filled.

        Moments of 8 bits get float32 copies on the host until `round_to_8_bits`.
        """
        self.init_state(group, tensor, 0, 0)
        state = self.state[tensor]
        state["step"] = step
        if state["state1"].dtype == torch.uint8:
            state |= {name: torch.zeros(tensor.numel()) for name in MOMENTS}
