"""A DeepSpeed engine for a Magnetar model, and one training step of it."""

import copy
import hashlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from engine.admin import needs_profile, start_omegas
from engine.config import LRSchedule, RunConfig
from engine.sparse_clip import SparseClip
from engine.starting_weights import load_starting_weights, starts_from_weights
from models.deepspeed_moe import moe_class
from models.losses import token_losses
from models.moe import RoutingStats
from models.transformer import build_model, set_checkpointing


class LossWeights(NamedTuple):
    """What is minimised beside the cross entropy, and how much each counts.

    Attributes:
        aux: of the balance loss, averaged over MoE layers.
        z: of the mean of log^2 Z of the output logits (arXiv 2309.14322).
        router_z: of the mean of log^2 Z of the router logits, averaged over MoE layers (ST-MoE).
    """

    aux: float = 0.0
    z: float = 0.0
    router_z: float = 0.0


def loss_weights(config: RunConfig) -> LossWeights:
    """The weights that a config asks for."""
    moe, z = config.model.moe, config.training.z_loss_weight
    return (
        LossWeights(moe.aux_loss_weight, z, moe.router_z_loss_weight) if moe else LossWeights(z=z)
    )


class StepResult(NamedTuple):
    """What one optimizer step did, over this rank's samples.

    Attributes:
        loss: () float32, mean cross entropy a counted token, in nats.
        aux_loss: () float32, balance loss averaged over MoE layers, before its weight.
        z_loss: () float32, mean log^2 Z of the logits before its weight; 0 if that is 0.
        router_z_loss: () float32, that of the routers, averaged over MoE layers.
        routing: one RoutingStats a MoE layer, of the last micro-batch.
        lr: the learning rate of the update.
    """

    loss: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    router_z_loss: Tensor
    routing: list[RoutingStats]
    lr: float


def launched_rank() -> int:
    """This process's rank by its environment: deepspeed's or torchrun's, MPI's, or 0 alone."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def start_distributed() -> torch.device:
    """Join the launcher's process group (or make one of a single rank); return this rank's device.

    Raises:
        RuntimeError: if the other ranks cannot be reached.
    """
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("MAGNETAR_LOG_LEVEL", "WARNING"))
    # DeepSpeed calls this function by its old name; nobody here can do anything about it.
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.all_gather_into_tensor` is deprecated", FutureWarning
    )
    # DeepSpeed would compile a C++ op here that serves inference alone: 48 seconds, and a process
    # killed meanwhile leaves a lock file on which every later job hangs. The module must be
    # reached through sys.modules: `deepspeed.comm.torch` as an attribute is torch itself.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    if not any(name in os.environ for name in ("RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
        # Started by hand. Under MPI DeepSpeed asks mpi4py instead. Port 0: any that is free.
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    deepspeed.init_distributed(verbose=False)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        local_world_size = int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
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
    for (group_name, num_experts, is_matrix), parameters in sorted(
        found.items(), key=lambda item: item[0]
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


def build_engine(config: RunConfig, device: torch.device) -> tuple[Any, SparseClip]:
    """The DeepSpeed engine of a resolved config, with SparseClip in place of its clipping.

    Args:
        config: resolved for this world size, its vocab_size known.
        device: from `start_distributed`.

    Returns:
        The engine, whose module is a models.transformer.Transformer or EncoderDecoder, and its
        SparseClip.
    """
    with torch.device(device):
        model = build_model(config.model, config.training.seed, moe_class(config.zero_stage))
    if starts_from_weights(config):
        load_starting_weights(model, config)
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
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        config=deepspeed_config,
        model_parameters=parameter_groups(model, weight_decay),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, factor),
        dist_init_required=False,
    )
    sparse_clip = SparseClip(config.gradient_clipping, config.sparse_clip.enabled, device)
    sparse_clip.install(engine)
    return engine, sparse_clip


def seed_noise(seed: int, step: int) -> None:
    """Seed dropout for one optimizer step on this rank.

    The noise is a function of (seed, step, rank): a resumed run draws what an uninterrupted one
    would have drawn, and no generator's state needs saving.
    """
    key = f"{seed}/{step}/{dist.get_rank()}".encode()
    torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1)


def train_step(
    engine: Any,
    micro_batches: Iterable[tuple[tuple[Tensor, ...], Tensor]],
    weights: LossWeights,
) -> StepResult:
    """One optimizer step: forward and backward of each micro-batch, then clip and update.

    Args:
        engine: from `build_engine`.
        micro_batches: gradient_accumulation_steps pairs of the model's inputs and its targets,
            on the engine's device. Every rank's have the same number of counted targets.
        weights: of what is added to the cross entropy.
    """
    reported = []
    lr = engine.get_lr()[0]
    routing: list[RoutingStats] = []
    for inputs, targets in micro_batches:
        logits, routing = engine(*inputs)
        sums = token_losses(logits, targets, with_z_loss=weights.z > 0)
        loss, z_loss = sums.cross_entropy / sums.num_tokens, sums.z_loss / sums.num_tokens
        aux_loss = _mean([stats.aux_loss for stats in routing], loss)
        router_z_loss = _mean([stats.z_loss for stats in routing], loss)
        total = loss + weights.aux * aux_loss
        if weights.z:
            total = total + weights.z * z_loss
        if weights.router_z:
            total = total + weights.router_z * router_z_loss
        engine.backward(total)
        engine.step()  # updates at the last micro-batch
        reported.append(torch.stack([loss, aux_loss, z_loss, router_z_loss]).detach())
    loss, aux_loss, z_loss, router_z_loss = torch.stack(reported).mean(0)
    routing = [RoutingStats(*(value.detach() for value in stats)) for stats in routing]
    return StepResult(loss, aux_loss, z_loss, router_z_loss, routing, lr)


def _mean(of_layers: list[Tensor], like: Tensor) -> Tensor:
    """The mean over the MoE layers; 0 for a dense model."""
    return torch.stack(of_layers).mean() if of_layers else torch.zeros_like(like)
