"""What the ranks send to experts and back, for metrics.jsonl."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from models.exchange import Traffic
from models.moe import SparseFeedForward

LINKS = ("stayed", "inside", "between")  # of Traffic, all in bytes


class TrafficMeter:
    """Counts the bytes of each MoE layer on all ranks together, forward and backward.

    What is asked outside training is not counted, what is computed again for the backward pass is.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], device: torch.device) -> None:
        """names: of the model's MoE layers, see engine.metrics.moe_layers."""
        layers = [module for module in model.modules() if isinstance(module, SparseFeedForward)]
        self.layers = dict(zip(names, layers, strict=True))
        self.counts = any(layer.ep_size > 1 for layer in layers)
        self.device = device
        self.last = [Traffic() for _ in layers]

    def count_step(self) -> None:
        """A step is done."""
        self.last = [layer.traffic for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.traffic = Traffic()

    def record(self) -> dict[str, float]:
        """GiB of the last step, of each layer and of all; every rank takes part.

        Empty with ep_size 1.
        """
        if not self.counts:
            return {}
        sums = [[getattr(traffic, link) for link in LINKS] for traffic in self.last]
        found = torch.tensor(sums, dtype=torch.float64, device=self.device)
        dist.all_reduce(found)
        gib = (found / 2**30).cpu()  # (layers, links)
        totals = zip(LINKS, gib.sum(0).tolist(), strict=True)
        record = {f"all_to_all_{link}_gib": value for link, value in totals}
        for name, of_layer in zip(self.layers, gib.tolist(), strict=True):
            for link, value in zip(LINKS, of_layer, strict=True):
                record[f"{name}/all_to_all_{link}_gib"] = value
        return record
