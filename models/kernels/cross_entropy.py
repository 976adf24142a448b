"""Softmax and cross entropy of logits, and their gradients in place: two passes over memory.

Letters: C tokens of a chunk, V vocab_size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096  # columns of a row at a time


@triton.jit
def _cross_entropy_kernel(
    logits,
    targets,
    counted,
    log_z,
    target_logits,
    mean_logits,
    V,
    z_weight,
    label_smoothing,
    scale,
    SMOOTHS: tl.constexpr,
    GRADIENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    of_row = logits + row * V
    column = tl.arange(0, COLUMNS)
    target = tl.load(targets + row)
    target_logit = tl.load(of_row + target).to(tl.float32)
    # Each lane keeps its own largest logit, and a sum relative to it (online softmax).
    tops = tl.full([COLUMNS], -1e30, tl.float32)
    totals = tl.zeros([COLUMNS], tl.float32)
    sums = tl.zeros([COLUMNS], tl.float32)
    first = 0
    while first < V:
        mask = first + column < V
        x = tl.load(of_row + first + column, mask=mask, other=float("-inf")).to(tl.float32)
        if SMOOTHS:
            sums += tl.where(mask, x, 0.0)
        new_tops = tl.maximum(tops, x)
        totals = totals * tl.exp(tops - new_tops) + tl.exp(x - new_tops)
        tops = new_tops
        first += COLUMNS
    top = tl.max(tops, 0)
    total = tl.sum(totals * tl.exp(tops - top), 0)
    z = top + tl.log(total)
    tl.store(log_z + row, z)
    tl.store(target_logits + row, target_logit)
    tl.store(mean_logits + row, tl.sum(sums, 0) / V)
    if GRADIENTS:
        weight = tl.load(counted + row).to(tl.float32)
        factor = (1.0 + 2.0 * z_weight * z) * scale
        everywhere = label_smoothing / V * scale
        # Only the difference is rounded to the logits' dtype, not its terms.
        at_target = factor * (tl.exp(target_logit - top) / total) - (1.0 - label_smoothing) * scale
        at_target = (at_target - everywhere) * weight
        everywhere *= weight
        factor = factor / total * weight
        first = 0
        while first < V:
            mask = first + column < V
            x = tl.load(of_row + first + column, mask=mask, other=0.0).to(tl.float32)
            grad = tl.exp(x - top) * factor
            if SMOOTHS:
                grad -= everywhere
            grad = tl.where(first + column == target, at_target, grad)
            tl.store(of_row + first + column, grad.to(logits.dtype.element_ty), mask=mask)
            first += COLUMNS


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    counted: Tensor,
    z_weight: float,
    label_smoothing: float,
    scale: float,
    has_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax of a chunk's logits, and with has_gradients their gradients in place.

    Args:
        logits: (C, V), contiguous. With has_gradients they are replaced by scale times the gradient
            of the smoothed cross entropy + z_weight * log^2 Z, which is 0 for tokens that do not
            count.
        targets: (C,) int64, from 0 to V - 1, also for tokens that do not count.
        counted: (C,) bool, whether a token counts.
        z_weight: weight of log^2 Z.
        label_smoothing: eps, see `models.losses.token_losses`.
        scale: factor of the gradients.
        has_gradients: whether to compute the gradients.

    Returns:
        log Z (C,), the targets' logits (C,) and the mean logits (C,), float32. The mean logits are
        0 without label smoothing.
    """
    log_z, target_logits, mean_logits = torch.empty(3, len(logits), device=logits.device).unbind()
    _cross_entropy_kernel[(len(logits),)](
        logits,
        targets,
        counted,
        log_z,
        target_logits,
        mean_logits,
        logits.size(1),
        z_weight,
        label_smoothing,
        scale,
        SMOOTHS=label_smoothing > 0,
        GRADIENTS=has_gradients,
        COLUMNS=min(COLUMNS, triton.next_power_of_2(logits.size(1))),
        num_warps=8,
    )
    return log_z, target_logits, mean_logits
