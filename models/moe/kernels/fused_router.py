"""From a router's scores to its decision and its statistics, in one kernel each way.

Letters: N tokens, E experts, K top_k, B blocks of BLOCK_TOKENS tokens.

    scores (N, E) -> experts (N, K), weights (N, K), and sums over the tokens

The kernels compute what models.moe.router.route does with second_expert "all", and the sums of
models.moe.router.RoutingStats. They use float32 and no atomic additions: each block of tokens
writes its own sums, which are added in a fixed order, so two runs give the same bits.
"""

# Triton evaluates the annotations of a kernel's arguments and knows none for pointers.
# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from magnetar.models.kernels import MAX_EXPERTS, MAX_TOP_K
from magnetar.models.moe.router import Routing, RoutingStats

# Tokens of a program, and of a block of the counting sort. It is a constant and not found by
# timing, so the order of the sums and their last bits never depend on how busy a machine is.
BLOCK_TOKENS = 32
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_LOWEST = tl.constexpr(-(2**63))


@triton.jit
def _scores(x, tau, is_expert, HAS_TAU: tl.constexpr):
    """Scores / tau; -inf past the last expert. div_rn rounds as torch does, which keeps ties."""
    scores = tl.div_rn(x, tau) if HAS_TAU else x
    return tl.where(is_expert[None, :], scores, float("-inf"))


@triton.jit
def _softmax(scores):
    """The softmax of rows, their largest scores, and sums of powers relative to those."""
    peak = tl.max(scores, 1)
    powers = tl.exp(scores - peak[:, None])
    total = tl.sum(powers, 1)
    return powers / total[:, None], peak, total


@triton.jit
def _gate(scores, peak, total, SIGMOID: tl.constexpr):
    """The weights of chosen experts from their scores, not yet normalized."""
    if SIGMOID:
        return tl.sigmoid(scores)
    else:
        return tl.exp(scores - peak[:, None]) / total[:, None]


@triton.jit
def _temperature(tau, lowest, HAS_TAU: tl.constexpr):
    if HAS_TAU:
        read = tl.load(tau).to(tl.float32)
        return tl.where(read < lowest, lowest, read)  # a NaN stays one
    else:
        return 1.0


