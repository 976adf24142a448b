"""A DeepSpeed engine for a Magnetar model: process group, parameter groups, learning rate."""

import copy
import ctypes
import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from magnetar.data.errors import UserError
from magnetar.engine.admin.profile import needs_profile, start_omegas
from magnetar.engine.checkpoint.open_run import DTYPES
from magnetar.engine.checkpoint.starting_weights import load_starting_weights, starts_from_weights
from magnetar.engine.cluster.environment import launched_local_size, require_device
from magnetar.engine.cluster.rendezvous import use_rendezvous
from magnetar.engine.config.deepspeed import EIGHT_BIT
from magnetar.engine.config.schema import LRSchedule, RunConfig
from magnetar.engine.deepspeed_engine import DeepSpeedEngine
from magnetar.engine.optim.adam import (
    MIN_8BIT_SIZE,
    check_lengths,
    fuse_torchs_adam,
    groups_by_bits,
    small_groups,
    take_client_optimizer,
)
from magnetar.engine.optim.ema import keep_ema
from magnetar.engine.sparse_clip import SparseClip
from magnetar.engine.zero import (
    device_of_build,
    prepare_for_zero,
    tensors_of_optimizer,
    trained_moe_class,
)
from magnetar.models.layers.attention import expect_many_shapes
from magnetar.models.transformer import build_model, compile_blocks, set_checkpointing

# mallopt's parameters in malloc.h of glibc, whose largest threshold for mmap is 32 MiB.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2
_MALLOPT = {_MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 256 * 2**20}


def keep_freed_memory() -> None:
    """Make glibc keep freed memory in this process; another C library is left as it is.

    By default glibc returns large blocks to the system, and each step fetches them again page by
    page. A small operator then spends most of its time waiting for zeroed pages.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _MALLOPT.items():
            mallopt(parameter, value)


def without_shm_op() -> None:
    """Keep `deepspeed.init_distributed` from compiling a C++ op that only inference uses.

    That takes 48 seconds, and a process killed meanwhile leaves a lock file on which every later
    job hangs.
    """
    # The attribute `deepspeed.comm.torch` is torch itself, so the module comes from sys.modules.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


def start_distributed() -> torch.device:
    """This rank's device, once the launcher's process group is joined, or one of a single rank.

    Raises:
        UserError: the ranks cannot meet at MASTER_ADDR and MASTER_PORT.
        MachineError: the other ranks cannot be reached.
    """
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("MAGNETAR_LOG_LEVEL", "WARNING"))
    # DeepSpeed calls these functions by their old names, which we cannot change.
    warnings.filterwarnings(
        "ignore",
        r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated",
        FutureWarning,
    )
    # The device is the right one, by set_device below.
    warnings.filterwarnings("ignore", r"barrier\(\): using the device under", UserWarning)
    without_shm_op()
    # Set before CUDA is first used. A heap of fixed segments soon has no contiguous place for the
    # gradients of a layer's experts.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if not any(name in os.environ for name in ("RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
        # Started by hand. Under MPI DeepSpeed asks mpi4py instead. Port 0 is any free port.
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    # DeepSpeed uses this port under MPI only.
    port = int(os.environ.get("MASTER_PORT", TORCH_DISTRIBUTED_DEFAULT_PORT))
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        require_device(accelerator.device_count())
    deepspeed.init_distributed(verbose=False, init_method=use_rendezvous(), distributed_port=port)
    if accelerator.device_name() == "cpu":
        keep_freed_memory()
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launched_local_size()))
    else:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(accelerator.current_device_name())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: matrices decay, vectors do not; experts stand apart, by their count E.

    Only tensors of matrix shape decay. To decay a temperature or a LayerNorm gain towards zero
    changes the function and is no regularisation. The groups of experts carry DeepSpeed's marks
    (`moe` and the name of the process group), and E for SparseClip. The parameters must still have
    their shapes.
    """
    found: dict[tuple[str, int, bool], list[nn.Parameter]] = {}
    for parameter in filter(lambda each: each.requires_grad, model.parameters()):
        group_name = getattr(parameter, "group_name", "dense")
        # Experts' tensors are stacked, so they have one dimension more than one expert's.
        is_matrix = parameter.dim() - (group_name != "dense") >= 2
        key = (group_name, getattr(parameter, "num_experts", 0), is_matrix)
        found.setdefault(key, []).append(parameter)
    param_groups = []
    # Experts come first. Shards lie one behind the other, and a temperature (one number) before
    # them would misalign their weights for grouped matrix products.
    for key in sorted(found, reverse=True):
        group_name, num_experts, is_matrix = key
        decay = weight_decay if is_matrix else 0.0
        marks = {"moe": True, "num_experts": num_experts} if num_experts else {}
        group = {"params": found[key], "name": group_name, "weight_decay": decay}
        param_groups.append(group | marks)
    return param_groups


