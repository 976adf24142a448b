"""The losses of a language model's output, without the logits of the whole batch.

Logits are computed for a chunk of tokens at a time, and their gradients at once, in the same
memory. The backward pass keeps only what is as large as the hidden states and the output matrix.

Letters: B batch, T tokens, N = B*T, C tokens of a chunk, D d_model, V vocab_size.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from magnetar.models import kernels
from magnetar.models.layers.feed_forward import Linear

IGNORE_INDEX = -100

# Largest size of a chunk's logits in float32. On a GPU a chunk must fill the device, and each chunk
# costs a pass over the gradient of the output matrix. On a CPU a chunk should stay in the caches.
GPU_CHUNK_BYTES = 1024 * 2**20
CPU_CHUNK_BYTES = 4 * 2**20
TILE = 128
# Tokens. In smaller chunks the passes over the matrix cost more than those over the logits.
MIN_CHUNK = 2 * TILE

# fp16 gradients are stored times this factor, so that a probability of 2^-20 keeps all its digits.
# Sums over the vocabulary stay below fp16's largest number while the weights are below 512.
FP16_SCALE = 64.0


class TokenLosses(NamedTuple):
    """Sums over the targets that count. Only `total` has a gradient.

    Attributes:
        total: () float32, the minimised sum: smoothed cross entropy + z_weight * z_loss.
        cross_entropy: () float32, nats.
        z_loss: () float32, log^2 Z of the output logits (arXiv 2309.14322); 0 if z_weight is 0.
        num_tokens: () int64, number of targets that are not IGNORE_INDEX.
    """

    total: Tensor
    cross_entropy: Tensor
    z_loss: Tensor
    num_tokens: Tensor


class Output(Linear):
    """The output projection: the logits, or their losses.

    It computes the losses itself because sharded weights are collected when their module is called.
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        targets: Tensor | None = None,
        z_weight: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> Tensor | TokenLosses:
        """(B, T, D) -> (B, T, V), or with (B, T) int64 targets their `token_losses`."""
        if targets is None:
            return super().forward(x)
        return token_losses(x, self.weight, targets, z_weight, label_smoothing)


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_weight: float = 0.0,
    label_smoothing: float = 0.0,
) -> TokenLosses:
    """The losses of the logits hidden @ weight.T, summed over the tokens.

    Logits have the dtype of the inputs; softmax and sums are float32 (float64 for float64).

    Smoothing is that of Szegedy et al. (arXiv 1512.00567, eq. 7): in the total the cross entropy is
    (1 - eps) * -log p(target) + eps * the mean over the vocabulary of -log p, which is
    -log p(target) + eps * (the target's logit - the mean logit).

    Args:
        hidden: (B, T, D), any float dtype.
        weight: (V, D), the same dtype.
        targets: (B, T) int64; IGNORE_INDEX does not count.
        z_weight: weight of the z-loss in the total.
        label_smoothing: eps, from 0 to below 1.
    """
    has_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    counted = targets.flatten() != IGNORE_INDEX
    total, cross_entropy, z_loss = _LinearCrossEntropy.apply(
        hidden.flatten(0, 1),
        weight,
        targets.flatten(),
        counted,
        z_weight,
        label_smoothing,
        has_gradients,
    )
    return TokenLosses(total, cross_entropy, z_loss, counted.sum())


