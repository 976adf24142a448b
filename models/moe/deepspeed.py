"""The MoE layer for DeepSpeed: with the attributes, process groups and timers that it expects.

DeepSpeed makes the process groups, reduces the experts' gradients over the ranks that hold the same
experts, and times the layer. It recognises a MoE layer by its class: under ZeRO 0, 1 and 2 by
`deepspeed.moe.layer.MoE`, which it refuses under ZeRO 3; there it needs an `AutoEPMoELayer`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed.comm
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.sharded_moe import MOELayer
from deepspeed.utils import groups
from deepspeed.utils.timer import SynchronizedWallClockTimer
from torch import nn

from magnetar.models.moe.all_to_all import peers_of
from magnetar.models.moe.layer import MoE, SparseFeedForward


class TimedSparseFeedForward(SparseFeedForward, MOELayer):
    """A layer that measures the times of DeepSpeed's wall_clock_breakdown, if that is on.

    Its collectives are DeepSpeed's, so comms_logger sees them.
    """

    comm = deepspeed.comm

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        """See SparseFeedForward; DeepSpeed's layer would build another gate."""
        super().__init__(*arguments, **keywords)
        self.time_moe = self.time_falltoall = self.time_salltoall = 0.0
        self.timers = SynchronizedWallClockTimer()
        self.wall_clock_breakdown = False

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        if not self.wall_clock_breakdown:
            yield
            return
        timer = self.timers(name)
        timer.start()
        yield
        timer.stop()
        setattr(self, name, timer.elapsed(reset=True))


class GroupedMoE(MoE):
    """A MoE layer whose experts have DeepSpeed's attributes, and E for SparseClip.

    Attributes:
        ep_group_name, expert_group_name: DeepSpeed's name for the groups of ranks that share one
            set of experts, under the names of its two kinds of layers.
    """

    layer_class = TimedSparseFeedForward

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        """See MoE; DeepSpeed's layers would build experts of their own."""
        super().__init__(*arguments, **keywords)
        self._mark_experts()

    def _mark_experts(self) -> None:
        self.ep_group_name = self.expert_group_name = f"ep_size_{self.ep_size}"
        for parameter in self.deepspeed_moe.experts.parameters():
            vars(parameter).update(
                allreduce=False, group_name=self.ep_group_name, num_experts=self.num_experts
            )

    def set_deepspeed_parallelism(
        self, use_data_before_expert_parallel_: bool = False, folding_group_handles: None = None
    ) -> None:
        """Take part in making the groups; DeepSpeed calls it on every rank.

        Ranks of one set of experts lie apart if DeepSpeed's JSON or `moe.placement` says so.
        """
        lie_apart = self.deepspeed_moe.moe.placement == "across_nodes"
        if self.ep_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size,
                use_data_before_expert_parallel_=use_data_before_expert_parallel_ or lie_apart,
            )
        self.ep_group = groups._get_expert_parallel_group(self.ep_group_name)
        if self.ep_size > 1:
            self.deepspeed_moe.peers = peers_of(self.ep_group)


class ReplicatedMoE(GroupedMoE, DeepSpeedMoE):
    """The layer under ZeRO 0, 1 and 2, which leave parameters whole."""


class PartitionedMoE(GroupedMoE, AutoEPMoELayer):
    """The layer under ZeRO 3, which partitions parameters over the ranks."""

    def _mark_experts(self) -> None:
        super()._mark_experts()
        for parameter in self.deepspeed_moe.experts.parameters():
            vars(parameter).update(
                ds_zero_placement_family="autoep_expert",
                ds_zero_partition_group_name=self.ep_group_name,
            )


def moe_class(zero_stage: int, trains_experts: bool = True) -> type[MoE]:
    """The class of MoE layers that DeepSpeed trains under a ZeRO stage.

    Under ZeRO 1 and 2 DeepSpeed refuses its own MoE layer if all experts are frozen.
    """
    if zero_stage == 3:
        return PartitionedMoE
    return ReplicatedMoE if trains_experts else GroupedMoE


def join_expert_groups(model: nn.Module) -> None:
    """Make the groups of a model without an engine; every rank calls it."""
    for module in model.modules():
        if isinstance(module, GroupedMoE):
            module.set_deepspeed_parallelism()
