"""A DeepSpeed engine for a Magnetar model, and one training step of it."""

import copy
import ctypes
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from magnetar.engine.admin import needs_profile, start_omegas
from magnetar.engine.checkpoint.open_run import DTYPES
from magnetar.engine.checkpoint.starting_weights import load_starting_weights, starts_from_weights
from magnetar.engine.cluster.rendezvous import launched_local_size, use_rendezvous
from magnetar.engine.config.deepspeed import EIGHT_BIT
from magnetar.engine.config.schema import LRSchedule, RunConfig
from magnetar.engine.optim.adam import (
    MIN_8BIT_SIZE,
    check_lengths,
    fuse_torchs_adam,
    groups_by_bits,
    small_groups,
    take_client_optimizer,
)
from magnetar.engine.sparse_clip import SparseClip
from magnetar.engine.zero import partition, tensors_of_optimizer
from magnetar.models.layers.attention import expect_many_shapes
from magnetar.models.moe.deepspeed import moe_class
from magnetar.models.moe.layer import MoE
from magnetar.models.transformer import build_model, compile_blocks, set_checkpointing

# mallopt's parameters (malloc.h of glibc, whose largest threshold for mmap is 32 MiB).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_TOP_PAD_BYTES = 256 * 2**20
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Have freed memory stay with this process.

    By default glibc hands large blocks back to the system, and each step fetches them again, page
    by page: most of what a small operator does is then to wait for zeroed pages. Another C library
    is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_TRIM_THRESHOLD, _NEVER)
    mallopt(_TOP_PAD, _TOP_PAD_BYTES)


