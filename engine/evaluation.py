"""Perplexity of a language model on the validation split."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import torch
from torch import nn

from data.packed_lm import PackedLM, valid_batches
from models.transformer import token_losses


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of the validation tokens.

    Attributes:
        loss: mean cross entropy, nats a token.
        perplexity: exp(loss).
        bits_per_byte: of the UTF-8 text; comparable between vocabularies.
        num_tokens: tokens predicted.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    num_tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: PackedLM,
    batch_size: int,
    device: torch.device,
    num_bytes: int,
    max_sequences: int | None = None,
    progress: Any = None,
) -> Evaluation:
    """Predict every token of a validation split once, spread over all ranks.

    Args:
        model: a Decoder; every rank calls this together, since MoE layers exchange tokens.
        dataset: the split, cut into windows.
        batch_size: windows a forward pass on each rank.
        device: the model's device.
        num_bytes: UTF-8 bytes of the text that is predicted.
        max_sequences: only the first so many windows; None: all of them.
        progress: called with the batches to wrap them in a progress bar; None: no bar.
    """
    distributed = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    batches: Iterator = valid_batches(dataset, batch_size, rank, world_size, max_sequences)
    for inputs, targets in progress(batches) if progress else batches:
        logits = model(torch.from_numpy(inputs).to(device)).logits
        loss_sum, num_tokens = token_losses(logits, torch.from_numpy(targets).to(device))
        totals += torch.stack([loss_sum.double(), num_tokens.double()])
    model.train(was_training)
    if distributed:
        dist.all_reduce(totals)
    loss_total, num_tokens = totals.tolist()
    return Evaluation(
        loss=loss_total / num_tokens,
        perplexity=math.exp(min(loss_total / num_tokens, 700.0)),
        bits_per_byte=loss_total / math.log(2) / num_bytes,
        num_tokens=int(num_tokens),
    )
