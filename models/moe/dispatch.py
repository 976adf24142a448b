"""The dispatch of the plain path: which tokens reach which experts, and the order of their rows.

Letters: B batch, T tokens, N routed tokens, D d_model, E experts, K top_k, W ranks,
A kept assignments (token, expert), at most N*K.

Assignments are choice-major here: the k-th choice of token n has the number k*N + n, so all first
choices come before all second choices. The kernel path (moe/kernels/counting_sort.py) is
token-major: there the number is n*K + k.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor


def expert_capacity(
    num_tokens: Tensor, num_experts: int, top_k: int, capacity_factor: float
) -> Tensor:
    """() int64, the largest number of tokens of one expert, at least 1 (GShard, sec. 3.1).

    `num_tokens` is () int64 on the device, so that counting the routed tokens of a padded batch
    needs no synchronisation.
    """
    # float64, in the order of the Python expression, so that every device rounds alike.
    share = capacity_factor * top_k * num_tokens.double() / num_experts
    return share.ceil().long().clamp(min=1)


def routed_tokens(x: Tensor, padding: Tensor | None, time_major: bool) -> Tensor | None:
    """(B, T, D) -> (N,) int64, the routed tokens in the order in which they fill capacity.

    Padding (B, T) is True for a token that is not routed. With time_major all tokens of a position
    come before the next position. None: all tokens are routed in their own order.
    """
    if padding is None and not time_major:
        return None
    index = torch.arange(x.size(0) * x.size(1), device=x.device).view(x.shape[:2])  # (B, T)
    if time_major:
        index, padding = index.t(), None if padding is None else padding.t()  # (T, B)
    return index.reshape(-1) if padding is None else index[~padding]  # (N,)


class Choices(NamedTuple):
    """The routers' choices.

    Attributes:
        experts: (N, K) int64, each token's experts, best first.
        used: (N, K) bool, False for a choice that is no assignment; None if all are.
        priority: (N,) float32, a full expert serves larger values first (V-MoE, arXiv
            2106.05974); None if earlier tokens go first.
    """

    experts: Tensor
    used: Tensor | None
    priority: Tensor | None


def kept_choices(choices: Choices, num_experts: int, capacity: int | Tensor) -> Tensor:
    """(N, K) bool, the choices that are served if each expert serves `capacity` of them.

    An expert serves first choices in order of priority or position, then second choices. The
    choices are those of all tokens that compete; the capacity is an int or () int64.
    """
    experts, used, priority = choices
    num_tokens, top_k = experts.shape
    expert_of = experts.t().reshape(-1)  # (K*N,), choice-major
    if used is not None:  # unused choices name expert E, which sorts behind all others
        expert_of = expert_of.where(used.t().reshape(-1), num_experts)
    order = torch.arange(expert_of.numel(), device=experts.device)  # (K*N,)
    if priority is not None:
        by_priority = priority.argsort(descending=True, stable=True)  # (N,)
        order = order.view(top_k, num_tokens)[:, by_priority].reshape(-1)  # (K*N,)
    order = order[expert_of[order].argsort(stable=True)]  # (K*N,), sorted by expert
    expert_of = expert_of[order]
    starts = _starts(expert_of, num_experts)  # (E + 1,)
    # The rank of each choice among those of its expert, 0 for the first one served.
    rank_in_expert = torch.arange(order.numel(), device=order.device) - starts[expert_of]
    kept = torch.empty_like(order, dtype=torch.bool)
    kept[order] = (rank_in_expert < capacity) & (expert_of < num_experts)
    return kept.view(top_k, num_tokens).t()  # (N, K)


def _starts(expert_of: Tensor, num_experts: int) -> Tensor:
    """(A,) int64, ascending -> (E + 1,), start of each expert's entries, then the end of all.

    A histogram would do, but torch's waits for the device.
    """
    return torch.searchsorted(expert_of, torch.arange(num_experts + 1, device=expert_of.device))


def expert_counts(experts: Tensor, num_experts: int, used: Tensor | None = None) -> Tensor:
    """Int64 of any shape -> (E,) int64, the number of choices of each expert that are used.

    It does not wait for the device. Used is a bool of the same shape, or None if all count.
    """
    ones = torch.ones_like(experts) if used is None else used.long()
    return ones.new_zeros(num_experts).scatter_add_(0, experts.reshape(-1), ones.reshape(-1))


def gathered_choices(
    choices: Choices, index: Tensor | None, shape: torch.Size, time_major: bool, comm: ModuleType
) -> tuple[Choices, Tensor]:
    """The choices of all ranks' tokens, padding included, in the same order in every layout.

    Samples come in the order of the ranks, which is that of the global batch.

    Args:
        choices: choices of this rank's N routed tokens.
        index: (N,) int64, indices of the routed tokens among the B*T; None if all are routed.
        shape: B and T, the same on every rank.
        time_major: whether all tokens of a position, over all samples, come before the next one.
        comm: module that has all_gather_into_tensor.

    Returns:
        Choices of W*B*T tokens, all unused for tokens that are not routed, and (N,) int64, the
        rows of this rank's routed tokens among them.
    """
    experts, used, priority = choices
    num_samples, num_positions = shape
    # One int32 row per token: K experts (-1: unused) and, if there is one, the priority's bits.
    columns = experts.int() if used is None else experts.int().where(used, -1)  # (N, K)
    if priority is not None:
        columns = torch.cat([columns, priority.unsqueeze(-1).view(torch.int32)], dim=-1)
    if index is not None:
        all_tokens = columns.new_full((shape.numel(), columns.size(-1)), -1)
        columns = all_tokens.index_copy(0, index, columns)  # (B*T, K or K + 1)
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
    all_experts = gathered[:, : experts.size(1)].long()  # (W*B*T, K)
    return (
        Choices(
            all_experts.clamp(min=0),
            all_experts >= 0,
            None if priority is None else gathered[:, -1].contiguous().view(torch.float32),
        ),
        rows,
    )


class Assignments(NamedTuple):
    """The kept assignments in the order in which they are dispatched.

    Attributes:
        order: (A,) int64, choice-major numbers of the assignments, sorted by expert.
        counts: (E,) int64, kept assignments of each expert; they sum to A.
    """

    order: Tensor
    counts: Tensor


def sort_assignments(experts: Tensor, num_experts: int, kept: Tensor | None) -> Assignments:
    """Sort the kept ones of (N, K) choices by expert; within an expert they stay choice-major.

    Kept (N, K) is False for a choice that is unused or dropped; None if all are kept.
    """
    expert_of = experts.t().reshape(-1)  # (K*N,), choice-major
    if kept is None:
        expert_of, order = expert_of.sort(stable=True)  # (A,), (A,)
    else:
        order = kept.t().reshape(-1).nonzero().squeeze(-1)  # (A,)
        expert_of, by_expert = expert_of[order].sort(stable=True)
        order = order[by_expert]  # (A,)
    return Assignments(order, _starts(expert_of, num_experts).diff())


class GatherTokens(torch.autograd.Function):
    """The row of each assignment's token, with a backward that gives the same bits in every run.

    On a GPU index_select's own backward adds with atomics: from K = 3 on, the order of the sum and
    so its last bits change. Here a token's K gradients are added in a fixed order.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, order: Tensor, top_k: int) -> Tensor:
        """(N, D) and (A,) int64, see Assignments -> (A, D)."""
        ctx.save_for_backward(order)
        ctx.top_k, ctx.num_tokens = top_k, h.size(0)
        return h.index_select(0, order % max(1, h.size(0)))  # k*N + n -> token n

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """(A, D) -> (N, D)."""
        (order,) = ctx.saved_tensors
        slots = grad.new_zeros(ctx.top_k * ctx.num_tokens, grad.size(1)).index_copy(0, order, grad)
        return slots.unflatten(0, (ctx.top_k, ctx.num_tokens)).sum(0), None, None  # (N, D)
