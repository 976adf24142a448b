"""Loss and perplexity of a model on the validation split."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import deepspeed.comm as dist
import torch
from torch import nn

from magnetar.data.pairs.batches import ValidBins
from magnetar.data.pairs.codec import parse_direction
from magnetar.data.pairs.folder import PreparedPairs
from magnetar.data.text.packed_lm import Batch, PackedLM, valid_batches
from magnetar.data.text.token_files import Prepared
from magnetar.engine.config.schema import RunConfig
from magnetar.engine.pair_data import rank_bins
from magnetar.engine.run_data import RunData, ValidationSet
from magnetar.engine.translation.translate import (
    Decoding,
    TranslationScores,
    evaluate_translation,
    validation_texts,
)
from magnetar.engine.windows import predicted_bytes

NUM_EXAMPLES = 3
BATCH_SIZE = 64  # sentences that are translated at once
Example = tuple[str, str, str, str]  # direction, source, reference, translation


def evaluation(
    engine: Any, config: RunConfig, prepared: RunData, valid: ValidationSet
) -> tuple[dict[str, float], list[Example]]:
    """What is written of an evaluation, and a few translations; every rank takes part.

    Args:
        engine: of the model.
        config: the run's.
        prepared: its data.
        valid: its validation set.

    Returns:
        Loss and perplexity and, where something is translated (greedily: it is a curve that
        matters), BLEU and chrF, as means and, such as bleu/en-de, of each direction.
    """
    values = _losses(engine, config, prepared, valid)
    scores = validation_translations(engine, config, prepared, beam=1)
    if scores is not None:
        values |= {"bleu": scores.bleu, "chrf": scores.chrf}
        for direction, score in scores.directions.items():
            name = "-".join(direction)
            values |= {f"bleu/{name}": score.bleu, f"chrf/{name}": score.chrf}
    return values, examples_of(scores)


def _losses(
    engine: Any, config: RunConfig, prepared: RunData, valid: ValidationSet
) -> dict[str, float]:
    model, device = engine.module, engine.device
    if isinstance(valid, ValidBins):
        batches = rank_bins(valid, *rank_and_world_size())
        return evaluate_batches(model, batches, device).to_dict()
    assert isinstance(prepared, Prepared)
    batch_size = engine.train_micro_batch_size_per_gpu()
    num_sequences = config.training.eval_sequences
    num_bytes = predicted_bytes(prepared, valid, config, num_sequences)
    return evaluate(model, valid, batch_size, device, num_bytes, num_sequences).to_dict()


def validation_translations(
    engine: Any, config: RunConfig, prepared: RunData, beam: int
) -> TranslationScores | None:
    """How well the first sentences of each direction are translated; None where nothing is.

    Every rank takes part.
    """
    decoding = Decoding(beam=beam, batch_size=BATCH_SIZE)
    num_sentences = config.training.eval_translations
    if not num_sentences or config.data.pairs is None:
        return None
    assert isinstance(prepared, PreparedPairs)
    named = config.data.pairs.directions
    directions = None
    if named is not None:
        directions = [parse_direction(name, prepared.languages) for name in named]
    texts = validation_texts(prepared, directions, num_sentences)
    return evaluate_translation(engine.module, prepared.codec, texts, decoding)


def examples_of(scores: TranslationScores | None) -> list[Example]:
    """One translation of each of a few directions."""
    if scores is None:
        return []
    found = list(scores.examples.items())
    every = max(1, len(found) // NUM_EXAMPLES)
    return [("-".join(d), *texts) for d, texts in found[::every][:NUM_EXAMPLES]]


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of the validation tokens.

    Attributes:
        loss: mean cross entropy, nats a token asked about.
        perplexity: exp(loss).
        bits_per_byte: of the UTF-8 text; comparable between vocabularies. None for a model that
            has seen the text with masks, since it then does not say how probable the text is.
        num_tokens: tokens asked about: all, or the masked ones.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    num_tokens: int

    def to_dict(self) -> dict[str, float]:
        """What there is."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def evaluate(
    model: nn.Module,
    dataset: PackedLM,
    batch_size: int,
    device: torch.device,
    num_bytes: int | None,
    max_sequences: int | None = None,
    progress: Any = None,
) -> Evaluation:
    """Ask about every window of a validation split once, spread over all ranks.

    Args:
        model: every rank calls this together, since MoE layers exchange tokens.
        dataset: the split, cut into windows, with the model's objective.
        batch_size: windows a forward pass on each rank.
        device: the model's device.
        num_bytes: UTF-8 bytes of the text that is predicted; None where bits a byte mean nothing.
        max_sequences: only the first so many windows; None: all of them.
        progress: called with the batches to wrap them in a progress bar; None: no bar.
    """
    batches = valid_batches(dataset, batch_size, *rank_and_world_size(), max_sequences)
    return evaluate_batches(model, batches, device, num_bytes, progress)


def rank_and_world_size() -> tuple[int, int]:
    """This rank and how many there are: 0 and 1 without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@torch.no_grad()
def evaluate_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    num_bytes: int | None = None,
    progress: Any = None,
) -> Evaluation:
    """Ask about this rank's batches, of which every rank has as many; see `evaluate`."""
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for inputs, targets in progress(batches) if progress else batches:
        asked, *given = (torch.from_numpy(array).to(device) for array in (targets, *inputs))
        sums = model(*given, targets=asked).losses
        totals += torch.stack([sums.cross_entropy.double(), sums.num_tokens.double()])
    model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(totals)
    loss_total, num_tokens = totals.tolist()
    return Evaluation(
        loss=loss_total / num_tokens,
        perplexity=math.exp(min(loss_total / num_tokens, 700.0)),
        bits_per_byte=loss_total / math.log(2) / num_bytes if num_bytes else None,
        num_tokens=int(num_tokens),
    )
