"""The experts of one rank: stacked weights and grouped matmuls.

Letters: L local experts, D d_model, F d_ff, R rows (tokens sent to this rank's experts).

`Experts.forward` is the plain path; moe/kernels/expert_ffn.py has the kernel path.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magnetar.models import kernels
from magnetar.models.layers.feed_forward import ACTIVATIONS, GATED_ACTIVATIONS
from magnetar.models.layers.init import RandomSource
from magnetar.models.moe.all_to_all import AllToAll

# Those of moe/kernels/activation.py, which needs Triton.
_KERNEL_ACTIVATIONS = ("gelu", "relu", "swish")
PARAMETERS = ("w1", "b1", "w3", "b3", "norm_weight", "norm_bias", "w2", "b2")


class _ExpandRows(torch.autograd.Function):
    """rows[r] = table[segment of r], with a backward that sums each segment in a fixed order."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, segment_ids: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(segment_ids, counts)
        return table.index_select(0, segment_ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        segment_ids, counts = ctx.saved_tensors
        if grad.is_cuda:
            # On a GPU index_add_ adds with atomics, in another order in every run.
            sums = torch.segment_reduce(grad.float(), "sum", lengths=counts, initial=0.0)
            return sums.to(grad.dtype), None, None
        sums = grad.new_zeros(counts.numel(), grad.size(1))
        return sums.index_add_(0, segment_ids, grad), None, None


class Experts(nn.Module):
    """L feed-forward networks w2(LN(activation(w1 x + b1))) + b2, computed together.

    A gated activation has a third matrix: w2(LN(activation(w1 x + b1) * (w3 x + b3))) + b2.

    Parameters: w1 (L, D, F), b1 (L, F), w2 (L, F, D), b2 (L, D); with a gated activation w3
    (L, D, F), b3 (L, F); with an inner LayerNorm norm_weight (L, F), norm_bias (L, F). An RMSNorm
    has no norm_bias. Without `bias` there is none of b1, b2, b3 and norm_bias.

    A state dict holds one entry per expert, `deepspeed_experts.<i>.<parameter>`: the names
    under which DeepSpeed writes one file per expert.
    """

    def __init__(
        self,
        num_local_experts: int,
        d_model: int,
        d_ff: int,
        activation: str,
        inner_norm: bool,
        gain: float,
        norm_eps: float = 1e-5,
        activation_dropout: float = 0.0,
        norm_type: str = "layernorm",
        bias: bool = True,
    ) -> None:
        """Build the experts; see `FeedForward` for the arguments."""
        super().__init__()
        self.num_local_experts = num_local_experts
        self.gain = gain
        self.norm_eps = norm_eps
        self.activation_name = activation
        self.activation = ACTIVATIONS[activation]
        self.activation_dropout = activation_dropout
        self.gated = activation in GATED_ACTIVATIONS
        self.d_ff = d_ff
        self.inner_norm = inner_norm
        self.is_rms = norm_type == "rmsnorm"
        has_norm_bias = inner_norm and bias and not self.is_rms

        def stacked(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_local_experts, *shape))

        self.w1 = stacked(d_model, d_ff)
        self.b1 = stacked(d_ff) if bias else None
        self.w3 = stacked(d_model, d_ff) if self.gated else None
        self.b3 = stacked(d_ff) if self.gated and bias else None
        self.norm_weight = stacked(d_ff) if inner_norm else None
        self.norm_bias = stacked(d_ff) if has_norm_bias else None
        self.w2 = stacked(d_ff, d_model)
        self.b2 = stacked(d_model) if bias else None
        self._register_state_dict_hook(_split_experts)
        self.register_load_state_dict_pre_hook(_stack_experts)

    def init_weights(self, source: RandomSource, first_expert: int) -> None:
        """Xavier-normal with `gain`, drawn by global expert index; biases 0, norms 1 and 0."""
        matrices = ("w1", "w2", "w3") if self.gated else ("w1", "w2")
        for local in range(self.num_local_experts):
            for name in matrices:
                weight = getattr(self, name).data[local]
                source.xavier_normal_(weight, name, self.gain, expert=first_expert + local)
        for bias in (self.b1, self.b2, self.b3, self.norm_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    def uses_kernels(self, rows: Tensor) -> bool:
        """Whether the kernel path runs for rows of this device and dtype."""
        dropout = self.activation_dropout if self.training else 0.0
        has_kernels = kernels.usable(rows) and self._can_be_grouped(rows)
        has_parts = self.b2 is not None and not (self.inner_norm and self.is_rms)
        is_known = self.activation_name in _KERNEL_ACTIVATIONS
        return has_kernels and has_parts and is_known and dropout == 0

    def _can_be_grouped(self, rows: Tensor) -> bool:
        """Whether torch._grouped_mm takes them: rows of whole 16 bytes, and no float64."""
        size = rows.element_size()
        return size <= 4 and rows.size(1) * size % 16 == 0 and self.d_ff * size % 16 == 0

    def forward(
        self,
        rows: Tensor,
        counts: Tensor,
        offsets: Tensor | None = None,
        defer_bias: bool = False,
        all_to_all: AllToAll | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Apply each expert to its own rows.

        Args:
            rows: (R, D), sorted by expert; with all_to_all (A, D), this rank's tokens, sorted as
                models.moe.all_to_all says.
            counts: (L,) int64, rows of each expert; they sum to R. Not read with all_to_all.
            offsets: (L,) int32, end of each expert's rows; None computes it from counts.
            defer_bias: skip the output bias; the caller adds it when combining the weighted rows.
                Kernel path only.
            all_to_all: all-to-alls around the experts. They run in here because sharded
                weights are collected when their module is called. Kernel path only.

        Returns:
            (R, D); with defer_bias also the output biases (L, D); with all_to_all (A, D).
        """
        if self.uses_kernels(rows):
            return self._by_kernels(rows, counts, offsets, defer_bias, all_to_all)
        assert all_to_all is None
        assert not defer_bias
        if offsets is None:
            offsets = counts.cumsum(0).to(torch.int32)
        segment_ids = torch.repeat_interleave(counts, output_size=rows.size(0))  # (R,)

        # In decoding there are a few rows at a time, and the cost of the experts without rows
        # dominates: multiply only for those that have some. Rows that no grouped product takes are
        # multiplied expert by expert, too.
        is_few = not self.training and 0 < rows.size(0) < 8 * self.num_local_experts
        one_by_one = (is_few and not rows.is_cuda) or not self._can_be_grouped(rows)
        sizes = counts.tolist() if one_by_one else None

        def linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if sizes is None:
                out = torch._grouped_mm(h, weight, offs=offsets)
            else:
                segments = enumerate(h.split(sizes))
                out = torch.cat(
                    [own @ weight[e] for e, own in segments if own.size(0) or not is_few]
                )
            return out if bias is None else out + _ExpandRows.apply(bias, segment_ids, counts)

        h = self.activation(linear(rows, self.w1, self.b1))  # (R, F)
        if self.w3 is not None:
            h = h * linear(rows, self.w3, self.b3)  # (R, F)
        h = F.dropout(h, self.activation_dropout, self.training)
        w2: Tensor = self.w2
        b2: Tensor | None = self.b2
        weight, shift = self.norm_weight, self.norm_bias
        if weight is not None and self.num_local_experts == 1:
            # One expert has one norm, so nothing is folded: this is the dense network's norm.
            h = self._normalized(h, weight[0], None if shift is None else shift[0])
        elif weight is not None and is_few:
            h = self._normalized(h) * weight[segment_ids]  # (R, F)
            if shift is not None:
                h = h + shift[segment_ids]  # (R, F)
        elif weight is not None:
            # (LN(h) * g + c) w2 = LN(h) (g * w2) + c w2. Folding g and c into w2 and b2 touches
            # L*F*D numbers in place of R*F.
            h = self._normalized(h)
            if shift is not None:
                assert b2 is not None
                b2 = b2 + torch.bmm(shift.unsqueeze(1), w2).squeeze(1)  # (L, D)
            w2 = weight.unsqueeze(-1) * w2  # (L, F, D)
        return linear(h, w2, b2)  # (R, D)

    def _normalized(
        self, h: Tensor, weight: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """(R, F) -> (R, F), the inner norm with one expert's weight (F,) and bias (F,)."""
        if self.is_rms:
            return F.rms_norm(h, (self.d_ff,), weight, self.norm_eps)
        return F.layer_norm(h, (self.d_ff,), weight, shift, self.norm_eps)

    def _by_kernels(
        self,
        rows: Tensor,
        counts: Tensor,
        offsets: Tensor | None,
        defer_bias: bool,
        all_to_all: AllToAll | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See `forward`."""
        # Imported here, since Triton is not installed everywhere.
        from magnetar.models.moe.kernels.expert_ffn import ExpertFFN

        affine = (self.norm_weight, self.norm_bias) if self.inner_norm else (None, None)
        parameters = (self.w1, self.b1, *affine, self.w2)
        options = (all_to_all, self.activation_name, self.norm_eps)
        if all_to_all is not None:
            return ExpertFFN.apply(rows, *parameters, self.b2, None, *options)
        if offsets is None:
            offsets = counts.cumsum(0).to(torch.int32)
        out = ExpertFFN.apply(rows, *parameters, None, offsets, *options)  # (R, D)
        if defer_bias:
            # A copy: a sharded parameter itself is taken away when this module is done.
            assert self.b2 is not None
            return out, self.b2.clone()
        segment_ids = torch.repeat_interleave(counts, output_size=rows.size(0))  # (R,)
        return out + _ExpandRows.apply(self.b2, segment_ids, counts)


class LoopedExperts(nn.Module):
    """Copies of any module as experts, called one after another; see drop_in.MoE.

    State dicts have DeepSpeed's names, `deepspeed_experts.<i>.` and the module's own.
    """

    def __init__(self, expert: nn.Module, num_local_experts: int) -> None:
        """Copy the module."""
        super().__init__()
        self.num_local_experts = num_local_experts
        copies = (copy.deepcopy(expert) for _ in range(num_local_experts))
        self.deepspeed_experts = nn.ModuleList(copies)

    def uses_kernels(self, rows: Tensor) -> bool:
        """Never, since the module may be any."""
        return False

    def forward(self, rows: Tensor, counts: Tensor, **_: None) -> Tensor:
        """(R, D), sorted by expert, and (L,) int64 rows of each expert -> (R, D).

        An expert without rows is called, too: every rank must reduce the same gradients.
        """
        outputs = []
        shares = rows.split(counts.tolist())
        for expert, own in zip(self.deepspeed_experts, shares, strict=True):
            output = expert(own)
            outputs.append(output[0] if isinstance(output, tuple) else output)
        return torch.cat(outputs)


def _split_experts(module: nn.Module, state: dict, prefix: str, _metadata: object) -> None:
    """State-dict hook: (L, ...) tensors -> one entry per expert (views, nothing is copied)."""
    for name in PARAMETERS:
        stacked = state.pop(prefix + name, None)
        if stacked is not None:
            for expert, tensor in enumerate(stacked):
                state[f"{prefix}deepspeed_experts.{expert}.{name}"] = tensor


def _stack_experts(module: nn.Module, state: dict, prefix: str, *_unused: object) -> None:
    """Load hook: one entry per expert -> (L, ...) tensors. Missing entries stay missing."""
    assert isinstance(module, Experts)
    for name in PARAMETERS:
        keys = [
            f"{prefix}deepspeed_experts.{expert}.{name}"
            for expert in range(module.num_local_experts)
        ]
        if all(key in state for key in keys):
            state[prefix + name] = torch.stack([state.pop(key) for key in keys])
