"""The mixture-of-experts layer.

Letters: B batch, T tokens, N routed tokens (at most B*T), D d_model, E experts, L = E / ep_size
local experts, K top_k, A kept assignments (token, expert), at most N*K.

    x (B, T, D) -> router -> drop and sort the assignments by expert -> all-to-all to the ranks of
    the experts -> grouped matmuls -> all-to-all back -> weighted sum of each token's K rows

Two paths compute the same function. `_uses_kernels` chooses between them in each forward pass:

    step        plain path (torch only)      kernel path (Triton, in moe/kernels/)
    ----------  ---------------------------  -----------------------------------------
    route       router.route                 fused_cosines, fused_router.fused_route
    sort        dispatch.sort_assignments    counting_sort.sorted_positions
    gather      dispatch.GatherTokens       permute.GatherRows
    experts     Experts, torch._grouped_mm   expert_ffn.ExpertFFN
      ep_size>1 AllToAll.through             expert_ffn.ExpertFFN, segments
    combine     SparseFeedForward._combine   permute.CombineRows
    order       choice-major                 token-major

The kernel path runs on an NVIDIA GPU with Triton if nothing is drawn at random (jitter,
second_expert, capacity_order "random"), normalize_weights is not "after_dropping", and top_k and
num_experts are small enough. Its experts have biases, no RMSNorm, and an activation gelu, relu or
swish that is not dropped. Rows of d_model and d_ff must be whole 16 bytes, and no float64.
Otherwise, and always on a CPU, the plain path runs. On a GPU its experts still use expert_ffn if
they can.

Choice-major: assignment k*N + n, all first choices before all second choices. Token-major:
assignment n*K + k, all choices of a token together. Within an expert's rows the order is that of
these numbers, so the two paths sum the weights' gradients in different orders and differ in the
last bits. Which choices a full expert drops is decided choice-major on both paths.

Training uses the subclasses of models.moe.deepspeed; nothing here needs DeepSpeed.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from magnetar.models.kernels import MAX_EXPERTS, MAX_TOP_K
from magnetar.models.layers.feed_forward import FeedForward, Linear
from magnetar.models.layers.init import RandomSource
from magnetar.models.moe.all_to_all import (
    AllToAll,
    Peers,
    SendOrder,
    Traffic,
    expert_parallel_rank,
    send_order,
)
from magnetar.models.moe.config import MoELayerConfig
from magnetar.models.moe.dispatch import (
    Assignments,
    Choices,
    GatherTokens,
    expert_capacity,
    gathered_choices,
    kept_choices,
    routed_tokens,
    sort_assignments,
)
from magnetar.models.moe.experts import Experts, LoopedExperts
from magnetar.models.moe.noise import CAPACITY_ORDER, JITTER, drawn_sample_keys, token_keys, uniform
from magnetar.models.moe.router import Routing, RoutingStats, build_router, normalized


class SparseFeedForward(nn.Module):
    """Router, dispatch, experts, combine.

    Attributes:
        peers: ranks that share one set of experts; with ep_size > 1 it is set before the first
            forward pass.
        traffic: bytes that this rank has dispatched and combined in training.
        min_capacity: least number of tokens that an expert takes if there is a capacity.
        comm: module whose collective functions are called; a subclass has them logged.
    """

    comm: ModuleType = dist

    def __init__(
        self,
        gate: nn.Module,
        experts: Experts | LoopedExperts,
        moe: MoELayerConfig,
        time_major: bool = False,
        layer: int = 0,
    ) -> None:
        """Build the layer; see MoE."""
        nn.Module.__init__(self)  # not super(): a subclass is DeepSpeed's layer as well
        self.gate = gate
        self.experts = experts
        self.moe = moe
        self.time_major = time_major
        self.layer = layer
        self.ep_size = moe.ep_size
        self.num_local_experts = experts.num_local_experts
        self.peers: Peers | None = None
        self.traffic = Traffic()
        self.min_capacity = 1

    def forward(
        self, x: Tensor, padding: Tensor | None = None, sample_keys: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats]:
        """See MoE."""
        tokens = x.reshape(-1, x.size(-1))  # (B*T, D)
        index = routed_tokens(x, None if self.moe.route_padding else padding, self.time_major)
        h = tokens if index is None else tokens.index_select(0, index)  # (N, D)
        keys = self._keys(x, index, sample_keys)  # (N,) or None
        path = self._by_kernels if self._uses_kernels(h, keys) else self._by_torch
        with self._timed("time_moe"):
            out, stats = path(h, keys, index, x.shape[:2])  # (N, D)
        if index is not None:  # tokens that are not routed get 0
            out = out.new_zeros(tokens.shape).index_copy(0, index, out)  # (B*T, D)
        return out.view_as(x), stats

    def _uses_kernels(self, h: Tensor, keys: Tensor | None) -> bool:
        """Whether the kernel path runs; see the module."""
        moe = self.moe
        if keys is not None or moe.top_k > MAX_TOP_K or moe.num_experts > MAX_EXPERTS:
            return False
        return moe.normalize_weights != "after_dropping" and self.experts.uses_kernels(h)

    def _by_torch(
        self, h: Tensor, keys: Tensor | None, index: Tensor | None, shape: torch.Size
    ) -> tuple[Tensor, RoutingStats]:
        """(N, D) -> (N, D), the plain path."""
        routing: Routing = self.gate(self._jittered(h, keys), keys)  # experts, weights: (N, K)
        kept = self._kept(routing, keys, index, shape)  # (N, K) or None
        assignments, all_to_all = self._sorted(routing.experts, kept)
        rows = GatherTokens.apply(h, assignments.order, self.moe.top_k)  # (A, D), by expert
        if all_to_all is None:
            rows = self.experts(rows, assignments.counts)  # (A, D)
        elif self.experts.uses_kernels(rows):
            rows = self.experts(rows, assignments.counts, all_to_all=all_to_all)  # (A, D)
        else:
            rows = all_to_all.through(rows, self.experts)  # (A, D)
        out = self._combine(rows, assignments, routing.weights)  # (N, D)
        dropped = (routing.load - assignments.counts).sum().float()
        return out, routing.stats._replace(dropped=dropped)

    def _by_kernels(
        self, h: Tensor, keys: Tensor | None, index: Tensor | None, shape: torch.Size
    ) -> tuple[Tensor, RoutingStats]:
        """(N, D) -> (N, D), the kernel path: fewer passes over memory."""
        # Imported here, since Triton is not installed everywhere.
        from magnetar.models.moe.kernels.counting_sort import kept_block_counts, sorted_positions
        from magnetar.models.moe.kernels.permute import CombineRows, GatherRows

        routing: Routing = self.gate(h, by_kernel=True)
        experts, block_counts, send_counts = routing.experts, routing.block_counts, routing.load
        stats, num_experts = routing.stats, self.moe.num_experts
        kept = self._kept(routing, None, index, shape)  # (N, K) or None
        if kept is not None:
            experts = experts.where(kept, -1).contiguous()  # (N, K); `kept` is transposed
            block_counts = kept_block_counts(experts, num_experts)  # (E, blocks)
            send_counts = block_counts.sum(1)  # (E,)
            stats = stats._replace(dropped=(routing.load.sum() - send_counts.sum()).float())
        assert block_counts is not None
        # The counts start to travel now, and arrive while the rows are sorted and gathered.
        all_to_all = self._all_to_all(send_counts)
        offsets, counts, row_of, assignment_of = sorted_positions(
            experts, block_counts, self._send_order(h), kept is not None
        )
        rows = GatherRows.apply(h, row_of, assignment_of)  # (A, D), sorted by expert
        bias = None
        if all_to_all is None:
            # CombineRows adds the output bias (L, D) in the pass that weighs the rows.
            rows, bias = self.experts(rows, counts, offsets, defer_bias=True)  # (A, D)
        else:
            rows = self.experts(rows, counts, all_to_all=all_to_all)  # (A, D)
        positions = (experts, row_of, assignment_of, offsets)
        weights = self._scaled(routing.weights)  # (N, K)
        return CombineRows.apply(rows, bias, weights, *positions), stats  # (N, D)

    def _keys(self, x: Tensor, index: Tensor | None, sample_keys: Tensor | None) -> Tensor | None:
        """(N,) int64, keys of the routed tokens' noise; None if nothing is drawn."""
        moe = self.moe
        is_noisy = moe.jitter or moe.second_expert != "all" or moe.capacity_order == "random"
        if not (self.training and is_noisy):
            return None
        if sample_keys is None:
            sample_keys = drawn_sample_keys(x.size(0), x.device)
        keys = token_keys(sample_keys, x.size(1), self.layer).view(-1)  # (B*T,)
        return keys if index is None else keys[index]  # (N,)

    def _jittered(self, h: Tensor, keys: Tensor | None) -> Tensor:
        """(N, D) -> (N, D), in training times float32 noise from [1 - jitter, 1 + jitter]."""
        jitter = self.moe.jitter
        if keys is None or jitter == 0:
            return h
        noise = uniform(keys, h.size(-1), JITTER)  # (N, D)
        return h.float() * noise.mul_(2 * jitter).add_(1 - jitter)

    def _kept(
        self, routing: Routing, keys: Tensor | None, index: Tensor | None, shape: torch.Size
    ) -> Tensor | None:
        """(N, K) bool, False for a choice that is unused or dropped; None if all are kept."""
        moe, (num_tokens, top_k) = self.moe, routing.experts.shape
        limit = moe.capacity_factor if self.training else moe.eval_capacity_fraction
        if limit is None:
            return routing.used
        priority = None  # (N,), a full expert serves larger values first
        if moe.capacity_order == "batch_prioritized":
            priority = routing.first_probs
        elif moe.capacity_order == "random" and keys is not None:
            priority = uniform(keys, 1, CAPACITY_ORDER).squeeze(-1)
        choices = Choices(routing.experts.long(), routing.used, priority)
        if not self.training:
            capacity = max(self.min_capacity, math.ceil(limit * num_tokens))
            return kept_choices(choices, moe.num_experts, capacity)
        rows, total = None, torch.full((), num_tokens, device=choices.experts.device)
        if moe.capacity_scope == "global" and dist.is_initialized() and dist.get_world_size() > 1:
            # Every rank decides for all tokens alike, then keeps its own rows of the decision.
            choices, rows = gathered_choices(choices, index, shape, self.time_major, self.comm)
            assert choices.used is not None
            total = choices.used[:, 0].sum()
        places = expert_capacity(total, moe.num_experts, top_k, limit).clamp(self.min_capacity)
        kept = kept_choices(choices, moe.num_experts, places)
        return kept if rows is None else kept[rows]

    def _sorted(self, experts: Tensor, kept: Tensor | None) -> tuple[Assignments, AllToAll | None]:
        """The kept ones of (N, K) choices sorted by expert, or in the order of sending."""
        num_experts, order = self.moe.num_experts, self._send_order(experts)
        if order is None:
            return sort_assignments(experts, num_experts, kept), None
        # Sorted by position in the send order; the counts go back to the order of the experts.
        sent, counts = sort_assignments(order.positions[experts], num_experts, kept)
        assignments = Assignments(sent, counts[order.positions])
        return assignments, self._all_to_all(assignments.counts)

    def _all_to_all(self, counts: Tensor) -> AllToAll | None:
        """Start the all-to-all of the (E,) rows of each expert; None with ep_size 1."""
        if self.ep_size == 1:
            return None
        assert self.peers is not None, "no ranks to exchange tokens with"
        send_counts = counts.view(self.ep_size, -1)  # (ep_size, L)
        traffic = self.traffic if self.training else None
        return AllToAll(self.comm, self.peers, send_counts, self._timed, traffic)

    def _send_order(self, x: Tensor) -> SendOrder | None:
        """The order in which rows are sent, on the device of x; None with ep_size 1."""
        if self.ep_size == 1:
            return None
        assert self.peers is not None, "no ranks to exchange tokens with"
        return send_order(self.moe.num_experts, self.ep_size, self.peers.rank, x.device)

    def _combine(self, rows: Tensor, assignments: Assignments, weights: Tensor) -> Tensor:
        """(A, D) and weights (N, K) -> (N, D), each token's weighted sum; dropped rows add 0."""
        num_tokens, top_k = weights.shape
        if self.moe.normalize_weights == "after_dropping":
            kept = torch.zeros_like(weights).view(-1).index_fill(0, assignments.order, 1.0)
            weights = normalized(weights * kept.view(top_k, num_tokens).t())  # (N, K)
        weights = self._scaled(weights)
        slots = rows.new_zeros(top_k * num_tokens, rows.size(1))  # (K*N, D), choice-major
        slots = slots.index_copy(0, assignments.order, rows).unflatten(0, (top_k, num_tokens))
        return (slots * weights.t().unsqueeze(-1).to(rows.dtype)).sum(0)  # (K, N, D) -> (N, D)

    def _scaled(self, weights: Tensor) -> Tensor:
        """(N, K) -> (N, K), times weight_scale."""
        return weights if self.moe.weight_scale == 1.0 else weights * self.moe.weight_scale

    def _timed(self, name: str) -> AbstractContextManager[None]:
        """A subclass measures time_moe, and time_falltoall and time_salltoall within it."""
        return nullcontext()