class _LinearCrossEntropy(torch.autograd.Function):
    """(total, cross_entropy, z_loss), each () float32, of flat tokens.

    The total is a scalar, so its upstream gradient is one number. The forward pass, which has the
    logits, computes the gradients, and the backward pass multiplies them by that number.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        counted: Tensor,
        z_weight: float,
        label_smoothing: float,
        has_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_z = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        target_logits, mean_logits = torch.empty_like(log_z), torch.empty_like(log_z)
        hidden_grad = weight_grad = None
        if has_gradients:
            hidden_grad = torch.empty_like(hidden)
            # float32, since chunks are added here, and in fp16 the sum over tokens could overflow.
            weight_grad = torch.zeros_like(weight, dtype=wide)
        ctx.scale = FP16_SCALE if hidden.dtype == torch.float16 else 1.0
        targets = targets.masked_fill(~counted, 0)
        chunk_len = _chunk_len(hidden, weight)
        softmax = _softmax
        if kernels.usable(hidden):
            # Imported here, since Triton is not installed everywhere.
            from magnetar.models.kernels.cross_entropy import cross_entropy as softmax
        all_logits = hidden.new_empty(chunk_len, len(weight))
        for first in range(0, len(hidden), chunk_len):
            chunk = slice(first, first + chunk_len)
            h = hidden[chunk]
            logits = all_logits[: len(h)]  # (C, V)
            torch.mm(h, weight.t(), out=logits)
            log_z[chunk], target_logits[chunk], mean_logits[chunk] = softmax(
                logits,
                targets[chunk],
                counted[chunk],
                z_weight,
                label_smoothing,
                ctx.scale,
                has_gradients,
            )
            if hidden_grad is not None and weight_grad is not None:
                torch.mm(logits, weight, out=hidden_grad[chunk])
                _add_product(weight_grad, logits.t(), h)
        total = cross_entropy = ((log_z - target_logits) * counted).sum()
        if label_smoothing:
            total = total + label_smoothing * ((target_logits - mean_logits) * counted).sum()
        z_loss = torch.zeros_like(cross_entropy)
        if z_weight:
            z_loss = (log_z.square() * counted).sum()
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(cross_entropy, z_loss)
        return total + z_weight * z_loss, cross_entropy, z_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        # A (1, 1) float32 tensor makes torch multiply in float32. A Python number or a () tensor
        # would take the gradients' dtype: fp16 cannot hold a loss scale, and bf16 would round it.
        factor = (upstream / ctx.scale).view(1, 1)
        return (
            torch.mul(hidden_grad, factor, out=torch.empty_like(hidden_grad)),
            torch.mul(weight_grad, factor, out=torch.empty_like(weight_grad, dtype=ctx.dtype)),
            *(None,) * 5,
        )


def _softmax(
    logits: Tensor,
    targets: Tensor,
    counted: Tensor,
    z_weight: float,
    label_smoothing: float,
    scale: float,
    has_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `models.kernels.cross_entropy.cross_entropy`, which needs fewer passes over memory."""
    targets, counted = targets.unsqueeze(-1), counted.unsqueeze(-1)  # (C, 1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    target_logits = logits.gather(1, targets).to(wide)
    mean_logits = torch.zeros_like(target_logits)
    if label_smoothing:
        mean_logits = logits.mean(-1, keepdim=True, dtype=wide)
    top = logits.amax(-1, keepdim=True).to(wide)
    probs = logits if wide == logits.dtype else torch.empty_like(logits, dtype=wide)
    total = torch.sub(logits, top, out=probs).exp_().sum(-1, keepdim=True)
    log_z = top + total.log()
    if has_gradients:
        # Gradient: probabilities times a factor of the row, minus 1 - eps at the target, minus
        # eps / V everywhere. Only the difference is rounded to the logits' dtype, not its terms.
        everywhere = label_smoothing / logits.size(1) * scale
        factor = (1.0 + 2.0 * z_weight * log_z) * scale
        at_target = factor * (target_logits - log_z).exp() - (1.0 - label_smoothing) * scale
        at_target = (at_target - everywhere) * counted
        if label_smoothing:
            probs.mul_(factor / total * counted)
            torch.sub(probs, everywhere * counted.to(wide), out=logits)
        else:
            torch.mul(probs, factor / total * counted, out=logits)
        logits.scatter_(1, targets, at_target.to(logits.dtype))
    return log_z.squeeze(-1), target_logits.squeeze(-1), mean_logits.squeeze(-1)


def _chunk_len(hidden: Tensor, weight: Tensor) -> int:
    """Tokens per chunk: a multiple of a matmul's tile, equal in all chunks but the last."""
    num_bytes = CPU_CHUNK_BYTES if hidden.device.type == "cpu" else GPU_CHUNK_BYTES
    largest = max(MIN_CHUNK, num_bytes // (4 * len(weight)))
    num_chunks = math.ceil(len(hidden) / largest)
    return min(len(hidden), math.ceil(len(hidden) / num_chunks / TILE) * TILE)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; the product of low-precision matrices is summed in total's float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
