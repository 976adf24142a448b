"""The mixture-of-experts layer: the X-MoE router and stacked experts.

Letters: B batch, T tokens, N = B*T, D d_model, E experts, L = E / ep_size local experts,
K top_k, A assignments (token, expert) that are kept, at most N*K, R rows this rank's experts get.

    x (B, T, D) -> router -> drop and sort the assignments by expert -> all-to-all over the
    expert-parallel group -> grouped matmuls of the local experts -> all-to-all back -> weigh, sum

Training uses the subclasses of models.moe.deepspeed; nothing here needs DeepSpeed.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from magnetar.models.kernels import MAX_EXPERTS, MAX_TOP_K
from magnetar.models.layers.init import RandomSource
from magnetar.models.moe.all_to_all import Exchange, Peers, SendOrder, Traffic, send_order
from magnetar.models.moe.config import MoELayerConfig
from magnetar.models.moe.dispatch import (
    Assignments,
    Choices,
    expert_capacity,
    expert_counts,
    gather_tokens,
    gathered_choices,
    kept_choices,
    routed_tokens,
    sort_assignments,
)
from magnetar.models.moe.experts import Experts
from magnetar.models.moe.hierarchical_all_to_all import HierarchicalExchange
from magnetar.models.moe.nodes import place_of_rank
from magnetar.models.moe.noise import CAPACITY_ORDER, JITTER, drawn_sample_keys, token_keys, uniform
from magnetar.models.moe.router import Routing, RoutingStats, build_router, normalized


class SparseFeedForward(nn.Module):
    """Router, dispatch, experts, combine.

    Attributes:
        peers: the ranks that share one set of experts, to be set before the first forward pass
            where there are several.
        traffic: what this rank has sent to experts and back in training.
        comm: the module whose collective functions are called: a subclass has them logged.
    """

    comm: ModuleType = dist

    def __init__(
        self,
        gate: nn.Module,
        experts: Experts,
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

    def forward(
        self, x: Tensor, padding: Tensor | None = None, sample_keys: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats]:
        """See MoE."""
        tokens = x.reshape(-1, x.size(-1))  # (B*T, D)
        index = routed_tokens(x, None if self.moe.route_padding else padding, self.time_major)
        h = tokens if index is None else tokens.index_select(0, index)  # (N, D)
        keys = self._keys(x, index, sample_keys)
        if self._uses_kernels(h, keys):
            out, stats = self._by_kernels(h, index, x.shape[:2])
            return self._everywhere(out, index, tokens).view_as(x), stats
        with self._timed("time_moe"):
            routing: Routing = self.gate(self._jittered(h, keys), keys)
            priority = self._priority(routing.first_probs, keys)
            choices = Choices(routing.experts, routing.used, priority)
            kept = self._kept(choices, index, x.shape[:2])
            assignments, exchange = self._sorted(routing.experts, kept, self._num_chunks(h))
            rows = gather_tokens(h, assignments.order, self.moe.top_k)  # (A, D)
            rows = self._apply_experts(rows, assignments.counts, exchange)
            out = self._combine(rows, assignments, routing.weights)
        return self._everywhere(out, index, tokens).view_as(x), self._stats(routing, assignments)

    @staticmethod
    def _everywhere(out: Tensor, index: Tensor | None, tokens: Tensor) -> Tensor:
        """(N, D) of the routed tokens -> (B*T, D), 0 at the others."""
        if index is None:
            return out
        return out.new_zeros(tokens.shape).index_copy(0, index, out)

    def _uses_kernels(self, h: Tensor, keys: Tensor | None) -> bool:
        """Whether Triton's kernels do the work: where nothing is drawn."""
        moe = self.moe
        if keys is not None or moe.top_k > MAX_TOP_K or moe.num_experts > MAX_EXPERTS:
            return False
        return moe.normalize_weights != "after_dropping" and self.experts.uses_kernels(h)

    def _by_kernels(
        self, h: Tensor, index: Tensor | None, shape: torch.Size
    ) -> tuple[Tensor, RoutingStats]:
        """(N, D) -> (N, D): as `forward` does it, in fewer passes over memory."""
        from magnetar.models.moe.kernels.dispatch import (  # Triton is not everywhere
            CombineRows,
            GatherRows,
        )
        from magnetar.models.moe.kernels.sorting import kept_block_counts, sorted_positions

        with self._timed("time_moe"):
            routing, temperature = self.gate(h, by_kernel=True)
            num_chunks = self._num_chunks(h)
            experts, block_counts, sent = routing.experts, routing.block_counts, routing.load
            dropped, moe = torch.zeros_like(routing.entropy), self.moe
            limit = moe.capacity_factor if self.training else moe.eval_capacity_fraction
            if limit is not None:
                priority = self._priority(routing.first_probs, None)
                kept = self._kept(Choices(experts.long(), None, priority), index, shape)
                assert kept is not None
                experts = experts.where(kept, -1).contiguous()  # `kept` is transposed
                block_counts = kept_block_counts(experts, moe.num_experts)
                sent = block_counts.sum(1)
                dropped = (routing.load.sum() - sent.sum()).float()
            exchange = self._exchange(sent, num_chunks)
            offsets, counts, row_of, assignment_of = sorted_positions(
                experts, block_counts, self._send_order(h, num_chunks), limit is not None
            )
            rows, bias = GatherRows.apply(h, row_of, assignment_of), None  # (A, D)
            if exchange is None:
                rows, bias = self.experts(rows, counts, offsets, defer_bias=True)
            else:
                rows = self._apply_experts(rows, counts, exchange)
            placed = (experts, row_of, assignment_of, offsets)
            out = CombineRows.apply(rows, bias, routing.weights, *placed)
        return out, RoutingStats(
            probs=routing.probs,
            first_choices=routing.first_choices,
            entropy=routing.entropy,
            log_z_squared=routing.log_z_squared,
            load=routing.load.float(),
            dropped=dropped,
            temperature=temperature,
        )

    def _keys(self, x: Tensor, index: Tensor | None, sample_keys: Tensor | None) -> Tensor | None:
        """(N,) int64, what the routed tokens' noise is a function of; None: nothing is drawn."""
        moe = self.moe
        is_noisy = moe.jitter or moe.second_expert != "all" or moe.capacity_order == "random"
        if not (self.training and is_noisy):
            return None
        if sample_keys is None:
            sample_keys = drawn_sample_keys(x.size(0), x.device)
        keys = token_keys(sample_keys, x.size(1), self.layer).view(-1)  # (B*T,)
        return keys if index is None else keys[index]

    def _jittered(self, h: Tensor, keys: Tensor | None) -> Tensor:
        """(N, D) -> (N, D), in training times noise from [1 - jitter, 1 + jitter] in float32."""
        jitter = self.moe.jitter
        if keys is None or jitter == 0:
            return h
        noise = uniform(keys, h.size(-1), JITTER)  # (N, D)
        return h.float() * noise.mul_(2 * jitter).add_(1 - jitter)

    def _kept(self, choices: Choices, index: Tensor | None, shape: torch.Size) -> Tensor | None:
        """(N, K) bool, False where a choice is no assignment or dropped; None: all are kept."""
        moe, (num_tokens, top_k) = self.moe, choices.experts.shape
        if not self.training:
            if moe.eval_capacity_fraction is None:
                return choices.used
            capacity = math.ceil(moe.eval_capacity_fraction * num_tokens)
            return kept_choices(choices, moe.num_experts, capacity)
        if moe.capacity_factor is None:
            return choices.used
        rows, total = None, torch.full((), num_tokens, device=choices.experts.device)
        if moe.capacity_scope == "global" and dist.is_initialized() and dist.get_world_size() > 1:
            choices, rows = gathered_choices(choices, index, shape, self.time_major, self.comm)
            assert choices.used is not None
            total = choices.used[:, 0].sum()
        capacity_of_all = expert_capacity(total, moe.num_experts, top_k, moe.capacity_factor)
        kept = kept_choices(choices, moe.num_experts, capacity_of_all)
        return kept if rows is None else kept[rows]

    def _priority(self, first_probs: Tensor, keys: Tensor | None) -> Tensor | None:
        """(N,) whom a full expert serves first; None: the earlier position."""
        if self.moe.capacity_order == "batch_prioritized":
            return first_probs
        if self.moe.capacity_order == "random" and keys is not None:
            return uniform(keys, 1, CAPACITY_ORDER).squeeze(-1)
        return None

    def _sorted(
        self, experts: Tensor, kept: Tensor | None, num_chunks: int
    ) -> tuple[Assignments, Exchange | None]:
        """The (N, K) choices that are kept, in the order in which they are sent, if they are."""
        num_experts, order = self.moe.num_experts, self._send_order(experts, num_chunks)
        if order is None:
            return sort_assignments(experts, num_experts, kept), None
        sent, counts = sort_assignments(order.places[experts], num_experts, kept)
        assignments = Assignments(sent, counts[order.places])
        return assignments, self._exchange(assignments.counts, num_chunks)

    def _num_chunks(self, h: Tensor) -> int:
        """In how many chunks the experts' rows are exchanged."""
        overlaps = self.ep_size > 1 and self.experts.uses_kernels(h)
        return self.moe.num_exchange_chunks if overlaps else 1

    def _exchange(self, counts: Tensor, num_chunks: int) -> Exchange | None:
        """Start to tell the other ranks the (E,) rows of each expert; None: there are none."""
        if self.ep_size == 1:
            return None
        assert self.peers is not None, "no ranks to exchange tokens with"
        kind = Exchange if self.peers.across is None else HierarchicalExchange
        by_rank = counts.view(self.ep_size, -1)
        traffic = self.traffic if self.training else None
        return kind(self.comm, self.peers, by_rank, num_chunks, self._timed, traffic)

    def _send_order(self, x: Tensor, num_chunks: int) -> SendOrder | None:
        """In which order the experts' rows are sent, on the device of x; None: nowhere."""
        if self.ep_size == 1:
            return None
        assert self.peers is not None, "no ranks to exchange tokens with"
        sizes = (self.moe.num_experts, self.ep_size, num_chunks, self.peers.rank)
        return send_order(*sizes, x.device, self.peers.num_nodes)

    def _apply_experts(self, rows: Tensor, counts: Tensor, exchange: Exchange | None) -> Tensor:
        """(A, D) sorted by expert and the experts' (E,) counts -> (A, D), what they return."""
        if exchange is None:
            return self.experts(rows, counts)
        if self.experts.uses_kernels(rows):
            return self.experts(rows, counts, exchange=exchange)
        return exchange.through(rows, self.experts)

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
        num_experts, wanted = self.moe.num_experts, routing.experts
        load = assignments.counts
        if self.moe.capacity_factor is not None or self.moe.eval_capacity_fraction is not None:
            load = expert_counts(wanted, num_experts, routing.used)
        return RoutingStats(
            probs=routing.balance_probs.sum(0),
            first_choices=expert_counts(wanted[:, 0], num_experts),
            entropy=routing.entropy.sum(),
            log_z_squared=routing.log_z.square().sum(),
            load=load.float(),
            dropped=(load - assignments.counts).sum().float(),
            temperature=routing.temperature,
        )

    def _timed(self, name: str) -> AbstractContextManager[None]:
        """What a subclass measures: time_moe, and time_falltoall and time_salltoall within it."""
        return nullcontext()


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
        moe: MoELayerConfig,
        activation: str,
        inner_norm: bool,
        gain: float,
        *,
        norm_eps: float = 1e-5,
        activation_dropout: float = 0.0,
        time_major: bool = False,
        layer: int = 0,
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
            layer: its index in the model, which keys its noise.
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
        self.deepspeed_moe = self.layer_class(gate, experts, moe, time_major, layer)

    def init_weights(self, source: RandomSource) -> None:
        """Draw this rank's experts by their global indices."""
        self.deepspeed_moe.experts.init_weights(source, self.first_expert)

    @property
    def first_expert(self) -> int:
        """Global index of this rank's first expert."""
        if self.ep_size == 1:
            return 0
        sizes = (dist.get_rank(), dist.get_world_size(), self.ep_size)
        return place_of_rank(*sizes, self.deepspeed_moe.moe.placement) * self.num_local_experts

    def forward(
        self, x: Tensor, padding: Tensor | None = None, sample_keys: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats]:
        """Send every token to its experts.

        Args:
            x: (B, T, D).
            padding: (B, T) bool, True at padding, which is not routed unless `route_padding`.
            sample_keys: (B,) int64, what a sample's noise in training is a function of; None:
                drawn from torch's generator.

        Returns:
            (B, T, D), 0 at padding that is not routed, and this rank's statistics.
        """
        return self.deepspeed_moe(x, padding, sample_keys)