def launched_rank() -> int:
    """This process's rank by its environment: deepspeed's or torchrun's, MPI's, or 0 alone."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def start_distributed() -> torch.device:
    """Join the launcher's process group (or make one of a single rank); return this rank's device.

    Raises:
        UserError: if the ranks cannot meet where MASTER_ADDR and MASTER_PORT say.
        MachineError: if the other ranks cannot be reached.
    """
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("MAGNETAR_LOG_LEVEL", "WARNING"))
    # DeepSpeed calls this function by its old name; nobody here can do anything about it.
    warnings.filterwarnings(
        "ignore",
        r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated",
        FutureWarning,
    )
    # It is the right one: set_device below.
    warnings.filterwarnings("ignore", r"barrier\(\): using the device under", UserWarning)
    # DeepSpeed would compile a C++ op here that serves inference alone: 48 seconds, and a process
    # killed meanwhile leaves a lock file on which every later job hangs. The module must be
    # reached through sys.modules: `deepspeed.comm.torch` as an attribute is torch itself.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    # Before CUDA is first used: a heap of fixed segments soon has no place in one piece for the
    # gradients of a layer's experts.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if not any(name in os.environ for name in ("RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
        # Started by hand. Under MPI DeepSpeed asks mpi4py instead. Port 0: any that is free.
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    # The port is only what DeepSpeed sets under MPI.
    port = int(os.environ.get("MASTER_PORT", TORCH_DISTRIBUTED_DEFAULT_PORT))
    deepspeed.init_distributed(verbose=False, init_method=use_rendezvous(), distributed_port=port)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        keep_freed_memory()
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launched_local_size()))
    else:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(accelerator.current_device_name())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: matrices decay, vectors do not; experts apart, by their count E.

    A temperature that decays towards zero, or a LayerNorm gain that does, is a change of the
    function and no regularisation, so only tensors of matrix shape decay. The groups of experts
    carry DeepSpeed's marks (`moe`, and its group's name) and E for SparseClip.
    """
    found: dict[tuple[str, int, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        group_name = getattr(parameter, "group_name", "dense")
        # An expert's tensors are stacked: one dimension more than the thing itself.
        is_matrix = parameter.dim() - (group_name != "dense") >= 2
        key = (group_name, getattr(parameter, "num_experts", 0), is_matrix)
        found.setdefault(key, []).append(parameter)
    param_groups = []
    # Experts first: ZeRO 3 lays out one parameter behind the other, and a temperature (one number)
    # would misalign the experts' weights for grouped matrix products.
    for (group_name, num_experts, is_matrix), parameters in sorted(
        found.items(), key=lambda item: item[0], reverse=True
    ):
        group = {
            "params": parameters,
            "name": group_name,
            "weight_decay": weight_decay if is_matrix else 0.0,
        }
        if num_experts:
            group |= {"moe": True, "num_experts": num_experts}
        param_groups.append(group)
    return param_groups


def lr_factor(schedule: LRSchedule, base_lr: float, num_steps: int) -> Callable[[int], float]:
    """Multiplier of the learning rate at an optimizer step (from 0).

    Warm-up is linear and reaches the full rate at step `warmup_steps - 1`. Then
    polynomial: end_lr + (lr - end_lr) * (1 - t)^power, t the share of total_steps after warm-up;
    inverse_sqrt: lr * sqrt(warmup_steps / (step + 1)); constant: lr.
    """
    total_steps = schedule.total_steps or num_steps
    warmup_steps = max(1, schedule.warmup_steps)

    def factor(step: int) -> float:
        if step + 1 < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule.type == "inverse_sqrt":
            return math.sqrt(warmup_steps / (step + 1))
        if schedule.type == "constant":
            return 1.0
        progress = (step + 1 - warmup_steps) / max(1, total_steps - warmup_steps)
        end = (schedule.end_lr or 0.0) / base_lr
        return end + (1 - end) * max(0.0, 1 - progress) ** (schedule.power or 1.0)

    return factor


def trained_moe_class(config: RunConfig) -> type[MoE]:
    """The class of the MoE layers of a config's model."""
    moe = config.model.moe
    return moe_class(config.zero_stage, moe is None or moe.frozen != "router_and_experts")


def build_engine(config: RunConfig, device: torch.device) -> tuple[Any, SparseClip]:
    """The DeepSpeed engine of a resolved config, with SparseClip in place of its clipping.

    Args:
        config: resolved for this world size, its vocab_size known.
        device: from `start_distributed`.

    Returns:
        The engine, whose module is a models.transformer.Transformer or EncoderDecoder, and its
        SparseClip.
    """
    with torch.device("cpu" if config.zero_stage == 3 else device):
        # Drawn on the device all the same: a CPU's generator would start ZeRO 3 elsewhere.
        model = build_model(
            config.model, config.training.seed, trained_moe_class(config), drawn_on=device
        )
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
        # AdamW multiplies it by the learning rate, so only the schedule's factor is left.
        weight_decay /= optimizer_params["lr"]
    factor = lr_factor(
        config.training.lr_schedule, optimizer_params["lr"], config.training.num_steps
    )
    deepspeed_config = copy.deepcopy(config.deepspeed)  # DeepSpeed takes keys out of it
    # SparseClip applies the threshold. DeepSpeed only needs one above 0 to call it in every mode.
    deepspeed_config["gradient_clipping"] = config.gradient_clipping or 1.0
    # The trainer reports; DeepSpeed's own lines would tear the progress display.
    deepspeed_config.setdefault("steps_per_print", 2**62)
    model_parameters = parameter_groups(model, weight_decay)  # while they have their shapes
    is_8_bit = config.deepspeed["optimizer"]["type"] == EIGHT_BIT
    if is_8_bit:
        min_8bit_size = optimizer_params.get("min_8bit_size", MIN_8BIT_SIZE)
        model_parameters = groups_by_bits(model, model_parameters, min_8bit_size)
    model_parameters = small_groups(model_parameters)
    fuse_torchs_adam(deepspeed_config)
    if config.zero_stage in (1, 2):
        # These allocate such a bucket in every backward pass, however small the model is.
        numel = sum(parameter.numel() for parameter in model.parameters())
        section = deepspeed_config["zero_optimization"]
        section["reduce_bucket_size"] = min(section.get("reduce_bucket_size", numel), numel)
    client_optimizer = take_client_optimizer(deepspeed_config)
    if config.zero_stage == 3:
        partition(model, deepspeed_config, DTYPES[config.dtype])
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
    if config.training.compile:
        compile_blocks(model)
    sparse_clip = SparseClip(config.gradient_clipping, config.sparse_clip.enabled, device)
    sparse_clip.install(engine)
    return engine, sparse_clip
