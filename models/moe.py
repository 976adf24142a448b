"""The mixture-of-experts layer: the X-MoE router and stacked experts.

Letters: B batch, T tokens, N = B*T, D d_model, E experts, L = E / ep_size local experts,
K top_k, A assignments (token, expert) that are kept, at most N*K, R rows this rank's experts get.

    x (B, T, D) -> router -> sort the assignments by expert -> all-to-all over the
    expert-parallel group -> grouped matmuls of the local experts -> all-to-all back -> weigh, sum

Training uses the subclasses of models.deepspeed_moe; nothing here needs DeepSpeed.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.config import MoEConfig
from models.experts import Experts
from models.init import RandomSource
from models.router import LinearRouter, Router, Routing, XMoERouter, balance_loss, normalized


class RoutingStats(NamedTuple):
    """What one MoE layer reports of one forward pass, over this rank's routed tokens.

    In training, the means over tokens are of the whole batch once averaged over the ranks, even
    where the ranks have unequal numbers of tokens.

    Attributes:
        aux_loss: () float32 with gradient, the balance loss before its weight.
        entropy: () float32, mean entropy of the gate, in nats; ln E is indifferent, 0 decided.
        load: (E,) float32, assignments to each expert before any is dropped.
        dropped: () float32, assignments dropped.
        temperature: () float32, the router's tau; 1 for a router without one.
        z_loss: () float32 with gradient, mean of log^2 sum exp(router logits) before its weight
            (ST-MoE, arXiv 2202.08906, eq. 5).
    """

    aux_loss: Tensor
    entropy: Tensor
    load: Tensor
    dropped: Tensor
    temperature: Tensor
    z_loss: Tensor


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """Tokens that one expert takes of one rank's micro-batch, at least 1 (GShard, sec. 3.1)."""
    return max(1, math.ceil(capacity_factor * top_k * num_tokens / num_experts))


def routed_tokens(x: Tensor, padding: Tensor | None, time_major: bool) -> Tensor | None:
    """Indices into the B*T tokens of those that are routed, in the order that capacity sees.

    Args:
        x: (B, T, D).
        padding: (B, T) bool, True where a token is not routed; None: all are.
        time_major: all tokens of a position before the next position.

    Returns:
        (N,) int64, or None: all, in the order in which they lie.
    """
    if padding is None and not time_major:
        return None
    index = torch.arange(x.size(0) * x.size(1), device=x.device).view(x.shape[:2])
    if time_major:
        index, padding = index.t(), None if padding is None else padding.t()
    return index.reshape(-1) if padding is None else index[~padding]


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


def sort_assignments(
    experts: Tensor,
    num_experts: int,
    capacity: int | None,
    priority: Tensor | None = None,
    used: Tensor | None = None,
) -> Assignments:
    """Sort assignments by expert and drop what exceeds the capacity.

    The sort is stable and first choices precede second ones, so an expert fills up with first
    choices in order of priority or position, then with second choices.

    Args:
        experts: (N, K) int64, the routers' choices.
        num_experts: E.
        capacity: most assignments an expert takes; None: no limit.
        priority: (N,), the larger, the earlier a token is served (V-MoE, arXiv 2106.05974);
            None: the earlier position.
        used: (N, K) bool, False where a choice is no assignment; None: all are.
    """
    num_tokens, top_k = experts.shape
    expert_of = experts.t().reshape(-1)  # (K*N,)
    order = torch.arange(expert_of.numel(), device=experts.device)
    if priority is not None:
        by_priority = priority.argsort(descending=True, stable=True)  # (N,)
        order = order.view(top_k, num_tokens)[:, by_priority].reshape(-1)
    if used is not None:
        order = order[used.t().reshape(-1)[order]]
    order = order[expert_of[order].argsort(stable=True)]
    load = expert_of[order].bincount(minlength=num_experts)
    if capacity is None:
        return Assignments(order, load, load)
    starts = load.cumsum(0) - load
    rank_in_expert = torch.arange(order.numel(), device=order.device) - starts[expert_of[order]]
    return Assignments(order[rank_in_expert < capacity], load.clamp(max=capacity), load)


class _GatherTokens(torch.autograd.Function):
    """Rows of h for the assignments; the backward adds a token's K gradients in a fixed order.

    index_select's own backward adds with atomics on a GPU: from K = 3 on, other bits every run.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k, ctx.num_tokens = top_k, h.size(0)
        return h.index_select(0, order % max(1, h.size(0)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        slots = grad.new_zeros(ctx.top_k * ctx.num_tokens, grad.size(1)).index_copy(0, order, grad)
        return slots.unflatten(0, (ctx.top_k, ctx.num_tokens)).sum(0), None, None


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks, uneven splits; the gradient travels back the same way."""

    @staticmethod
    def forward(
        ctx: Any,
        comm: ModuleType,
        group: dist.ProcessGroup,
        rows: Tensor,
        receive_splits: list[int],
        send_splits: list[int],
    ) -> Tensor:
        ctx.comm, ctx.group = comm, group
        ctx.receive_splits, ctx.send_splits = receive_splits, send_splits
        received = rows.new_empty(sum(receive_splits), rows.size(1))
        comm.all_to_all_single(
            received, rows.contiguous(), receive_splits, send_splits, group=group
        )
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, None, None]:
        splits = (ctx.send_splits, ctx.receive_splits)
        return None, None, _AllToAll.apply(ctx.comm, ctx.group, grad, *splits), None, None


