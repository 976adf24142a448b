"""A DeepSpeed engine for a Magnetar model, and one training step of it."""

import copy
import hashlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from engine.admin import needs_profile, start_omegas
from engine.config import LRSchedule, RunConfig
from engine.deepspeed_keys import EIGHT_BIT
from engine.host_memory import keep_freed_memory
from engine.optimizers import (
    MIN_8BIT_SIZE,
    check_lengths,
    fuse_torchs_adam,
    groups_by_bits,
    small_groups,
    take_client_optimizer,
)
from engine.partition import partition
from engine.rendezvous import launched_local_size, use_rendezvous
from engine.shares import tensors_of_optimizer
from engine.sparse_clip import SparseClip
from engine.starting_weights import load_starting_weights, starts_from_weights
from engine.traffic import choose_ways
from engine.trained_run import DTYPES
from models.attention import expect_many_shapes
from models.compiled import compile_blocks
from models.deepspeed_moe import moe_class
from models.losses import IGNORE_INDEX
from models.moe import MoE, RoutingStats
from models.router import balance_loss
from models.transformer import ModelLosses, build_model, set_checkpointing


class LossWeights(NamedTuple):
    """What is minimised beside the cross entropy, and how much each counts.

    Attributes:
        aux: of the balance loss, averaged over MoE layers.
        z: of the mean of log^2 Z of the output logits (arXiv 2309.14322).
        router_z: of the mean of log^2 Z of the router logits, averaged over MoE layers (ST-MoE).
        balances_batch: whether the balance loss is that of the whole batch, and not of each
            accumulation step by itself.
        label_smoothing: of the targets in the cross entropy that is minimised; reported is that
            without it.
    """

    aux: float = 0.0
    z: float = 0.0
    router_z: float = 0.0
    balances_batch: bool = False
    label_smoothing: float = 0.0


def loss_weights(config: RunConfig) -> LossWeights:
    """The weights that a config asks for."""
    moe, training = config.model.moe, config.training
    weights = LossWeights(z=training.z_loss_weight, label_smoothing=training.label_smoothing)
    if moe is None:
        return weights
    return weights._replace(
        aux=moe.aux_loss_weight,
        router_z=moe.router_z_loss_weight,
        balances_batch=moe.balance_scope == "batch",
    )


class StepResult(NamedTuple):
    """What one optimizer step did. The mean over the ranks of a loss is the whole batch's.

    Attributes:
        loss: () float32, cross entropy in nats, a mean over all tokens that count.
        aux_loss: () float32, balance loss averaged over MoE layers, before its weight.
        z_loss: () float32, mean log^2 Z of the logits before its weight; 0 if that is 0.
        router_z_loss: () float32, that of the routers, averaged over MoE layers.
        routing: one RoutingStats a MoE layer, over this rank's micro-batches.
        lr: the learning rate of the update.
        num_targets: () int64, targets that count in the whole batch.
    """

    loss: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    router_z_loss: Tensor
    routing: list[RoutingStats]
    lr: float
    num_targets: Tensor


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
    choose_ways(model, config, device)
    if is_8_bit:
        check_lengths(tensor for _, tensor in tensors_of_optimizer(engine))
    if config.training.compile:
        compile_blocks(model)
    sparse_clip = SparseClip(config.gradient_clipping, config.sparse_clip.enabled, device)
    sparse_clip.install(engine)
    return engine, sparse_clip


MicroBatch = tuple[tuple[Tensor, ...], Tensor]  # the model's inputs, and its targets