@triton.jit
def _ordered(scores, column, is_expert, BLOCK_E: tl.constexpr):
    """Distinct int64 that sort as the experts are chosen; the lowest one past the last expert.

    The upper half is the bits of the score, changed so that integers compare as the floats do, with
    -0 as 0 and NaN above all, as in torch.topk. The lower half prefers the lower index.
    """
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bits = tl.where(scores != scores, 0x7FFFFFFF, bits)
    keys = (bits.to(tl.int64) << 32) | (BLOCK_E - 1 - column)[None, :].to(tl.int64)
    return tl.where(is_expert[None, :], keys, _LOWEST)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _forward_kernel(
    raw,
    tau,
    experts,
    weights,
    first_probs,
    partial,
    histogram,
    num_tokens,
    num_blocks,
    inverse_balance_temperature,
    lowest_temperature,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_TAU: tl.constexpr,
    SAME: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    first = block * TOKENS
    column = tl.arange(0, BLOCK_E)
    choice = tl.arange(0, BLOCK_K)
    is_expert = column < E
    temperature = _temperature(tau, lowest_temperature, HAS_TAU)
    # The low 16 bits count assignments, the high 16 bits first choices: a block has few of both.
    named = tl.zeros([ROWS, BLOCK_E], tl.int32)
    sum_probs = tl.zeros([ROWS, BLOCK_E], tl.float32)
    sum_entropy = tl.zeros([ROWS], tl.float32)
    sum_log_z_squared = tl.zeros([ROWS], tl.float32)
    for start in range(0, TOKENS, ROWS):
        row = start + tl.arange(0, ROWS)
        is_row = first + row < num_tokens
        mask = is_row[:, None] & is_expert[None, :]
        at = row[:, None] * E + column[None, :]
        x = tl.load(raw + first * E + at, mask=mask, other=0.0)
        scores = _scores(x, temperature, is_expert, HAS_TAU)
        probs, peak, total = _softmax(scores)
        log_total = tl.log(total)
        log_probs = (scores - peak[:, None]) - log_total[:, None]
        entropy = -tl.sum(probs * tl.where(is_expert[None, :], log_probs, 0.0), 1)
        sum_entropy += tl.where(is_row, entropy, 0.0)
        log_z = peak + log_total
        sum_log_z_squared += tl.where(is_row, log_z * log_z, 0.0)
        if not SAME:
            scaled = tl.where(is_expert[None, :], x * inverse_balance_temperature, float("-inf"))
            probs, _, _ = _softmax(scaled)
        sum_probs += tl.where(mask, probs, 0.0)

        keys = _ordered(scores, column, is_expert, BLOCK_E)
        chosen = tl.zeros([ROWS, BLOCK_K], tl.int32)
        chosen_bits = tl.zeros([ROWS, BLOCK_K], tl.int32)
        for k in tl.static_range(K):
            best = tl.max(keys, 1)
            is_best = keys == best[:, None]
            increment = 65537 if k == 0 else 1
            named += tl.where(is_best & mask, increment, 0)
            keys = tl.where(is_best, _LOWEST, keys)
            index = BLOCK_E - 1 - (best & 0xFFFFFFFF).to(tl.int32)
            chosen = tl.where(choice[None, :] == k, index[:, None], chosen)
            bits = (best >> 32).to(tl.int32)
            chosen_bits = tl.where(choice[None, :] == k, bits[:, None], chosen_bits)
        chosen_bits = chosen_bits ^ ((chosen_bits >> 31) & 0x7FFFFFFF)
        chosen_scores = chosen_bits.to(tl.float32, bitcast=True)
        weight = _gate(chosen_scores, peak, total, SIGMOID)
        if NORMALIZE:
            sum_weights = tl.sum(tl.where(choice[None, :] < K, weight, 0.0), 1)
            weight = weight / tl.where(sum_weights < _TINY, _TINY, sum_weights)[:, None]
        store_at = row[:, None] * K + choice[None, :]
        store_mask = is_row[:, None] & (choice < K)[None, :]
        tl.store(experts + first * K + store_at, chosen, mask=store_mask)
        tl.store(weights + first * K + store_at, weight, mask=store_mask)
        tl.store(first_probs + first + row, 1.0 / total, mask=is_row)
    sums = partial + block * (E + 2)
    tl.store(sums + column, tl.sum(sum_probs, 0), mask=is_expert)
    tl.store(sums + E, tl.sum(sum_entropy, 0))
    tl.store(sums + E + 1, tl.sum(sum_log_z_squared, 0))
    counts = tl.sum(named, 0)
    bin_at = column.to(tl.int64) * num_blocks + block
    tl.store(histogram + bin_at, counts & 0xFFFF, mask=is_expert)
    tl.store(histogram + bin_at + E * num_blocks.to(tl.int64), counts >> 16, mask=is_expert)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    raw,
    tau,
    experts,
    grad_weights,
    grad_probs,
    grad_log_z_squared,
    grad_raw,
    partial_tau,
    num_tokens,
    inverse_balance_temperature,
    lowest_temperature,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_TAU: tl.constexpr,
    SAME: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OF_WEIGHTS: tl.constexpr,
    OF_PROBS: tl.constexpr,
    OF_LOG_Z: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    first = block * TOKENS
    column = tl.arange(0, BLOCK_E)
    choice = tl.arange(0, BLOCK_K)
    is_expert = column < E
    temperature = _temperature(tau, lowest_temperature, HAS_TAU)
    sum_tau = tl.zeros([ROWS], tl.float32)
    if OF_PROBS:
        of_probs = tl.load(grad_probs + column, mask=is_expert, other=0.0)
    if OF_LOG_Z:
        of_log_z_squared = tl.load(grad_log_z_squared)
    for start in range(0, TOKENS, ROWS):
        row = start + tl.arange(0, ROWS)
        is_row = first + row < num_tokens
        mask = is_row[:, None] & is_expert[None, :]
        at = row[:, None] * E + column[None, :]
        x = tl.load(raw + first * E + at, mask=mask, other=0.0)
        scores = _scores(x, temperature, is_expert, HAS_TAU)
        probs, peak, total = _softmax(scores)
        grad = tl.zeros([ROWS, BLOCK_E], tl.float32)  # gradient of the scores
        if OF_LOG_Z:
            log_z = peak + tl.log(total)
            grad += (2.0 * of_log_z_squared * log_z)[:, None] * probs
        if OF_WEIGHTS:
            load_at = row[:, None] * K + choice[None, :]
            is_choice = is_row[:, None] & (choice < K)[None, :]
            of_weight = tl.load(grad_weights + first * K + load_at, mask=is_choice, other=0.0)
            index = tl.load(experts + first * K + load_at, mask=is_choice, other=0)
            its_raw = tl.load(raw + (first + row)[:, None] * E + index, mask=is_choice, other=0.0)
            its_score = tl.div_rn(its_raw, temperature) if HAS_TAU else its_raw
            gate = _gate(its_score, peak, total, SIGMOID)
            weight = gate
            if NORMALIZE:
                sum_gate = tl.sum(tl.where(is_choice, gate, 0.0), 1)
                weight = gate / tl.where(sum_gate < _TINY, _TINY, sum_gate)[:, None]
                mean = tl.sum(tl.where(is_choice, of_weight * weight, 0.0), 1)
                # Where the sum was too small to divide by, the divisor is a constant.
                of_weight -= tl.where(sum_gate < _TINY, 0.0, mean)[:, None]
            # d weight / d score = weight * d log(gate) / d score.
            of_score = of_weight * weight
            if SIGMOID:
                of_score *= tl.sigmoid(-its_score)  # 1 - gate, which would cancel
            elif not NORMALIZE:
                # The softmax's denominator; normalized weights do not depend on it.
                of_total = tl.sum(tl.where(is_choice, of_score, 0.0), 1)
                grad -= of_total[:, None] * probs
            for k in tl.static_range(K):
                this = is_choice & (choice[None, :] == k)
                its_index = tl.sum(tl.where(this, index, 0), 1)
                its_grad = tl.sum(tl.where(this, of_score, 0.0), 1)
                is_its = column[None, :] == its_index[:, None]
                grad += tl.where(is_its, its_grad[:, None], 0.0)
        if HAS_TAU:
            sum_tau += tl.sum(grad * tl.where(mask, scores, 0.0), 1)
            grad = grad / temperature
        if OF_PROBS:
            if SAME:
                balance = probs
                scale = 1.0
            else:
                scale = inverse_balance_temperature
                scaled = tl.where(is_expert[None, :], x * scale, float("-inf"))
                balance, _, _ = _softmax(scaled)
            mean_of_probs = tl.sum(balance * of_probs[None, :], 1)
            grad += scale * balance * (of_probs[None, :] - mean_of_probs[:, None])
        tl.store(grad_raw + first * E + at, grad, mask=mask)
    if HAS_TAU:
        tl.store(partial_tau + block, -tl.sum(sum_tau, 0) / temperature)


def num_blocks_of(num_tokens: int) -> int:
    """The number of blocks, at least 1: without tokens one program still writes sums of 0."""
    return max(1, triton.cdiv(num_tokens, BLOCK_TOKENS))


class _Route(torch.autograd.Function):
    """`fused_route`; the backward pass keeps the scores, tau and the chosen experts."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        tau: Tensor | None,
        top_k: int,
        gate: str,
        normalize: bool,
        balance_temperature: float,
        lowest_temperature: float,
    ) -> tuple[Tensor, ...]:
        scores = scores.contiguous()
        num_tokens, num_experts = scores.shape
        num_blocks = num_blocks_of(num_tokens)
        experts = torch.empty(num_tokens, top_k, dtype=torch.int32, device=scores.device)
        weights = scores.new_empty(num_tokens, top_k)
        first_probs = scores.new_empty(num_tokens)
        partial = scores.new_empty(num_blocks, num_experts + 2)
        histogram = experts.new_empty(2, num_experts, num_blocks)
        # About 1,024 scores at a time, 8 per thread, and each row in one warp.
        columns = triton.next_power_of_2(num_experts)
        rows = max(4, min(BLOCK_TOKENS, 1024 // columns))
        options = {
            "E": num_experts,
            "BLOCK_E": columns,
            "K": top_k,
            "BLOCK_K": triton.next_power_of_2(top_k),
            "HAS_TAU": tau is not None,
            "SAME": tau is None and balance_temperature == 1.0,
            "SIGMOID": gate == "sigmoid",
            "NORMALIZE": normalize and top_k > 1,
            "TOKENS": BLOCK_TOKENS,
            "ROWS": rows,
            "num_warps": max(1, min(4, rows * columns // 256)),
        }
        temperatures = (1.0 / balance_temperature, lowest_temperature)
        outputs = (experts, weights, first_probs, partial, histogram)
        _forward_kernel[(num_blocks,)](
            scores, tau, *outputs, num_tokens, num_blocks, *temperatures, **options
        )
        sums = partial.sum(0)
        probs, entropy, log_z_squared = sums[:num_experts], sums[-2], sums[-1]
        counts = (*histogram.sum(-1), histogram[0])  # int64, int64, int32
        ctx.mark_non_differentiable(experts, first_probs, entropy, *counts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scores, tau, experts)
        ctx.options, ctx.temperatures = options, temperatures
        return experts, weights, first_probs, probs, entropy, log_z_squared, *counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        scores, tau, experts = ctx.saved_tensors
        # The weights', the probs' and log_z_squared's; the others have none.
        given = [None if grad is None else grad.contiguous() for grad in grads[1:6:2]]
        names = ("OF_WEIGHTS", "OF_PROBS", "OF_LOG_Z")
        options = {name: grad is not None for name, grad in zip(names, given, strict=True)}
        num_blocks = num_blocks_of(scores.size(0))
        grad_scores = torch.empty_like(scores)
        partial_tau = None if tau is None else scores.new_empty(num_blocks)
        tensors = (scores, tau, experts, *given, grad_scores, partial_tau)
        _backward_kernel[(num_blocks,)](
            *tensors, scores.size(0), *ctx.temperatures, **options, **ctx.options
        )
        grad_tau = None
        if tau is not None and partial_tau is not None:
            grad_tau = partial_tau.sum().to(tau.dtype).view_as(tau)
        return grad_scores, grad_tau, None, None, None, None, None


def fused_route(
    scores: Tensor,
    top_k: int,
    gate: str,
    *,
    tau: Tensor | None = None,
    balance_temperature: float = 1.0,
    normalize: bool = True,
    lowest_temperature: float = 0.0,
) -> Routing:
    """Choose the top_k experts of every token by score / tau; of equal scores the lower index.

    Args:
        scores: (N, E) float32, cosines or W h, not yet divided by a temperature.
        top_k: experts per token, up to MAX_TOP_K.
        gate: "softmax" or "sigmoid", see models.moe.router.route.
        tau: () or (1,), temperature of the gate, read as max(tau, lowest_temperature) with a
            gradient that passes straight through; None: 1.
        balance_temperature: temperature of the distributions in the balance loss.
        normalize: whether the weights of a token sum to 1, if top_k > 1.
        lowest_temperature: smallest temperature of the gate.
    """
    num_experts = scores.size(1)
    assert scores.dtype == torch.float32
    assert 1 <= top_k <= min(MAX_TOP_K, num_experts)
    assert num_experts <= MAX_EXPERTS
    experts, weights, first_probs, probs, entropy, log_z_squared, load, first_choices, counts = (
        _Route.apply(scores, tau, top_k, gate, normalize, balance_temperature, lowest_temperature)
    )
    stats = RoutingStats(
        probs=probs,
        first_choices=first_choices,
        entropy=entropy,
        log_z_squared=log_z_squared,
        load=load.float(),
        dropped=torch.zeros_like(entropy),
        temperature=scores.new_ones(()) if tau is None else tau.detach().squeeze().clone(),
    )
    return Routing(experts, weights, None, first_probs, load, stats, counts)