class SparseFeedForward(nn.Module):
    """Router, dispatch, experts, combine.

    Attributes:
        ep_group: the ranks that share one set of experts, to be set before the first forward pass
            where there are several.
        comm: the module whose collective functions are called: a subclass has them logged.
    """

    comm: ModuleType = dist

    def __init__(
        self, gate: nn.Module, experts: Experts, moe: MoEConfig, time_major: bool = False
    ) -> None:
        """Build the layer."""
        nn.Module.__init__(self)  # not super(): a subclass is DeepSpeed's layer as well
        self.gate = gate
        self.experts = experts
        self.moe = moe
        self.time_major = time_major
        self.ep_size = moe.ep_size
        self.num_local_experts = experts.num_local_experts
        self.ep_group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, RoutingStats]:
        """(B, T, D) and (B, T) bool -> (B, T, D), 0 at padding, and this rank's statistics."""
        tokens = x.reshape(-1, x.size(-1))  # (B*T, D)
        index = routed_tokens(x, None if self.moe.route_padding else padding, self.time_major)
        h = tokens if index is None else tokens.index_select(0, index)  # (N, D)
        with self._timed("time_moe"):
            routing: Routing = self.gate(self._jittered(h))
            capacity = self._capacity(h.size(0))
            priority = None if capacity is None else self._priority(routing)
            assignments = sort_assignments(
                routing.experts, self.moe.num_experts, capacity, priority, routing.used
            )
            out = self._combine(self._apply_experts(h, assignments), assignments, routing.weights)
        if index is not None:
            out = out.new_zeros(tokens.shape).index_copy(0, index, out)
        return out.view_as(x), self._stats(routing, assignments)

    def _jittered(self, h: Tensor) -> Tensor:
        """(N, D) -> (N, D), in training times noise from [1 - jitter, 1 + jitter] in float32."""
        if not self.training or self.moe.jitter == 0:
            return h
        noise = torch.empty_like(h, dtype=torch.float32)
        return h.float() * noise.uniform_(1 - self.moe.jitter, 1 + self.moe.jitter)

    def _capacity(self, num_tokens: int) -> int | None:
        """None where nothing is dropped."""
        moe = self.moe
        if self.training:
            if moe.capacity_factor is None:
                return None
            return expert_capacity(num_tokens, moe.num_experts, moe.top_k, moe.capacity_factor)
        if moe.eval_capacity_fraction is None:
            return None
        return math.ceil(moe.eval_capacity_fraction * num_tokens)

    def _priority(self, routing: Routing) -> Tensor | None:
        """(N,) whom a full expert serves first; None: the earlier position."""
        if self.moe.capacity_order == "batch_prioritized":
            return routing.first_probs
        if self.moe.capacity_order == "random" and self.training:
            return torch.rand_like(routing.first_probs)
        return None

    def _apply_experts(self, h: Tensor, assignments: Assignments) -> Tensor:
        """(N, D) -> (A, D), the experts' outputs in the order of the assignments."""
        rows = _GatherTokens.apply(h, assignments.order, self.moe.top_k)  # (A, D)
        if self.ep_size == 1:
            return self.experts(rows, assignments.counts)
        send_counts = assignments.counts.view(self.ep_size, -1)  # (ep_size, L)
        receive_counts = torch.empty_like(send_counts)
        comm, group = self.comm, self.ep_group
        assert group is not None, "no ranks to exchange tokens with"
        comm.all_to_all_single(receive_counts, send_counts.contiguous(), group=group)
        splits = torch.stack([receive_counts.sum(1), send_counts.sum(1)])
        receive_splits, send_splits = splits.tolist()

        with self._timed("time_falltoall"):
            rows = _AllToAll.apply(comm, group, rows, receive_splits, send_splits)  # (R, D)
        # Rows come sorted by (sender, expert); the grouped matmul wants (expert, sender).
        expert_of = torch.arange(self.num_local_experts, device=rows.device).repeat(self.ep_size)
        expert_of = expert_of.repeat_interleave(receive_counts.view(-1), output_size=rows.size(0))
        by_expert = expert_of.argsort(stable=True)
        rows = self.experts(rows.index_select(0, by_expert), receive_counts.sum(0))
        rows = torch.empty_like(rows).index_copy(0, by_expert, rows)
        with self._timed("time_salltoall"):
            return _AllToAll.apply(comm, group, rows, send_splits, receive_splits)

    def _combine(self, rows: Tensor, assignments: Assignments, weights: Tensor) -> Tensor:
        """(A, D) and weights (N, K) -> (N, D), each token's weighted sum; dropped ones add 0."""
        num_tokens, top_k = weights.shape
        if self.moe.normalize_weights == "after_dropping":
            kept = torch.zeros_like(weights).view(-1).index_fill(0, assignments.order, 1.0)
            weights = normalized(weights * kept.view(top_k, num_tokens).t())
        slots = rows.new_zeros(top_k * num_tokens, rows.size(1))
        slots = slots.index_copy(0, assignments.order, rows).unflatten(0, (top_k, num_tokens))
        return (slots * weights.t().unsqueeze(-1).to(rows.dtype)).sum(0)

    def _stats(self, routing: Routing, assignments: Assignments) -> RoutingStats:
        num_experts = self.moe.num_experts
        counts = routing.experts.new_empty(num_experts + 1)  # first choices, tokens
        counts[:-1] = routing.experts[:, 0].bincount(minlength=num_experts)
        counts[-1] = routing.experts.size(0)
        num_ranks = 1
        if self.training and dist.is_initialized():
            # t_i of the whole batch: with a rank's own t_i the loss would depend on the layout.
            self.comm.all_reduce(counts)
            num_ranks = dist.get_world_size()
        total = counts[-1].clamp(min=1)  # a batch may be all padding
        # A rank's share of a mean over the whole batch: the mean over the ranks is that mean.
        num_tokens = total / num_ranks
        temperature = getattr(self.gate, "temperature", None)
        return RoutingStats(
            aux_loss=balance_loss(routing.balance_probs, counts[:-1] / total, num_tokens),
            entropy=routing.entropy.sum() / num_tokens,
            load=assignments.load.float(),
            dropped=(assignments.load - assignments.counts).sum().float(),
            temperature=routing.weights.new_ones(())
            if temperature is None
            else temperature.detach().float().squeeze(),
            z_loss=routing.log_z.square().sum() / num_tokens,
        )

    def _timed(self, name: str) -> AbstractContextManager[None]:
        """What a subclass measures: time_moe, and time_falltoall and time_salltoall within it."""
        return nullcontext()