def lr_factor(schedule: LRSchedule, base_lr: float, num_steps: int) -> Callable[[int], float]:
    """The function from an optimizer step (from 0) to the multiplier of the learning rate.

    Warm-up is a line from warmup_start_lr that reaches the full rate at step `warmup_steps - 1`.
    After it the rate is

        polynomial     end_lr + (lr - end_lr) * (1 - t)^power, t the share of total_steps done
        cosine         end_lr + (lr - end_lr) * (1 + cos(pi t)) / 2
        wsd            lr, then end_lr + (lr - end_lr) * (1 - u) or (1 - sqrt(u)), u the share of
                       decay_steps done
        inverse_sqrt   lr * sqrt(warmup_steps / (step + 1))
        constant       lr

    The run's `num_steps` are the default of total_steps.
    """
    total_steps = schedule.total_steps or num_steps
    warmup_steps = max(1, schedule.warmup_steps)
    start, end = schedule.warmup_start_lr / base_lr, schedule.end_lr / base_lr
    begin = total_steps - schedule.decay_steps if schedule.decay_steps else warmup_steps

    def remaining(progress: float) -> float:
        """The share of the way from end_lr to lr that is left after a share of the fall."""
        if schedule.type == "polynomial":
            return (1 - progress) ** schedule.power
        if schedule.type == "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        return 1 - (progress if schedule.decay == "linear" else math.sqrt(progress))

    def factor(step: int) -> float:
        if step + 1 < warmup_steps:
            return start + (1 - start) * (step + 1) / warmup_steps
        if schedule.type == "inverse_sqrt":
            return math.sqrt(warmup_steps / (step + 1))
        if schedule.type == "constant" or step < begin:
            return 1.0  # exactly, since a branch of a constant rate equals one of wsd
        progress = min(1.0, (step + 1 - begin) / max(1, total_steps - begin))
        return end + (1 - end) * remaining(progress)

    return factor


def early_end(schedule: LRSchedule, num_steps: int) -> str:
    """What a schedule that ends before the run does to the other steps; "" if it does not."""
    total_steps, end_lr = schedule.total_steps or num_steps, schedule.end_lr
    if not schedule.ends or total_steps >= num_steps:
        return ""
    rate = f"end_lr={end_lr:g}" if end_lr else "a learning rate of 0, so they change nothing"
    return (
        f"magnetar.training.lr_schedule.total_steps={total_steps} is less than num_steps="
        f"{num_steps}: the steps after {total_steps} train at {rate}; use num_steps={total_steps}, "
        f"or begin another run with total_steps={num_steps}"
    )


