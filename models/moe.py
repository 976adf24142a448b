"""The mixture-of-experts layer: DeepSpeed's MoE with the X-MoE router and stacked experts.

Letters: B batch, T tokens, N = B*T, D d_model, E experts, L = E / ep_size local experts,
K top_k, A assignments (token, expert) that are kept, at most N*K, R rows this rank's experts get.

    x (B, T, D) -> router -> sort the assignments by expert -> all-to-all over the
    expert-parallel group -> grouped matmuls of the local experts -> all-to-all back -> weigh, sum
"""

import math
from typing import Any, NamedTuple

import deepspeed.comm as dist
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.sharded_moe import MOELayer
from torch import Tensor, nn

from models.config import MoEConfig
from models.experts import Experts
from models.init import RandomSource
from models.router import LinearRouter, Routing, XMoERouter, balance_loss


class RoutingStats(NamedTuple):
    """What one MoE layer reports of one forward pass, over this rank's tokens.

    Attributes:
        aux_loss: () float32 with gradient, the balance loss before its weight. Its mean over the
            ranks is the loss of the whole batch.
        entropy: () float32, mean entropy of the gate, in nats; ln E is indifferent, 0 decided.
        load: (E,) float32, assignments to each expert before any is dropped.
        dropped: () float32, assignments dropped.
        temperature: () float32, the router's tau; 1 for a router without one.
    """

    aux_loss: Tensor
    entropy: Tensor
    load: Tensor
    dropped: Tensor
    temperature: Tensor


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """Tokens that one expert takes of one rank's micro-batch, at least 1 (GShard, sec. 3.1)."""
    return max(1, math.ceil(capacity_factor * top_k * num_tokens / num_experts))


class Assignments(NamedTuple):
    """The kept (token, expert) pairs in the order in which they are dispatched.

    Attributes:
        order: (A,) int64, indices into the K*N assignments in choice-major order (all first
            choices, then all second ones), sorted by expert.
        counts: (E,) int64, kept assignments of each expert; sums to A.
        load: (E,) int64, assignments of each expert before dropping.
    """

    order: Tensor
    counts: Tensor
    load: Tensor


def sort_assignments(experts: Tensor, num_experts: int, capacity: int | None) -> Assignments:
    """Sort assignments by expert and drop what exceeds the capacity.

    The sort is stable and first choices precede second ones, so an expert fills up with first
    choices in order of position, then with second choices.

    Args:
        experts: (N, K) int64, the routers' choices.
        num_experts: E.
        capacity: most assignments an expert takes; None: no limit.
    """
    expert_of = experts.t().reshape(-1)  # (K*N,)
    order = expert_of.argsort(stable=True)
    load = expert_of.bincount(minlength=num_experts)
    if capacity is None:
        return Assignments(order, load, load)
    starts = load.cumsum(0) - load
    rank_in_expert = torch.arange(order.numel(), device=order.device) - starts[expert_of[order]]
    return Assignments(order[rank_in_expert < capacity], load.clamp(max=capacity), load)


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks, uneven splits; the gradient travels back the same way."""

    @staticmethod
    def forward(
        ctx: Any,
        group: dist.ProcessGroup,
        rows: Tensor,
        receive_splits: list[int],
        send_splits: list[int],
    ) -> Tensor:
        ctx.group, ctx.receive_splits, ctx.send_splits = group, receive_splits, send_splits
        received = rows.new_empty(sum(receive_splits), rows.size(1))
        dist.all_to_all_single(
            received, rows.contiguous(), receive_splits, send_splits, group=group
        )
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        returned = _AllToAll.apply(ctx.group, grad, ctx.send_splits, ctx.receive_splits)
        return None, returned, None, None


class SparseFeedForward(MOELayer):
    """Router, dispatch, experts, combine. DeepSpeed knows it as a MOELayer and times it."""

    def __init__(
        self, gate: nn.Module, experts: Experts, moe: MoEConfig, ep_group_name: str
    ) -> None:
        """Build the layer; DeepSpeed sets its group when the engine starts."""
        super().__init__(gate, experts, ep_group_name, moe.ep_size, experts.num_local_experts)
        self.moe = moe

    def _set_ep_group(self, ep_group: dist.ProcessGroup) -> None:
        self.ep_group = ep_group

    def forward(self, x: Tensor) -> tuple[Tensor, RoutingStats]:
        """(B, T, D) -> (B, T, D) and this rank's statistics."""
        h = x.reshape(-1, x.size(-1))  # (N, D)
        with self._timed("time_moe"):
            routing: Routing = self.gate(h)
            assignments = sort_assignments(
                routing.experts, self.moe.num_experts, self._capacity(h.size(0))
            )
            out = self._combine(self._apply_experts(h, assignments), assignments, routing.weights)
        return out.view_as(x), self._stats(routing, assignments)

    def _capacity(self, num_tokens: int) -> int | None:
        """None where nothing is dropped: dispatch `dropless`, and always outside training."""
        if self.moe.capacity_factor is None or not self.training:
            return None
        return expert_capacity(
            num_tokens, self.moe.num_experts, self.moe.top_k, self.moe.capacity_factor
        )

    def _apply_experts(self, h: Tensor, assignments: Assignments) -> Tensor:
        """(N, D) -> (A, D), the experts' outputs in the order of the assignments."""
        rows = h.index_select(0, assignments.order % h.size(0))  # (A, D)
        if self.ep_size == 1:
            return self.experts(rows, assignments.counts)
        send_counts = assignments.counts.view(self.ep_size, -1)  # (ep_size, L)
        receive_counts = torch.empty_like(send_counts)
        dist.all_to_all_single(receive_counts, send_counts.contiguous(), group=self.ep_group)
        splits = torch.stack([receive_counts.sum(1), send_counts.sum(1)])
        receive_splits, send_splits = splits.tolist()

        with self._timed("time_falltoall"):
            rows = _AllToAll.apply(self.ep_group, rows, receive_splits, send_splits)  # (R, D)
        # Rows come sorted by (sender, expert); the grouped matmul wants (expert, sender).
        expert_of = torch.arange(self.num_local_experts, device=rows.device).repeat(self.ep_size)
        expert_of = expert_of.repeat_interleave(receive_counts.view(-1), output_size=rows.size(0))
        by_expert = expert_of.argsort(stable=True)
        rows = self.experts(rows.index_select(0, by_expert), receive_counts.sum(0))
        rows = torch.empty_like(rows).index_copy(0, by_expert, rows)
        with self._timed("time_salltoall"):
            return _AllToAll.apply(self.ep_group, rows, send_splits, receive_splits)

    def _combine(self, rows: Tensor, assignments: Assignments, weights: Tensor) -> Tensor:
        """(A, D) and weights (N, K) -> (N, D), each token's weighted sum; dropped ones add 0."""
        num_tokens, top_k = weights.shape
        slots = rows.new_zeros(top_k * num_tokens, rows.size(1))
        slots = slots.index_copy(0, assignments.order, rows).view(top_k, num_tokens, -1)
        return (slots * weights.t().unsqueeze(-1).to(rows.dtype)).sum(0)

    def _stats(self, routing: Routing, assignments: Assignments) -> RoutingStats:
        num_tokens = routing.experts.size(0)
        first_choices = routing.experts[:, 0].bincount(minlength=self.moe.num_experts).float()
        num_ranks = 1
        if self.training and dist.is_initialized():
            # t_i of the whole batch: with a rank's own t_i the loss would depend on the layout.
            dist.all_reduce(first_choices)
            num_ranks = dist.get_world_size()
        fraction = first_choices / (num_tokens * num_ranks)
        temperature = getattr(self.gate, "temperature", None)
        return RoutingStats(
            aux_loss=balance_loss(routing.balance_probs, fraction),
            entropy=routing.entropy,
            load=assignments.load.float(),
            dropped=(assignments.load - assignments.counts).sum().float(),
            temperature=routing.weights.new_ones(())
            if temperature is None
            else temperature.detach().float().squeeze(),
        )

    def _timed(self, name: str) -> "_Timed":
        return _Timed(self, name)


