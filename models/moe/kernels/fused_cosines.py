"""The X-MoE router's scores: cosines of the projected tokens and the experts' centroids.

Letters: N tokens, D d_model, R d_router, E experts.

    p = h W^T,  cosines = p / ||p||  .  c / ||c||       (arXiv 2204.09179, eq. 6)

The results are float32, without a float32 copy of the bf16 tokens. A float32 weight is exactly the
sum of three bf16 numbers. A tensor core multiplies each of them with a bf16 token exactly, so only
the sum is rounded, in float32. A bf16 weight needs one such number.
"""

# Triton evaluates the annotations of a kernel's arguments and knows none for pointers.
# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_D_ROUTER = 256
_BLOCK_TOKENS = 64  # the rows of one warpgroup's matrix instruction
_EPS = tl.constexpr(1e-12)  # F.normalize's own


@triton.jit
def _unit_rows(x):
    """Rows of x / max(length, eps), and their lengths."""
    length = tl.sqrt_rn(tl.sum(x * x, 1))
    return x / tl.maximum(length, _EPS)[:, None], length


@triton.jit
def _directions(centroids, expert, column, R: tl.constexpr, E: tl.constexpr):
    """Unit vectors of some experts' centroids."""
    at = centroids + expert[:, None] * R + column[None, :]
    mask = (expert < E)[:, None] & (column < R)[None, :]
    directions, _ = _unit_rows(tl.load(at, mask=mask, other=0.0).to(tl.float32))
    return directions


@triton.jit
def _through_unit_rows(grad, unit, length):
    """Gradient of x from that of `_unit_rows(x)`; below eps the divisor is a constant."""
    along = tl.where(length < _EPS, 0.0, tl.sum(grad * unit, 1))
    return (grad - unit * along[:, None]) / tl.maximum(length, _EPS)[:, None]


@triton.jit
def _dot(a, b, total, INTERPRETED: tl.constexpr):
    """total + a b of bf16; Triton's interpreter would multiply their bits as integers."""
    if INTERPRETED:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, total)


