"""SparseClip: one gradient norm in which experts count less, one coefficient for all gradients.

TorchScale, arXiv 2211.13184, eq. 1-4. With g_d the gradients of all dense parameters (routers
included), g_s those of all experts (each expert counted once over the whole job), E experts and
the threshold xi (`gradient_clipping` of the JSON):

    ||g||        = sqrt(||g_d||^2 + kappa^2 ||g_s||^2),   kappa = 1 / sqrt(E)
    every g     *= xi / max(xi, ||g||)

Only the norm is re-weighted; experts and dense parameters are scaled by the same coefficient.
DeepSpeed computes its clipping norm in a different place in each mode, and in one of them wrongly
(fp32 without ZeRO averages the norms of the ranks). `SparseClip.install` replaces all of them, so
the norm and the arithmetic are the same in every mode. The engine may be anybody's: what is an
expert's, and E, are read from the MoE layers of its model.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple

import deepspeed.comm as dist
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import Tensor, nn

from magnetar.data.errors import UserError
from magnetar.engine.deepspeed_engine import DeepSpeedEngine

# Optimizers whose step reads `.grad` and nothing else, as every one of torch.optim does.
KNOWN_OPTIMIZERS = {"FusedAdam", "DeepSpeedCPUAdam", "BlockwiseAdamW", "Lion"}


class Kind(NamedTuple):
    """What a parameter counts as; both are None for a dense one.

    Attributes:
        num_experts: E of its layer.
        group_name: DeepSpeed's name of the expert-parallel group.
    """

    num_experts: int | None = None
    group_name: str | None = None


@dataclass(frozen=True)
class GradientGroup:
    """Gradients with the same kappa: the dense ones, or those of layers with E experts.

    Attributes:
        gradients: this rank's share, tensors of any shape and float dtype.
        kind: E of the layers, and the expert-parallel group.
    """

    gradients: Sequence[Tensor]
    kind: Kind


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
        is_bad_step: function that says whether the step is left out; engine.guards sets it. None
            leaves DeepSpeed to skip a step whose norm is not finite, where it does so.
    """

    def __init__(self, threshold: float, enabled: bool = True) -> None:
        """Prepare the clipping.

        Args:
            threshold: xi; 0 means no clipping, and norms are still measured.
            enabled: False gives vanilla clipping, kappa = 1, for comparison.
        """
        if not threshold >= 0:
            raise UserError(
                f"SparseClip(threshold={threshold}): the threshold of a norm is at least 0: give "
                "a positive number (1.0, say), or 0 to measure norms and clip nothing"
            )
        self.threshold = threshold or math.inf
        self.enabled = enabled
        self.is_bad_step: Callable[[], bool] | None = None
        self._made: dict[tuple[int | None, ...], tuple[Tensor, Tensor]] = {}
        self._place(torch.device("cpu"))

    def _place(self, device: torch.device) -> None:
        self.device = device
        self.dense_norm = self.expert_norm = self.norm = torch.zeros((), device=device)
        self.coefficient = torch.ones((), device=device)
        self.num_clipped = torch.zeros((), dtype=torch.int64, device=device)

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
                if group.kind.group_name is not None:
                    ep_group = groups._get_expert_parallel_group(group.kind.group_name)
                    square = squares[index].clone()
                    dist.all_reduce(square, group=ep_group)
                    squares[index] = square
        squares = squares / scale**2
        kappa_squared, is_expert = self._constants(
            tuple(g.kind.num_experts for g in gradient_groups)
        )
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
        Without guards DeepSpeed gets the norm as it is.
        """
        if optimizer.dtype == torch.float16 or self.is_bad_step is None:
            return self.norm
        return self.norm.nan_to_num(0.0, 0.0)

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
        """Replace DeepSpeed's clipping in an engine; its JSON's gradient_clipping is not read.

        Raises:
            UserError: if SparseClip does not know the step of the engine's optimizer, or gradients
                are also divided among ranks in a way that it does not.
        """
        optimizer = engine.optimizer
        basic = type(engine.basic_optimizer)
        if basic.__name__ not in KNOWN_OPTIMIZERS and not basic.__module__.startswith(
            "torch.optim"
        ):
            raise UserError(
                f"optimizer.type: DeepSpeed made a {basic.__name__}, which SparseClip does not "
                "know, so its gradients would not be clipped: use Adam or AdamW, or an optimizer "
                "of torch.optim"
            )
        installers: dict[type, Callable[[Any], None]] = {
            DeepSpeedZeroOptimizer: self._install_zero,
            DeepSpeedZeroOptimizer_Stage3: self._install_zero_3,
            BF16_Optimizer: self._install_bf16,
            FP16_Optimizer: self._install_unpartitioned,
            FP16_UnfusedOptimizer: self._install_unpartitioned,
        }
        if optimizer is not engine.basic_optimizer and type(optimizer) not in installers:
            raise UserError(
                f"DeepSpeed wrapped the optimizer in a {type(optimizer).__name__}, which "
                "SparseClip does not know, so its gradients would not be clipped: use "
                "zero_optimization.stage 1, 2 or 3 with bf16 or fp16, any stage with fp32"
            )
        _require_known_layout(engine)
        mark_experts(engine.module)
        self._place(engine.device)
        if optimizer is engine.basic_optimizer:
            self._install_fp32(engine)
        else:
            installers[type(optimizer)](optimizer)

    def _install_zero(self, optimizer: DeepSpeedZeroOptimizer) -> None:
        """ZeRO 1 and 2: gradients are partitioned, flat, and still carry the loss scale."""
        kinds_of = [_kinds(parameters) for parameters in optimizer.bit16_groups]

        def scaled_global_norm(norm_type: int = 2) -> Tensor:
            gradient_groups = [
                group
                for index, kinds in enumerate(kinds_of)
                for group in _partition_groups(optimizer, index, kinds)
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
        kinds_of = [_kinds(parameters) for parameters in optimizer.fp16_groups]

        def norm_groups() -> list[Tensor]:
            gradient_groups = [
                group
                for index, kinds in enumerate(kinds_of)
                for group in _subgroup_groups(optimizer, index, kinds)
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
                group
                for parameters, gradients, has_gradient in zip(
                    optimizer.bf16_groups,
                    optimizer.fp32_groups_gradients,
                    optimizer.fp32_groups_has_gradients,
                    strict=True,
                )
                for group in _by_kind(
                    _kinds(parameters),
                    compress(zip(parameters, gradients, strict=True), has_gradient),
                )
            ]
            self.measure(gradient_groups, partitioned=False)
            if self.is_bad_step is not None and self.is_bad_step():
                optimizer.clear_hp_grads()
                optimizer.clear_lp_grads()
                return
            _scale(gradient_groups, self.coefficient)
            deepspeed_step(closure)
            optimizer._global_grad_norm = self.norm

        optimizer.step = step

    def _install_unpartitioned(self, optimizer: FP16_Optimizer | FP16_UnfusedOptimizer) -> None:
        """bf16 without ZeRO: every rank holds whole gradients, copied to float32 in the step.

        DeepSpeed leaves a step whose gradients are not finite out before it comes here.
        """

        def unscale_and_clip_grads(*_: Any) -> None:
            gradient_groups = [
                group
                for index, parameters in enumerate(optimizer.fp16_groups)
                for group in _by_kind(_kinds(parameters), _float32_gradients(optimizer, index))
            ]
            self.measure(gradient_groups, partitioned=False)
            _scale(gradient_groups, self.coefficient)
            optimizer._global_grad_norm = self.norm

        optimizer.unscale_and_clip_grads = unscale_and_clip_grads

    def _install_fp32(self, engine: DeepSpeedEngine) -> None:
        """fp32 without ZeRO: every rank holds whole gradients in `.grad`."""
        # DeepSpeed calls its clipping only with a threshold of its own.
        engine._config.gradient_clipping = engine.gradient_clipping() or 1.0

        def clip_fp32_gradients() -> None:
            gradient_groups = [
                group
                for param_group in engine.basic_optimizer.param_groups
                for group in _by_kind(
                    _kinds(param_group["params"]),
                    ((p, p.grad) for p in param_group["params"] if p.grad is not None),
                )
            ]
            self.measure(gradient_groups, partitioned=False)
            _scale(gradient_groups, self.coefficient)
            engine._global_grad_norm = self.norm

        engine.clip_fp32_gradients = clip_fp32_gradients


def _require_known_layout(engine: Any) -> None:
    """Refuse an engine whose gradients are divided in a way that `measure` does not sum.

    Raises:
        UserError: naming the setting and the way out.
    """
    refused = {
        "pipeline parallelism": getattr(engine, "pipeline_parallelism", False),
        "tensor parallelism": engine.mp_world_size > 1,
        "sequence parallelism": engine.sequence_parallel_size > 1,
        "zero_optimization.compute_grad_norm=false": not engine.zero_compute_grad_norm(),
        "legacy_fusion=true": getattr(engine.optimizer, "fused_adam_legacy", False)
        or getattr(engine.optimizer, "fused_lamb_legacy", False),
        "zero_optimization.offload_optimizer.device=nvme": getattr(
            engine.optimizer, "swap_optimizer", False
        ),
    }
    for setting, is_on in refused.items():
        if is_on:
            raise UserError(
                f"the engine has {setting}, under which SparseClip does not see every gradient: "
                "leave it out, or keep DeepSpeed's own clipping"
            )
    if engine.fp16_enabled() and not engine.zero_optimization():
        raise UserError(
            "fp16.enabled=true with zero_optimization.stage=0: DeepSpeed divides gradients by a "
            "loss scale that it has not multiplied the loss by: use stage 1, or bf16"
        )


def mark_experts(model: nn.Module) -> None:
    """Set `num_experts` on every parameter of an expert: E of its layer.

    Raises:
        UserError: if a parameter has DeepSpeed's mark of an expert and no MoE layer.
    """
    for module in model.modules():
        if isinstance(module, DeepSpeedMoE | AutoEPMoELayer):
            for parameter in filter(is_moe_param, module.parameters()):
                parameter.num_experts = module.num_experts
    for name, parameter in model.named_parameters():
        if is_moe_param(parameter) and not hasattr(parameter, "num_experts"):
            raise UserError(
                f"parameter {name} is marked as an expert's (allreduce=False) but is in no "
                "deepspeed.moe.layer.MoE, so SparseClip does not know its number of experts: set "
                "its attribute num_experts"
            )


def _kind(parameter: Any) -> Kind:
    return Kind(parameter.num_experts, parameter.group_name) if is_moe_param(parameter) else Kind()


def _kinds(parameters: Iterable[Tensor]) -> list[Kind]:
    """The kinds among the parameters of an optimizer group, in the same order on every rank."""
    found = {_kind(parameter) for parameter in parameters}
    return sorted(found, key=lambda kind: (kind.num_experts or 0, kind.group_name or ""))


def _by_kind(kinds: Iterable[Kind], pairs: Iterable[tuple[Tensor, Tensor]]) -> list[GradientGroup]:
    """Pairs of a parameter and its gradient as one group for each kind, in the given order."""
    of_kind: dict[Kind, list[Tensor]] = {kind: [] for kind in kinds}
    for parameter, gradient in pairs:
        of_kind[_kind(parameter)].append(gradient)
    return [GradientGroup(gradients, kind) for kind, gradients in of_kind.items()]


def _partition_groups(
    optimizer: DeepSpeedZeroOptimizer, index: int, kinds: list[Kind]
) -> list[GradientGroup]:
    """This rank's partition of an optimizer group of ZeRO 1 and 2, by kinds."""
    gradients = (
        [optimizer.single_partition_of_fp32_groups[index].grad]
        if optimizer.cpu_offload
        else optimizer.averaged_gradients[index]
    )
    if len(kinds) == 1:
        return [GradientGroup(gradients, kinds[0])]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    partition = dist.get_rank(group=optimizer.real_dp_process_group[index])
    pairs = []
    for parameter in optimizer.params_in_partition[index]:
        name = optimizer.get_param_id(parameter)
        start = optimizer.grad_partition_insertion_offset[index][partition][name]
        left = parameter.numel() - optimizer.grad_start_offset[index][partition][name]
        pairs.append((parameter, flat[start : start + left]))  # the partition may end first
    return _by_kind(kinds, pairs)


