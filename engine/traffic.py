"""Which way rows travel to experts and back, and how much they send, for metrics.jsonl."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from engine.batch_sizes import MICRO
from engine.config import RunConfig
from engine.trained_run import DTYPES
from models.exchange import Traffic
from models.moe import SparseFeedForward

# A message to another node up to which it pays to send fewer and larger ones, in bytes: what a
# message costs times what a node's inside carries meanwhile. On CPUs as benchmarks.exchange finds
# it over gloo. On GPUs reckoned and not measured: 5 microseconds of 200 GB/s.
PAYS_UP_TO = {"cpu": 8 * 2**10, "cuda": 2**20}
LINKS = ("stayed", "inside", "between")  # of Traffic, all in bytes


def message_bytes(config: RunConfig, ranks: int) -> float:
    """Mean bytes that a rank sends straight to each of so many that share experts, of a layer."""
    moe, data = config.model.moe, config.data
    assert moe is not None
    num_tokens = config.deepspeed[MICRO] * data.seq_len
    if data.pairs is not None:
        num_tokens = config.deepspeed[MICRO] * data.pairs.bin_tokens
    bytes_of_row = config.model.d_model * DTYPES[config.dtype].itemsize
    return num_tokens * moe.top_k * bytes_of_row / ranks


def choose_ways(model: nn.Module, config: RunConfig, device: torch.device) -> None:
    """With moe.exchange "auto", have rows travel straight where going by nodes does not pay."""
    moe = config.model.moe
    if moe is None or moe.exchange != "auto":
        return
    if message_bytes(config, moe.ep_size) <= PAYS_UP_TO[device.type]:
        return
    for module in model.modules():
        if isinstance(module, SparseFeedForward) and module.peers is not None:
            module.peers = module.peers._replace(inside=None, across=None)


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
