"""One optimizer step of an engine."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import deepspeed.comm as dist
import torch
from torch import Tensor

from magnetar.engine.config.schema import RunConfig
from magnetar.models.losses import IGNORE_INDEX
from magnetar.models.moe.layer import RoutingStats
from magnetar.models.moe.router import balance_loss
from magnetar.models.transformer import ModelLosses


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
