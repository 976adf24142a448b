"""One optimizer step of an engine.

Letters: B rows of a micro-batch, T tokens of a row, E experts. A step has
gradient_accumulation_steps micro-batches on each rank.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import deepspeed.comm as dist
import numpy.typing as npt
import torch
from torch import Tensor

from magnetar.data.loader import RunData, TrainingBatches
from magnetar.engine.config.schema import TrainingConfig
from magnetar.engine.deepspeed_engine import DeepSpeedEngine
from magnetar.models.losses import IGNORE_INDEX
from magnetar.models.moe.config import MoEConfig
from magnetar.models.moe.layer import RoutingStats
from magnetar.models.moe.router import balance_loss
from magnetar.models.transformer import ModelLosses

MicroBatch = tuple[tuple[Tensor, ...], Tensor]  # the model's inputs, and its targets (B, T)


class LossWeights(NamedTuple):
    """The weights of the terms that are minimised beside the cross entropy.

    Attributes:
        aux: weight of the balance loss, averaged over MoE layers.
        z: weight of the mean of log^2 Z of the output logits (arXiv 2309.14322).
        router_z: weight of the mean of log^2 Z of the router logits, averaged over MoE layers
            (ST-MoE).
        balances_batch: True if the balance loss is computed over the whole batch, False if over
            each micro-step by itself.
        label_smoothing: share of each target's probability that is spread over the vocabulary in
            the minimised cross entropy. The reported cross entropy is without it.
    """

    aux: float = 0.0
    z: float = 0.0
    router_z: float = 0.0
    balances_batch: bool = False
    label_smoothing: float = 0.0


def loss_weights(moe: MoEConfig | None, training: TrainingConfig) -> LossWeights:
    """The weights that a config asks for."""
    return LossWeights(
        aux=moe.aux_loss_weight if moe else 0.0,
        z=training.z_loss_weight,
        router_z=moe.router_z_loss_weight if moe else 0.0,
        balances_batch=moe is not None and moe.balance_scope == "batch",
        label_smoothing=training.label_smoothing,
    )


class StepResult(NamedTuple):
    """What one optimizer step did.

    Each loss is a per-rank share. Averaged over ranks, it equals the loss of the whole batch.

    Attributes:
        loss: () float32, cross entropy in nats, the mean over all tokens that count.
        aux_loss: () float32, balance loss averaged over MoE layers, before its weight.
        z_loss: () float32, mean log^2 Z of the logits before its weight; 0 if the weight is 0.
        router_z_loss: () float32, mean log^2 Z of the router logits, averaged over MoE layers.
        routing: one RoutingStats for each MoE layer, over this rank's micro-batches.
        lr: learning rate of the update.
        num_targets: () int64, targets that count in the whole batch.
    """

    loss: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    router_z_loss: Tensor
    routing: list[RoutingStats]
    lr: float
    num_targets: Tensor


def training_batches(data: RunData, num_micro_steps: int, device: torch.device) -> TrainingBatches:
    """This rank's micro-batches of any step, on its device; a step has `num_micro_steps`."""

    def to_host(array: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        # Only a copy from pinned memory runs beside the computation.
        return tensor.pin_memory() if device.type == "cuda" else tensor

    def to_device(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    rank, world_size = dist.get_rank(), dist.get_world_size()
    return TrainingBatches(data, num_micro_steps, rank, world_size, to_host, to_device)


def train_step(
    engine: DeepSpeedEngine,
    micro_batches: Iterable[MicroBatch],
    weights: LossWeights,
    seed: int,
    step: int,
    max_rows: int | None = None,
    before_update: Callable[[Tensor], None] | None = None,
) -> StepResult:
    """One optimizer step: forward and backward of each micro-batch, then clip and update.

    The minimised loss is a mean over the tokens of the whole batch that count, however many of
    them a rank has. A rank's part, or the whole batch, may be all padding.

    Args:
        engine: the engine of `build_engine`.
        micro_batches: the gradient_accumulation_steps micro-batches of this step, on the engine's
            device.
        weights: the weights of the terms beside the cross entropy.
        seed: seed of the noise.
        step: number of the batch. The noise depends on it, so a resumed run draws what an
            uninterrupted one would have drawn.
        max_rows: upper bound of the rows of a micro-batch if they differ, None if each has the
            same number. A row's place in the batch, which its noise depends on, follows from it.
        before_update: function that is called once all gradients are there, with (), this rank's
            share of the loss of the whole batch.
    """
    batch = list(micro_batches)
    lr = engine.get_lr()[0]
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if num_ranks > 1 else 0
    counts = torch.stack([(targets != IGNORE_INDEX).sum() for _, targets in batch])
    counts = sum_over_ranks(counts)  # (micro-steps,)
    all_targets = counts.sum()  # ()
    num_targets = all_targets.clamp(min=1)  # a batch may be all padding

    def output_of(micro_step: int) -> ModelLosses:
        inputs, targets = batch[micro_step]  # (B, T) each
        # A resumed run draws the dropout and the skipped sublayers that an uninterrupted one would
        # have drawn, so no generator's state needs saving. Another layout draws other numbers.
        torch.manual_seed(_hashed(seed, step, micro_step, rank))
        first = (micro_step * num_ranks + rank) * (max_rows or len(targets))
        # Keys of the routers' noise are functions of (seed, step, place in the whole batch).
        keys = torch.arange(len(targets), device=targets.device) + (_hashed(seed, step) + first)
        return engine(
            *inputs,
            sample_keys=keys,  # (B,) int64
            targets=targets,
            z_weight=weights.z,
            label_smoothing=weights.label_smoothing,
        )

    chosen = None  # of each MoE layer, first choices in the whole batch: (E,)
    if weights.balances_batch and len(batch) > 1:
        # The balance loss of a micro-batch needs the counts of the later ones, so all of them run
        # forward once more, with the same noise.
        with torch.no_grad():
            chosen = first_choices([output_of(micro_step)[1] for micro_step in range(len(batch))])
    # DeepSpeed divides a loss by the micro-steps, and averages gradients over the ranks. Our
    # losses are shares of a sum over both.
    scale = len(batch) * num_ranks
    reported, routings = [], []
    for micro_step in range(len(batch)):
        sums, routing = output_of(micro_step)
        aux_loss, router_z_loss = routing_losses(
            routing, chosen or first_choices([routing]), sums.cross_entropy
        )  # () each
        if chosen is None:  # a micro-batch weighs as much as its targets
            share = counts[micro_step] / num_targets
            aux_loss, router_z_loss = share * aux_loss, share * router_z_loss
        total = sums.total / num_targets + weights.aux * aux_loss  # ()
        if weights.router_z:
            total = total + weights.router_z * router_z_loss
        engine.backward(total * scale)
        parts = [sums.cross_entropy / num_targets, aux_loss, sums.z_loss / num_targets]
        reported.append(torch.stack([*parts, router_z_loss]).detach() * scale)  # (4,)
        routings.append([RoutingStats(*(value.detach() for value in stats)) for stats in routing])
        if before_update is not None and len(reported) == len(batch):
            before_update(torch.stack(reported)[:, 0].sum() / scale)
        engine.step()  # updates at the last micro-batch
    loss, aux_loss, z_loss, router_z_loss = torch.stack(reported).mean(0)  # (micro-steps, 4)
    routing = [whole_batch(layer) for layer in zip(*routings, strict=True)]
    return StepResult(loss, aux_loss, z_loss, router_z_loss, routing, lr, all_targets)


def whole_batch(of_micro_batches: Sequence[RoutingStats]) -> RoutingStats:
    """Statistics of one MoE layer over all micro-batches of a step."""
    whole = RoutingStats(*(sum(values) for values in zip(*of_micro_batches, strict=True)))
    return whole._replace(temperature=of_micro_batches[-1].temperature)


def _hashed(*numbers: int) -> int:
    """A number of 62 bits that depends on all numbers and their order."""
    key = "/".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 2


def sum_over_ranks(values: Tensor) -> Tensor:
    """The values after an all_reduce in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def first_choices(routings: list[list[RoutingStats]]) -> list[Tensor]:
    """First choices of each MoE layer, summed over some micro-batches and all ranks: (E,) int64."""
    layers = [sum(stats.first_choices for stats in layer) for layer in zip(*routings, strict=True)]
    if not layers:
        return []
    sizes = [len(layer) for layer in layers]
    return list(sum_over_ranks(torch.cat(layers)).split(sizes))


def routing_losses(
    routing: list[RoutingStats], chosen: list[Tensor], like: Tensor
) -> tuple[Tensor, Tensor]:
    """One micro-batch's share of the balance loss and of the router z-loss of a batch.

    Args:
        routing: statistics of the micro-batch, one for each MoE layer.
        chosen: `first_choices` of the batch.
        like: a scalar on the device of the losses.

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