@triton.jit
def _split_kernel(x, parts, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(x + at, mask=at < size, other=0.0)
    for part in tl.static_range(PARTS):
        rounded = rest.to(tl.bfloat16)
        tl.store(parts + part * size + at, rounded, mask=at < size)
        rest -= rounded.to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    h,
    parts,
    centroids,
    units,
    lengths,
    cosines,
    num_tokens,
    D: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token = (token < num_tokens)[:, None]
    column = tl.arange(0, BLOCK_R)
    is_column = column < R
    projected = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for start in range(0, D, BLOCK_D):
        inner = start + tl.arange(0, BLOCK_D)
        is_inner = inner < D
        h_at = h + token[:, None] * D + inner[None, :]
        h_tile = tl.load(h_at, mask=is_token & is_inner[None, :], other=0.0)
        w_at = parts + column[None, :] * D + inner[:, None]
        for part in tl.static_range(PARTS):
            w_mask = is_column[None, :] & is_inner[:, None]
            w_tile = tl.load(w_at + part * R * D, mask=w_mask, other=0.0)
            projected = _dot(h_tile, w_tile, projected, INTERPRETED)
    unit = projected
    if NORMALIZE:
        unit, length = _unit_rows(projected)
        tl.store(lengths + token, length, mask=token < num_tokens)
    tl.store(units + token[:, None] * R + column[None, :], unit, mask=is_token & is_column[None, :])
    for start in range(0, E, BLOCK_E):
        expert = start + tl.arange(0, BLOCK_E)
        is_expert = expert < E
        directions = _directions(centroids, expert, column, R, E)
        # Three tf32 products: an error of some 2^-22, float32's own, at a tensor core's speed;
        # "ieee" would multiply outside of them, some five times as long.
        products = tl.dot(unit, tl.trans(directions), input_precision="tf32x3")
        tl.store(
            cosines + token[:, None] * E + expert[None, :],
            products,
            mask=is_token & is_expert[None, :],
        )


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    grad,
    parts,
    centroids,
    units,
    lengths,
    grad_projected,
    grad_h,
    num_tokens,
    D: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    GRAD_PARTS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OF_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token = (token < num_tokens)[:, None]
    column = tl.arange(0, BLOCK_R)
    is_column = column < R
    mask = is_token & is_column[None, :]
    of_unit = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for start in range(0, E, BLOCK_E):
        expert = start + tl.arange(0, BLOCK_E)
        is_expert = expert < E
        directions = _directions(centroids, expert, column, R, E)
        grad_at = grad + token[:, None] * E + expert[None, :]
        of_cosines = tl.load(grad_at, mask=is_token & is_expert[None, :], other=0.0)
        of_unit = tl.dot(of_cosines, directions, of_unit, input_precision="tf32x3")
    rest = of_unit
    if NORMALIZE:
        unit = tl.load(units + token[:, None] * R + column[None, :], mask=mask, other=0.0)
        length = tl.load(lengths + token, mask=token < num_tokens, other=1.0)
        rest = _through_unit_rows(of_unit, unit, length)
    p_at = grad_projected + token[:, None] * (GRAD_PARTS * R) + column[None, :]
    high = rest.to(tl.bfloat16)
    tl.store(p_at, high, mask=mask)
    rest -= high.to(tl.float32)
    low = rest.to(tl.bfloat16)
    tl.store(p_at + R, low, mask=mask)
    if GRAD_PARTS == 3:
        rest -= low.to(tl.float32)
        tl.store(p_at + 2 * R, rest.to(tl.bfloat16), mask=mask)
    if OF_H:
        # Rounded to bf16 in the end: products below 2^-16 of the largest do not show.
        for start in range(0, D, BLOCK_D):
            inner = start + tl.arange(0, BLOCK_D)
            is_inner = inner < D
            w_at = parts + column[:, None] * D + inner[None, :]
            w_mask = is_column[:, None] & is_inner[None, :]
            w_tile = tl.load(w_at, mask=w_mask, other=0.0)
            of_tokens = _dot(low, w_tile, tl.zeros([BLOCK_N, BLOCK_D], tl.float32), INTERPRETED)
            if PARTS > 1:
                w_low = tl.load(w_at + R * D, mask=w_mask, other=0.0)
                of_tokens = _dot(high, w_low, of_tokens, INTERPRETED)
            of_tokens = _dot(high, w_tile, of_tokens, INTERPRETED)
            h_at = grad_h + token[:, None] * D + inner[None, :]
            tl.store(h_at, of_tokens.to(tl.bfloat16), mask=is_token & is_inner[None, :])


@triton.jit
def _centroids_kernel(
    grad, centroids, grad_centroids, R: tl.constexpr, E: tl.constexpr, BLOCK_R: tl.constexpr
):
    expert = tl.program_id(0) * 4 + tl.arange(0, 4)
    column = tl.arange(0, BLOCK_R)
    at = expert[:, None] * R + column[None, :]
    mask = (expert < E)[:, None] & (column < R)[None, :]
    direction, length = _unit_rows(tl.load(centroids + at, mask=mask, other=0.0).to(tl.float32))
    of_direction = tl.load(grad + at, mask=mask, other=0.0)
    of_centroid = _through_unit_rows(of_direction, direction, length)
    tl.store(grad_centroids + at, of_centroid.to(grad_centroids.dtype.element_ty), mask=mask)


def _bf16_parts(weight: Tensor) -> Tensor:
    """(R, D) float32 or bf16 -> (3 or 1, R, D) bf16, which sum to it."""
    if weight.dtype == torch.bfloat16:
        return weight.contiguous().unsqueeze(0)
    parts = torch.empty(3, *weight.shape, dtype=torch.bfloat16, device=weight.device)
    size, block = weight.numel(), 1024
    _split_kernel[(triton.cdiv(size, block),)](
        weight.contiguous(), parts, size, PARTS=3, BLOCK=block
    )
    return parts


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """Two bf16 matrices -> their product in float32."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class _Cosines(torch.autograd.Function):
    """`fused_cosines`; the backward pass keeps h, W's parts, unit vectors and lengths."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, centroids: Tensor, normalize_tokens: bool
    ) -> Tensor:
        h, centroids = h.contiguous(), centroids.contiguous()
        (num_tokens, d_model), (num_experts, d_router) = h.shape, centroids.shape
        parts = _bf16_parts(weight)
        units = h.new_empty(num_tokens, d_router, dtype=torch.float32)
        lengths = h.new_empty(num_tokens if normalize_tokens else 0, dtype=torch.float32)
        cosines = h.new_empty(num_tokens, num_experts, dtype=torch.float32)
        num_parts = parts.size(0)
        options = {
            "D": d_model,
            "R": d_router,
            "E": num_experts,
            "PARTS": num_parts,
            "NORMALIZE": normalize_tokens,
            "BLOCK_N": _BLOCK_TOKENS,
            "BLOCK_R": max(16, triton.next_power_of_2(d_router)),
            "BLOCK_E": max(16, min(32, triton.next_power_of_2(num_experts))),
            "BLOCK_D": 64,
            "INTERPRETED": not h.is_cuda,
            "num_warps": 4 if d_router <= 64 else 8,
            "num_stages": 3 if num_parts == 1 else 2,
        }
        if num_tokens:
            _forward_kernel[(triton.cdiv(num_tokens, _BLOCK_TOKENS),)](
                h, parts, centroids, units, lengths, cosines, num_tokens, **options
            )
        ctx.save_for_backward(h, parts, centroids, units, lengths)
        ctx.options, ctx.weight_dtype = options, weight.dtype
        return cosines

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, parts, centroids, units, lengths = ctx.saved_tensors
        num_tokens, grad = h.size(0), grad.contiguous()
        of_h, of_weight, of_centroids, _ = ctx.needs_input_grad
        # A gradient that will be rounded to bf16 needs no third part.
        grad_parts = 3 if parts.size(0) == 3 else 2
        num_experts, d_router = centroids.shape
        grad_projected = h.new_empty(num_tokens, grad_parts * d_router)
        grad_h = torch.empty_like(h) if of_h else None
        if num_tokens and (of_h or of_weight):
            tensors = (grad, parts, centroids, units, lengths, grad_projected, grad_h)
            _backward_kernel[(triton.cdiv(num_tokens, _BLOCK_TOKENS),)](
                *tensors, num_tokens, GRAD_PARTS=grad_parts, OF_H=of_h, **ctx.options
            )
        grad_weight = grad_centroids = None
        if of_weight:
            products = _float32_product(grad_projected.t(), h)  # (grad_parts * R, D)
            grad_weight = products.unflatten(0, (grad_parts, d_router)).sum(0).to(ctx.weight_dtype)
        if of_centroids:
            grad_centroids = torch.empty_like(centroids)
            shape = {name: ctx.options[name] for name in ("R", "E", "BLOCK_R")}
            _centroids_kernel[(triton.cdiv(num_experts, 4),)](
                grad.t() @ units, centroids, grad_centroids, **shape
            )
        return grad_h, grad_weight, grad_centroids, None


def fused_cosines(
    h: Tensor, weight: Tensor, centroids: Tensor, *, normalize_tokens: bool = True
) -> Tensor:
    """XMoERouter.scores, (N, E) float32.

    Args:
        h: (N, D) bf16.
        weight: (R, D) float32 or bf16, the projection; R is up to MAX_D_ROUTER.
        centroids: (E, R) float32 or bf16.
        normalize_tokens: whether to divide by ||W h||.
    """
    assert h.dtype == torch.bfloat16
    assert {weight.dtype, centroids.dtype} <= {torch.float32, torch.bfloat16}
    assert centroids.size(1) <= MAX_D_ROUTER
    return _Cosines.apply(h, weight, centroids, normalize_tokens)