def train_step(
    engine: Any,
    micro_batches: Iterable[MicroBatch],
    weights: LossWeights,
    seed: int,
    step: int,
    max_rows: int | None = None,
    before_update: Callable[[Tensor], None] | None = None,
) -> StepResult:
    """One optimizer step: forward and backward of each micro-batch, then clip and update.

    What is minimised is a mean over the tokens of the whole batch that count, whatever share of
    them a rank has: a rank, or the batch, may be all padding.

    Args:
        engine: from `build_engine`.
        micro_batches: gradient_accumulation_steps of them, on the engine's device.
        weights: of what is added to the cross entropy.
        seed: of the noise.
        step: of the noise, too: a resumed run draws what an uninterrupted one would have drawn.
        max_rows: of a micro-batch, where they have different numbers of rows; None: as many as
            each has. By it a row knows its place in the batch, which its noise follows.
        before_update: called with (), this rank's share of the loss of the whole batch, when all
            gradients are there.
    """
    batch = list(micro_batches)
    lr = engine.get_lr()[0]
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    counts = torch.stack([(targets != IGNORE_INDEX).sum() for _, targets in batch])
    counts = sum_over_ranks(counts)  # (gradient_accumulation_steps,)
    all_targets = counts.sum()
    num_targets = all_targets.clamp(min=1)

    def output_of(micro_step: int) -> ModelLosses:
        (inputs, targets), rank = batch[micro_step], dist.get_rank() if num_ranks > 1 else 0
        seed_dropout(seed, step, micro_step, rank)
        first = (micro_step * num_ranks + rank) * (max_rows or len(targets))
        keys = sample_keys(seed, step, first, targets)
        return engine(
            *inputs,
            sample_keys=keys,
            targets=targets,
            z_weight=weights.z,
            label_smoothing=weights.label_smoothing,
        )

    chosen = None  # each MoE layer's first choices in the whole batch
    if weights.balances_batch and len(batch) > 1:
        with torch.no_grad():
            chosen = first_choices([output_of(micro_step)[1] for micro_step in range(len(batch))])
    # DeepSpeed divides by both of them; what is reported is a mean over the ranks.
    scale = len(batch) * num_ranks
    reported, routings = [], []
    for micro_step in range(len(batch)):
        sums, routing = output_of(micro_step)
        # A rank's share of a mean over all ranks; a micro-batch weighs as much as its targets.
        aux_loss, router_z_loss = routing_losses(
            routing, chosen or first_choices([routing]), sums.cross_entropy
        )
        if chosen is None:
            share = counts[micro_step] / num_targets
            aux_loss, router_z_loss = share * aux_loss, share * router_z_loss
        total = sums.total / num_targets + weights.aux * aux_loss
        if weights.router_z:
            total = total + weights.router_z * router_z_loss
        engine.backward(total * scale)
        parts = [sums.cross_entropy / num_targets, aux_loss, sums.z_loss / num_targets]
        reported.append(torch.stack([*parts, router_z_loss]).detach() * scale)
        routings.append([RoutingStats(*(value.detach() for value in stats)) for stats in routing])
        if before_update is not None and len(reported) == len(batch):
            before_update(torch.stack(reported)[:, 0].sum() / scale)
        engine.step()  # updates at the last micro-batch
    loss, aux_loss, z_loss, router_z_loss = torch.stack(reported).mean(0)
    routing = [whole_batch(layer) for layer in zip(*routings, strict=True)]
    return StepResult(loss, aux_loss, z_loss, router_z_loss, routing, lr, all_targets)


def whole_batch(of_micro_batches: Sequence[RoutingStats]) -> RoutingStats:
    """A MoE layer's statistics of all micro-batches of a step."""
    whole = RoutingStats(*(sum(values) for values in zip(*of_micro_batches, strict=True)))
    return whole._replace(temperature=of_micro_batches[-1].temperature)


def seed_dropout(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Seed torch's generators, which draw dropout and skipped sublayers.

    A resumed run draws what an uninterrupted one would have drawn, and no generator's state needs
    saving; another layout draws otherwise.
    """
    torch.manual_seed(_hashed(seed, step, micro_step, rank))


def sample_keys(seed: int, step: int, first: int, targets: Tensor) -> Tensor:
    """(B,) int64: keys of the routers' noise, functions of (seed, step, place in the batch).

    Args:
        seed: of the noise.
        step: the optimizer step.
        first: place of the first of these samples in the whole batch.
        targets: (B, ...) of the samples.
    """
    return torch.arange(len(targets), device=targets.device) + (_hashed(seed, step) + first)


def _hashed(*numbers: int) -> int:
    """62 bits that depend on all numbers and their order."""
    key = "/".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 2


def sum_over_ranks(values: Tensor) -> Tensor:
    """The values, with those of the other ranks added in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def first_choices(routings: list[list[RoutingStats]]) -> list[Tensor]:
    """Each MoE layer's first choices (E,) int64, of some micro-batches of all ranks together."""
    layers = [sum(stats.first_choices for stats in layer) for layer in zip(*routings, strict=True)]
    if not layers:
        return []
    sizes = [len(layer) for layer in layers]
    return list(sum_over_ranks(torch.cat(layers)).split(sizes))


def routing_losses(
    routing: list[RoutingStats], chosen: list[Tensor], like: Tensor
) -> tuple[Tensor, Tensor]:
    """What a rank's micro-batch adds to the balance loss and the router z-loss of a batch.

    Args:
        routing: of the micro-batch.
        chosen: `first_choices` of the batch.
        like: a scalar of the losses' device.

    Returns:
        Two () float32, means over the MoE layers; 0 for a dense model.
    """
    if not routing:
        return torch.zeros_like(like), torch.zeros_like(like)
    aux_losses, z_losses = [], []
    for stats, counts in zip(routing, chosen, strict=True):
        aux_losses.append(balance_loss(stats.probs, counts))
        z_losses.append(stats.log_z_squared / counts.sum().clamp(min=1))
    return torch.stack(aux_losses).mean(), torch.stack(z_losses).mean()