class SharedExperts(FeedForward):
    """A dense network that every token passes, times sigmoid(v x) with a gate."""

    def __init__(self, d_model: int, d_ff: int, *options: Any, has_gate: bool) -> None:
        """Build the network; see `FeedForward` for its options."""
        super().__init__(d_model, d_ff, *options)
        self.weight_proj = Linear(d_model, 1, bias=False) if has_gate else None

    def init_weights(self, source: RandomSource) -> None:
        """Xavier-normal, the gate with gain 1; biases 0."""
        super().init_weights(source)
        if self.weight_proj is not None:
            source.xavier_normal_(self.weight_proj.weight.data, "weight_proj.weight")

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        out = super().forward(x)
        return out if self.weight_proj is None else out * self.weight_proj(x).sigmoid()


class MoE(nn.Module):
    """A MoE feed-forward layer.

    Attributes:
        num_experts: experts over the whole job.
        num_local_experts: experts on this rank.
        ep_size: ranks that share one set of experts.
        deepspeed_moe: router and experts. DeepSpeed's name, which every state dict has.
        shared: network that every token passes as well, or None.
    """

    layer_class = SparseFeedForward

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        moe: MoELayerConfig,
        activation: str,
        inner_norm: bool,
        gain: float,
        norm_eps: float = 1e-5,
        activation_dropout: float = 0.0,
        norm_type: str = "layernorm",
        bias: bool = True,
        *,
        time_major: bool = False,
        layer: int = 0,
    ) -> None:
        """Build the layer.

        Args:
            d_model: width of the residual stream.
            d_ff: inner width of an expert.
            moe: keys of `moe`; its time_major is not read.
            activation: key of ACTIVATIONS.
            inner_norm: whether each expert has a LayerNorm before its second matrix.
            gain: initial gain of the experts' matrices.
            norm_eps: epsilon of the experts' LayerNorms.
            activation_dropout: probability of dropping an expert's activation in training.
            norm_type: kind of the norms, see `layer_norm`.
            bias: whether the experts' matrices and LayerNorms have biases.
            time_major: whether capacity is filled position by position, not sequence by sequence.
            layer: index of the layer in the model, which keys its noise.
        """
        nn.Module.__init__(self)  # not super(): a subclass is DeepSpeed's layer as well
        self.num_experts, self.ep_size = moe.num_experts, moe.ep_size
        self.num_local_experts = moe.num_experts // moe.ep_size
        options = (activation, inner_norm, gain, norm_eps, activation_dropout, norm_type, bias)
        experts = Experts(self.num_local_experts, d_model, d_ff, *options)
        gate = build_router(d_model, moe)
        gate.requires_grad_(moe.frozen == "none")
        experts.requires_grad_(moe.frozen != "router_and_experts")
        self.deepspeed_moe = self.layer_class(gate, experts, moe, time_major, layer)
        self.shared: SharedExperts | None = None
        if moe.shared_d_ff is not None:
            shape = (d_model, moe.shared_d_ff)
            self.shared = SharedExperts(*shape, *options, has_gate=moe.shared_gate)

    def init_weights(self, source: RandomSource) -> None:
        """Draw this rank's experts by their global indices."""
        experts = self.deepspeed_moe.experts
        assert isinstance(experts, Experts)
        experts.init_weights(source, self.first_expert)

    @property
    def first_expert(self) -> int:
        """Global index of this rank's first expert."""
        if self.ep_size == 1:
            return 0
        ranks = (dist.get_rank(), dist.get_world_size(), self.ep_size)
        ep_rank = expert_parallel_rank(*ranks, self.deepspeed_moe.moe.placement)
        return ep_rank * self.num_local_experts

    def forward(
        self, x: Tensor, padding: Tensor | None = None, sample_keys: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats]:
        """Send every token to its experts.

        Args:
            x: (B, T, D).
            padding: (B, T) bool, True at padding, which is not routed unless `route_padding`.
            sample_keys: (B,) int64, keys of the samples' noise in training; None draws them from
                torch's generator.

        Returns:
            (B, T, D), without shared experts 0 at padding that is not routed, and this rank's
            statistics.
        """
        out, stats = self.deepspeed_moe(x, padding, sample_keys)
        return out if self.shared is None else out + self.shared(x), stats
