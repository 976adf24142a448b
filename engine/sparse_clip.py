"""SparseClip: one gradient norm in which experts count less, one coefficient for all gradients.

TorchScale, arXiv 2211.13184, eq. 1-4. With g_d the gradients of all dense parameters (routers
included), g_s those of all experts (each expert counted once over the whole job), E experts and
the threshold xi (`gradient_clipping` of the JSON):

    ||g||        = sqrt(||g_d||^2 + kappa^2 ||g_s||^2),   kappa = 1 / sqrt(E)
    every g     *= xi / max(xi, ||g||)

Only the norm is re-weighted; experts and dense parameters are scaled by the same coefficient.
DeepSpeed computes its clipping norm in a different place in each mode, and in one of them wrongly
(fp32 without ZeRO averages the norms of the ranks). `SparseClip.install` replaces all of them, so
the norm and the arithmetic are the same in every mode.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import Tensor

from magnetar.data.errors import UserError
from magnetar.engine.deepspeed_engine import DeepSpeedEngine

KNOWN_OPTIMIZERS = {
    *("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam", "BlockwiseAdamW", "RAdam", "Lion")
}


@dataclass(frozen=True)
class GradientGroup:
    """Gradients with the same kappa: the dense ones, or those of layers with E experts.

    Attributes:
        gradients: this rank's share, tensors of any shape and float dtype.
        num_experts: E of the layers; None for dense parameters.
        group_name: DeepSpeed's name of the expert-parallel group; None for dense parameters.
    """

    gradients: Sequence[Tensor]
    num_experts: int | None = None
    group_name: str | None = None


def squared_sum(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """Sum of the squares of all elements, () float32."""
    gradients = list(gradients)
    if not gradients:
        return torch.zeros((), device=device)
    if gradients[0].is_cuda:
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)  # one pass, no copy
        return torch.stack(norms).square().sum()
    # On a CPU torch's norm adds one element after another and is 4e-3 off at ten million of them.
    # Its sum adds pairwise and is 1e-7 off.
    squares = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum()
    return squares.to(device)  # offloaded gradients are on the host


def clip_coefficient(norm: Tensor, threshold: float) -> Tensor:
    """xi / max(xi, ||g||), () float32 (eq. 4). An infinite threshold never clips."""
    if math.isinf(threshold):
        return torch.ones_like(norm)
    return threshold / norm.clamp_min(threshold)


class SparseClip:
    """The clipping of one DeepSpeed engine, and the norms of its last step.

    Attributes (tensors stay on the device; reading one is a synchronisation):
        dense_norm, expert_norm: () float32, ||g_d|| and ||g_s|| of the last step.
        norm: () float32, the ||g|| that is compared with the threshold.
        coefficient: () float32, the factor of all gradients.
        num_clipped: () int64, steps so far in which the coefficient was below 1.
        is_bad_step: function that says whether the step is left out; engine.guards sets it.
    """

    def __init__(self, threshold: float, enabled: bool, device: torch.device) -> None:
        """Prepare the clipping.

        Args:
            threshold: xi; 0 means no clipping, and norms are still measured.
            enabled: False gives vanilla clipping, kappa = 1, for comparison.
            device: device of the gradients.
        """
        self.threshold = threshold or math.inf
        self.enabled = enabled
        self.device = device
        self.dense_norm = self.expert_norm = self.norm = torch.zeros((), device=device)
        self.coefficient = torch.ones((), device=device)
        self.num_clipped = torch.zeros((), dtype=torch.int64, device=device)
        self.is_bad_step: Callable[[], bool] = lambda: False
        self._made: dict[tuple[int | None, ...], tuple[Tensor, Tensor]] = {}

    def measure(
        self, gradient_groups: Sequence[GradientGroup], partitioned: bool, scale: float = 1.0
    ) -> None:
        """Compute norms and coefficient from every rank's gradients.

        Args:
            gradient_groups: this rank's gradients, already averaged over the data.
            partitioned: True if every element of every gradient is on exactly one rank of the job
                (ZeRO 1, 2 and 3). False if ranks hold whole gradients; an expert's is then on each
                rank that holds the expert.
            scale: loss scale that the gradients still carry.
        """
        squares = torch.stack([squared_sum(g.gradients, self.device) for g in gradient_groups])
        if partitioned:
            dist.all_reduce(squares)
        else:
            for index, group in enumerate(gradient_groups):
                if group.group_name is not None:
                    ep_group = groups._get_expert_parallel_group(group.group_name)
                    square = squares[index].clone()
                    dist.all_reduce(square, group=ep_group)
                    squares[index] = square
        squares = squares / scale**2
        kappa_squared, is_expert = self._constants(tuple(g.num_experts for g in gradient_groups))
        self.dense_norm = squares.where(~is_expert, 0.0).sum().sqrt()
        self.expert_norm = squares.where(is_expert, 0.0).sum().sqrt()
        self.norm = (squares * kappa_squared).sum().sqrt()
        self.coefficient = clip_coefficient(self.norm, self.threshold)
        clipped = (self.coefficient < 1) & self.norm.isfinite()  # an overflowed step is skipped
        self.num_clipped = self.num_clipped + clipped

    def _reported_norm(self, optimizer: Any) -> Tensor:
        """The norm that DeepSpeed gets.

        With fp16, a norm that is not finite tells the dynamic loss scale of an overflow. With other
        types DeepSpeed would leave the step out in some modes only, and never count it the same
        way. There engine.guards leaves it out in every mode, and DeepSpeed gets a finite norm.
        """
        is_fp16 = optimizer.dtype == torch.float16
        return self.norm if is_fp16 else self.norm.nan_to_num(0.0, 0.0)

    def _constants(self, num_experts: tuple[int | None, ...]) -> tuple[Tensor, Tensor]:
        """kappa^2 of each group, and whether it holds experts: (groups,) float32 and bool.

        The tensors are kept, since making them on a GPU would wait for it in each step.
        """
        if num_experts not in self._made:
            kappas = [1.0 / count if count and self.enabled else 1.0 for count in num_experts]
            is_expert = [count is not None for count in num_experts]
            self._made[num_experts] = (
                torch.tensor(kappas, device=self.device),
                torch.tensor(is_expert, device=self.device),
            )
        return self._made[num_experts]

    def install(self, engine: DeepSpeedEngine) -> None:
        """Replace DeepSpeed's clipping in an engine.

        Raises:
            UserError: SparseClip does not know the step of the engine's optimizer.
        """
        optimizer = engine.optimizer
        basic = type(engine.basic_optimizer).__name__
        if basic not in KNOWN_OPTIMIZERS:
            raise UserError(
                f"optimizer.type: DeepSpeed made a {basic}, which SparseClip does not know, so "
                f"its gradients would not be clipped: use Adam or AdamW"
            )
        if type(optimizer) is DeepSpeedZeroOptimizer:
            self._install_zero(optimizer)
        elif type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
            self._install_zero_3(optimizer)
        elif type(optimizer) is BF16_Optimizer:
            self._install_bf16(optimizer)
        elif optimizer is engine.basic_optimizer:
            self._install_fp32(engine)
        else:
            raise UserError(
                f"DeepSpeed wrapped the optimizer in a {type(optimizer).__name__}, which "
                "SparseClip does not know, so its gradients would not be clipped: use "
                "zero_optimization.stage 1, 2 or 3 with bf16 or fp16, any stage with fp32"
            )

    def _install_zero(self, optimizer: DeepSpeedZeroOptimizer) -> None:
        """ZeRO 1 and 2: gradients are partitioned, flat, and still carry the loss scale."""

        def scaled_global_norm(norm_type: int = 2) -> Tensor:
            gradient_groups = [
                _gradient_group(
                    param_group,
                    [optimizer.single_partition_of_fp32_groups[index].grad]
                    if optimizer.cpu_offload
                    else optimizer.averaged_gradients[index],
                )
                for index, param_group in enumerate(optimizer.optimizer.param_groups)
            ]
            self.measure(gradient_groups, partitioned=True, scale=float(optimizer.loss_scale))
            return self._reported_norm(optimizer) * optimizer.loss_scale

        flattened_before = optimizer._get_preflattened_grad_partition

        def flat_and_clipped(index: int) -> Tensor:
            """Flatten, convert to float32 and scale in one pass; DeepSpeed would use three."""
            whole = flattened_before(index)
            gradients = optimizer.averaged_gradients[index] if whole is None else [whole]
            like = optimizer.single_partition_of_fp32_groups[index]
            flat = like.new_empty(int(optimizer.partition_size[index]))
            # Of one dimension and not a scalar, so that type promotion makes the product float32.
            factor = (self.coefficient / optimizer.loss_scale).to(flat).view(1)
            end = 0
            for gradient in gradients:
                first, end = end, end + gradient.numel()
                torch.mul(gradient.view(-1), factor, out=flat[first:end])
            flat[end:].zero_()
            return flat

        def unscale_and_clip_grads(flat_gradients: Sequence[Tensor], total_norm: Tensor) -> None:
            if not optimizer.cpu_offload:
                return
            factor = self.coefficient / optimizer.loss_scale
            for gradient in flat_gradients:
                gradient.data.mul_(factor.to(gradient.device))

        optimizer.scaled_global_norm = scaled_global_norm
        optimizer._get_preflattened_grad_partition = flat_and_clipped
        optimizer.unscale_and_clip_grads = unscale_and_clip_grads
        # DeepSpeed would search every tensor for values that are not finite, with ten launches
        # each, and wait. The norm that follows is the same on all ranks and shows them as well.
        optimizer.check_overflow = lambda partition_gradients=True: None

    def _install_zero_3(self, optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
        """ZeRO 3: like ZeRO 1 and 2, but a parameter group is several groups of partitions."""

        def norm_groups() -> list[Tensor]:
            gradient_groups = [
                _gradient_group(
                    optimizer.optimizer.param_groups[group],
                    [optimizer.fp32_partitioned_groups_flat[index].grad]
                    if optimizer.offload_optimizer
                    else optimizer.averaged_gradients[index],
                )
                for index, group in optimizer.sub_group_to_group_id.items()
            ]
            self.measure(gradient_groups, partitioned=True, scale=float(optimizer.loss_scale))
            # DeepSpeed's step combines the norms of the groups.
            return [self._reported_norm(optimizer) * optimizer.loss_scale]

        def unscale_and_clip_grads(index: int, total_norm: Tensor) -> None:
            gradient = optimizer.fp32_partitioned_groups_flat[index].grad
            gradient.mul_((self.coefficient / optimizer.loss_scale).to(gradient.device))

        optimizer._get_norm_groups = norm_groups
        optimizer.unscale_and_clip_grads = unscale_and_clip_grads

    def _install_bf16(self, optimizer: BF16_Optimizer) -> None:
        """bf16 with float32 accumulation, ZeRO 1: every rank holds whole float32 gradients."""
        deepspeed_step = optimizer.step
        optimizer.clip_grad = 0.0

        def step(closure: None = None) -> None:
            gradient_groups = [
                _gradient_group(param_group, list(compress(gradients, has_gradient)))
                for param_group, gradients, has_gradient in zip(
                    optimizer.optimizer.param_groups,
                    optimizer.fp32_groups_gradients,
                    optimizer.fp32_groups_has_gradients,
                    strict=True,
                )
            ]
            self.measure(gradient_groups, partitioned=False)
            if self.is_bad_step():
                optimizer.clear_hp_grads()
                optimizer.clear_lp_grads()
                return
            _scale(gradient_groups, self.coefficient)
            deepspeed_step(closure)
            optimizer._global_grad_norm = self.norm

        optimizer.step = step

    def _install_fp32(self, engine: DeepSpeedEngine) -> None:
        """fp32 without ZeRO: every rank holds whole gradients in `.grad`."""

        def clip_fp32_gradients() -> None:
            gradient_groups = [
                _gradient_group(group, [p.grad for p in group["params"] if p.grad is not None])
                for group in engine.basic_optimizer.param_groups
            ]
            self.measure(gradient_groups, partitioned=False)
            _scale(gradient_groups, self.coefficient)
            engine._global_grad_norm = self.norm

        engine.clip_fp32_gradients = clip_fp32_gradients


def _gradient_group(param_group: dict, gradients: Sequence[Tensor]) -> GradientGroup:
    if not param_group.get("moe", False):
        return GradientGroup(gradients)
    return GradientGroup(gradients, param_group["num_experts"], param_group["name"])


def _scale(gradient_groups: Sequence[GradientGroup], coefficient: Tensor) -> None:
    for group in gradient_groups:
        torch._foreach_mul_(list(group.gradients), coefficient)