def missing_types() -> dict[str, str]:
    """Types of weights that this rank's device does not compute in, with the reason and way out."""
    accelerator = get_accelerator()
    has = {"bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    is_cpu = accelerator.device_name() == "cpu"
    device = "CPU" if is_cpu else torch.cuda.get_device_name()
    ways = [f"{name}.enabled=true" for name in has if has[name]] + ["neither, for float32"]
    way_out = f"use {' or '.join(ways)}"
    return {
        name: f"the {device} of {socket.gethostname()} does not compute in {name}: {way_out}"
        for name in has
        if not has[name]
    }


def require_type(dtype: str) -> None:
    """Refuse a type of weights that the device of any rank does not compute in.

    Raises:
        UserError: naming the key, the device and the way out.
    """
    missing: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(missing, missing_types())
    for found in missing:
        if dtype in found:
            raise UserError(f"{dtype}.enabled=true: {found[dtype]}", on_every_rank=True)


def build_engine(config: RunConfig, device: torch.device) -> tuple[DeepSpeedEngine, SparseClip]:
    """The DeepSpeed engine of a resolved config, and the SparseClip in place of its clipping.

    Raises:
        UserError: if a device does not compute in the type of the weights.
    """
    require_type(config.dtype)
    with torch.device(device_of_build(config, device)):
        # The weights are drawn on the device in any case: the CPU's generator draws others.
        moe_class = trained_moe_class(config)
        model = build_model(config.model, config.training.seed, moe_class, drawn_on=device)
    if config.data.pairs is not None:
        expect_many_shapes()
    if starts_from_weights(config) and config.training.init_from is not None:
        load_starting_weights(model, Path(config.training.init_from))
    elif needs_profile(config):
        start_omegas(model, config)
    if config.training.activation_checkpointing:
        section = config.deepspeed.get("activation_checkpointing", {})
        deepspeed.checkpointing.configure(
            None, {"train_batch_size": dist.get_world_size(), "activation_checkpointing": section}
        )
        set_checkpointing(model, deepspeed.checkpointing.checkpoint)
    optimizer_params = config.deepspeed["optimizer"]["params"]
    weight_decay = optimizer_params.get("weight_decay", 0.0)
    if config.training.independent_weight_decay:
        # AdamW multiplies weight_decay by the learning rate, so only the schedule's factor is left.
        weight_decay /= optimizer_params["lr"]
    schedule, num_steps = config.training.lr_schedule, config.training.num_steps
    factor = lr_factor(schedule, optimizer_params["lr"], num_steps)
    deepspeed_config = copy.deepcopy(config.deepspeed)  # DeepSpeed takes keys out of it
    # SparseClip applies the threshold. DeepSpeed calls it in every mode if its own is above 0.
    deepspeed_config["gradient_clipping"] = config.gradient_clipping or 1.0
    # The trainer reports. DeepSpeed's own lines would tear the progress display.
    deepspeed_config.setdefault("steps_per_print", 2**62)
    model_parameters = parameter_groups(model, weight_decay)  # while they have their shapes
    is_8_bit = config.deepspeed["optimizer"]["type"] == EIGHT_BIT
    if is_8_bit:
        min_8bit_size = optimizer_params.get("min_8bit_size", MIN_8BIT_SIZE)
        model_parameters = groups_by_bits(model, model_parameters, min_8bit_size)
    model_parameters = small_groups(model_parameters)
    fuse_torchs_adam(deepspeed_config)
    client_optimizer = take_client_optimizer(deepspeed_config)
    prepare_for_zero(model, deepspeed_config, DTYPES[config.dtype])
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        config=deepspeed_config,
        model_parameters=model_parameters,
        optimizer=client_optimizer,
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, factor),
        dist_init_required=False,
    )
    if is_8_bit:
        check_lengths(tensor for _, tensor in tensors_of_optimizer(engine))
    if config.training.ema_decay is not None:
        tensors = [tensor for _, tensor in tensors_of_optimizer(engine)]
        keep_ema(engine.basic_optimizer, tensors, config.training.ema_decay)
    if config.training.compile:
        compile_blocks(model)
    sparse_clip = SparseClip(config.gradient_clipping, config.sparse_clip.enabled)
    sparse_clip.install(engine)
    return engine, sparse_clip