class _Timed:
    """Fills in the times that DeepSpeed's wall_clock_breakdown prints; free when that is off."""

    def __init__(self, layer: SparseFeedForward, name: str) -> None:
        self.layer, self.name = layer, name

    def __enter__(self) -> None:
        if self.layer.wall_clock_breakdown:
            self.layer.timers(self.name).start()

    def __exit__(self, *_exception: object) -> None:
        if self.layer.wall_clock_breakdown:
            timer = self.layer.timers(self.name)
            timer.stop()
            setattr(self.layer, self.name, timer.elapsed(reset=True))


class MoE(DeepSpeedMoE):
    """A MoE feed-forward layer that DeepSpeed knows as its own.

    DeepSpeed makes its process groups, reduces its experts' gradients over the ranks that hold
    the same experts, and writes one checkpoint file per expert.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        moe: MoEConfig,
        activation: str,
        inner_norm: bool,
        gain: float,
    ) -> None:
        """Build the layer; `gain` is the initial gain of the experts' matrices."""
        super().__init__(
            hidden_size=d_model,
            expert=nn.Identity(),
            num_experts=moe.num_experts,
            ep_size=moe.ep_size,
            k=moe.top_k,
        )
        experts = Experts(self.num_local_experts, d_model, d_ff, activation, inner_norm, gain)
        for parameter in experts.parameters():
            # DeepSpeed's marks of an expert's parameter, and E for SparseClip.
            vars(parameter).update(
                allreduce=False, group_name=self.expert_group_name, num_experts=moe.num_experts
            )
        gate: nn.Module
        if moe.router == "xmoe":
            gate = XMoERouter(d_model, moe.num_experts, moe.top_k, moe.gate, moe.router_width)
        else:
            gate = LinearRouter(d_model, moe.num_experts, moe.top_k, moe.gate)
        self.deepspeed_moe = SparseFeedForward(gate, experts, moe, self.expert_group_name)

    def init_weights(self, source: RandomSource) -> None:
        """Draw this rank's experts by their global indices."""
        rank = dist.get_rank() if self.ep_size > 1 else 0
        first_expert = (rank % self.ep_size) * self.num_local_experts
        self.deepspeed_moe.experts.init_weights(source, first_expert)

    def forward(self, x: Tensor) -> tuple[Tensor, RoutingStats]:
        """(B, T, D) -> (B, T, D) and this rank's statistics."""
        return self.deepspeed_moe(x)