def _subgroup_groups(
    optimizer: DeepSpeedZeroOptimizer_Stage3, index: int, kinds: list[Kind]
) -> list[GradientGroup]:
    """This rank's partitions of a subgroup of ZeRO 3, by kinds."""
    gradients = optimizer.averaged_gradients.get(index)
    if optimizer.offload_optimizer:
        gradients = [optimizer.fp32_partitioned_groups_flat[index].grad]
    if len(kinds) == 1:
        return [GradientGroup(gradients, kinds[0])]
    parameters = optimizer.fp16_groups[index]
    if optimizer.offload_optimizer:
        places = [optimizer.grad_position[optimizer.get_param_id(p)] for p in parameters]
        gradients = [gradients[0][start : start + numel] for _, start, numel in places]
    return _by_kind(kinds, zip(parameters, gradients, strict=True))


def _float32_gradients(optimizer: Any, index: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of a parameter and its float32 gradient, of bf16 without ZeRO."""
    parameters = optimizer.fp16_groups[index]
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        copies = optimizer.fp32_groups[index]
        yield from ((p, copy.grad) for p, copy in zip(parameters, copies, strict=True))
        return
    flat, start = optimizer.fp32_groups_flat[index].grad, 0
    for parameter in parameters:
        yield parameter, flat[start : start + parameter.numel()]
        start += parameter.numel()


def _scale(gradient_groups: Sequence[GradientGroup], coefficient: Tensor) -> None:
    for group in gradient_groups:
        torch._foreach_mul_(list(group.gradients), coefficient)
