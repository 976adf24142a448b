"""Which tokens reach which experts, and in what order their rows lie.

Letters: B batch, T tokens, N tokens that are routed, D d_model, E experts, K top_k, W ranks,
A assignments (token, expert) that are kept, at most N*K.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor


def expert_capacity(
    num_tokens: Tensor, num_experts: int, top_k: int, capacity_factor: float
) -> Tensor:
    """Tokens that one expert takes of so many, at least 1 (GShard, sec. 3.1); all () int64.

    On the device, where counting the padded tokens of a batch costs no synchronisation.
    """
    # The order of a Python expression in float64, so that the rounding is the same everywhere.
    share = capacity_factor * top_k * num_tokens.double() / num_experts
    return share.ceil().long().clamp(min=1)


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


class Choices(NamedTuple):
    """What tokens ask for, in the order in which they are served.

    Attributes:
        experts: (N, K) int64, each token's experts, best first.
        used: (N, K) bool, False where a choice is no assignment; None: all are.
        priority: (N,) float32, the larger, the earlier a token is served (V-MoE, arXiv
            2106.05974); None: the earlier position.
    """

    experts: Tensor
    used: Tensor | None
    priority: Tensor | None


def kept_choices(choices: Choices, num_experts: int, capacity: int | Tensor) -> Tensor:
    """Which choices reach their experts where each expert takes `capacity` of them.

    First choices precede second ones, so an expert fills up with first choices in order of
    priority or position, then with second choices.

    Args:
        choices: of the tokens that share the experts' places.
        num_experts: E.
        capacity: a number, or () int64.

    Returns:
        (N, K) bool.
    """
    experts, used, priority = choices
    num_tokens, top_k = experts.shape
    expert_of = experts.t().reshape(-1)  # (K*N,), choice-major
    if used is not None:  # to an expert that there is not, behind all others
        expert_of = expert_of.where(used.t().reshape(-1), num_experts)
    order = torch.arange(expert_of.numel(), device=experts.device)
    if priority is not None:
        by_priority = priority.argsort(descending=True, stable=True)  # (N,)
        order = order.view(top_k, num_tokens)[:, by_priority].reshape(-1)
    order = order[expert_of[order].argsort(stable=True)]
    expert_of = expert_of[order]
    starts = _starts(expert_of, num_experts)
    place = torch.arange(order.numel(), device=order.device) - starts[expert_of]
    kept = torch.empty_like(order, dtype=torch.bool)
    kept[order] = (place < capacity) & (expert_of < num_experts)
    return kept.view(top_k, num_tokens).t()


def _starts(expert_of: Tensor, num_experts: int) -> Tensor:
    """(A,) int64, ascending -> (E + 1,), where each expert begins in it; the last: where all end.

    A histogram would do, but torch's waits for the device.
    """
    return torch.searchsorted(expert_of, torch.arange(num_experts + 1, device=expert_of.device))


def expert_counts(experts: Tensor, num_experts: int, used: Tensor | None = None) -> Tensor:
    """How often each expert is named, without waiting for the device.

    Args:
        experts: int64 of any shape.
        num_experts: E.
        used: bool of the same shape, False where an entry does not count; None: all do.

    Returns:
        (E,) int64.
    """
    ones = torch.ones_like(experts) if used is None else used.long()
    return ones.new_zeros(num_experts).scatter_add_(0, experts.reshape(-1), ones.reshape(-1))


def gathered_choices(
    choices: Choices, index: Tensor | None, shape: torch.Size, time_major: bool, comm: ModuleType
) -> tuple[Choices, Tensor]:
    """The choices of all ranks' tokens, padding included, in one order for every layout.

    Samples come in the order of the ranks, which is that of the global batch.

    Args:
        choices: of this rank's N routed tokens.
        index: (N,) int64, where they lie among its B*T; None: everywhere, in that order.
        shape: B and T, the same on every rank.
        time_major: all tokens of a position before the next position, over all samples.
        comm: whose all_gather_into_tensor is called.

    Returns:
        The choices of W*B*T tokens, those that are not routed without a used one, and the (N,)
        rows of this rank's own.
    """
    experts, used, priority = choices
    num_samples, num_positions = shape
    columns = experts.int() if used is None else experts.int().where(used, -1)
    if priority is not None:
        columns = torch.cat([columns, priority.unsqueeze(-1).view(torch.int32)], dim=-1)
    if index is not None:
        everywhere = columns.new_full((shape.numel(), columns.size(-1)), -1)
        columns = everywhere.index_copy(0, index, columns)
    world_size = comm.get_world_size()
    gathered = columns.new_empty(world_size * columns.size(0), columns.size(1))
    comm.all_gather_into_tensor(gathered, columns.contiguous())
    first = comm.get_rank() * shape.numel()
    if index is None:
        index = torch.arange(shape.numel(), device=experts.device)
    rows = index + first
    if time_major:
        all_samples = world_size * num_samples
        gathered = gathered.view(all_samples, num_positions, -1).transpose(0, 1).flatten(0, 1)
        rows = rows % num_positions * all_samples + rows // num_positions
    found = gathered[:, : experts.size(1)].long()
    return (
        Choices(
            found.clamp(min=0),
            found >= 0,
            None if priority is None else gathered[:, -1].contiguous().view(torch.float32),
        ),
        rows,
    )


class Assignments(NamedTuple):
    """The kept (token, expert) pairs in the order in which they are dispatched.

    Attributes:
        order: (A,) int64, indices into the K*N assignments in choice-major order (all first
            choices, then all second ones), sorted by expert.
        counts: (E,) int64, kept assignments of each expert; sums to A.
    """

    order: Tensor
    counts: Tensor


def sort_assignments(experts: Tensor, num_experts: int, kept: Tensor | None) -> Assignments:
    """Sort assignments by expert; within one, first choices precede second ones.

    Args:
        experts: (N, K) int64, the router's choices.
        num_experts: E.
        kept: (N, K) bool, False where a choice is no assignment or dropped; None: all are kept.
    """
    expert_of = experts.t().reshape(-1)  # (K*N,)
    if kept is None:
        expert_of, order = expert_of.sort(stable=True)
    else:
        order = kept.t().reshape(-1).nonzero().squeeze(-1)
        expert_of, by_expert = expert_of[order].sort(stable=True)
        order = order[by_expert]
    return Assignments(order, _starts(expert_of, num_experts).diff())


def gather_tokens(h: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Rows of the assignments' tokens.

    Args:
        h: (N, D).
        order: (A,) int64, of Assignments.
        top_k: K.

    Returns:
        (A, D); its backward adds a token's K gradients in a fixed order.
    """
    return _GatherTokens.apply(h, order, top_k)


class _GatherTokens(torch.autograd.Function):
    """index_select with another backward.

    Its own adds with atomics on a GPU: from K = 3 on, other bits every run.
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