def build_router(d_model: int, moe: MoEConfig) -> Router:
    """The router of a MoE layer, weights not yet drawn."""
    shape = (d_model, moe.num_experts, moe.top_k, moe.gate)
    normalize = moe.normalize_weights == "before_dropping"
    if moe.router == "linear":
        return LinearRouter(*shape, second_expert=moe.second_expert, normalize=normalize)
    return XMoERouter(
        *shape,
        moe.router_width,
        second_expert=moe.second_expert,
        normalize=normalize,
        normalize_tokens=moe.normalize_tokens,
        learned_temperature=moe.learned_temperature,
    )


class MoE(nn.Module):
    """A MoE feed-forward layer.

    Attributes:
        num_experts, num_local_experts: of the whole job, and those that lie on this rank.
        ep_size: ranks that share one set of experts.
        deepspeed_moe: what it consists of. The name is in every state dict, as DeepSpeed has it.
    """

    layer_class = SparseFeedForward

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        moe: MoEConfig,
        activation: str,
        inner_norm: bool,
        gain: float,
        *,
        norm_eps: float = 1e-5,
        activation_dropout: float = 0.0,
        time_major: bool = False,
    ) -> None:
        """Build the layer.

        Args:
            d_model: width of the residual stream.
            d_ff: inner width of an expert.
            moe: the keys of `moe`, but for time_major.
            activation: a key of ACTIVATIONS.
            inner_norm: a LayerNorm before each expert's second matrix.
            gain: initial gain of the experts' matrices.
            norm_eps: epsilon of the experts' LayerNorms.
            activation_dropout: probability of dropping an expert's activation in training.
            time_major: capacity is filled position by position, not sequence by sequence.
        """
        nn.Module.__init__(self)  # not super(): a subclass is DeepSpeed's layer as well
        self.num_experts, self.ep_size = moe.num_experts, moe.ep_size
        self.num_local_experts = moe.num_experts // moe.ep_size
        experts = Experts(
            self.num_local_experts,
            d_model,
            d_ff,
            activation,
            inner_norm,
            gain,
            norm_eps=norm_eps,
            activation_dropout=activation_dropout,
        )
        gate = build_router(d_model, moe)
        gate.requires_grad_(moe.frozen == "none")
        experts.requires_grad_(moe.frozen != "router_and_experts")
        self.deepspeed_moe = self.layer_class(gate, experts, moe, time_major)

    def init_weights(self, source: RandomSource) -> None:
        """Draw this rank's experts by their global indices."""
        self.deepspeed_moe.experts.init_weights(source, self.first_expert)

    @property
    def first_expert(self) -> int:
        """Global index of this rank's first expert."""
        rank = dist.get_rank() if self.ep_size > 1 else 0
        return (rank % self.ep_size) * self.num_local_experts

    def forward(self, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, RoutingStats]:
        """Send every token to its experts.

        Args:
            x: (B, T, D).
            padding: (B, T) bool, True at padding, which is not routed unless `route_padding`.

        Returns:
            (B, T, D), 0 at padding that is not routed, and this rank's statistics.
        """
        return self.deepspeed_moe(x, padding)
