"""The gradient of an embedding, without waiting for the device.

PyTorch's backward pass reads the number of different tokens back to the host. Here tokens are
sorted, and one program for each row of the table sums that row's gradients in the order of the
tokens' positions.

Letters: N tokens, V vocab_size, D d_model.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 8  # gradients that a program adds at a time


@triton.jit
def _gradient_kernel(
    grad,
    order,
    ends,
    out,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < D
    first = tl.load(ends + token - 1, mask=token > 0, other=0)
    end = tl.load(ends + token)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    while first < end:
        index = first + tl.arange(0, ROWS)
        position = tl.load(order + index, mask=index < end, other=0)
        mask = (index < end)[:, None] & is_column[None, :]
        at = grad + position[:, None] * D + column[None, :]
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        first += ROWS
    at = out + token.to(tl.int64) * D + column
    tl.store(at, tl.sum(total, 0).to(out.dtype.element_ty), mask=is_column)


class EmbedTokens(torch.autograd.Function):
    """Rows of a table; the backward sums a token's gradients in float32 and in a fixed order."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        """(V, D) and int64 tokens of any shape -> (..., D)."""
        ctx.save_for_backward(tokens)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return torch.nn.functional.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """(..., D) -> (V, D)."""
        (tokens,) = ctx.saved_tensors
        vocab_size, d_model = ctx.shape
        sorted_tokens, order = tokens.flatten().sort(stable=True)  # (N,), (N,)
        vocabulary = torch.arange(vocab_size, device=tokens.device)
        ends = torch.searchsorted(sorted_tokens, vocabulary, right=True, out_int32=True)  # (V,)
        out = grad.new_empty(vocab_size, d_model, dtype=ctx.dtype)
        columns = min(1024, triton.next_power_of_2(d_model))
        _gradient_kernel[(vocab_size, triton.cdiv(d_model, columns))](
            grad.contiguous(), order, ends, out, d_model, ROWS=ROWS, COLUMNS=columns
        )
        return out, None
