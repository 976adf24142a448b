"""Loss, perplexity and translation scores of a model on the validation split."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import deepspeed.comm as dist
import torch
from torch import nn

from magnetar.data.loader import RunData
from magnetar.data.text.packed_lm import Batch
from magnetar.engine.deepspeed_engine import DeepSpeedEngine
from magnetar.engine.translation.translate import (
    Decoding,
    TranslationScores,
    evaluate_translation,
)

NUM_EXAMPLES = 3
BATCH_SIZE = 64  # sentences that are translated at once
Example = tuple[str, str, str, str]  # direction, source, reference, translation


@dataclass
class Evaluations:
    """The evaluations of one run.

    Attributes:
        engine: the engine.
        data: the run's data.
        num_translations: validation sentences of each direction that are translated.
        before: values of the initial weights; empty before they are evaluated.
        after: values of the last evaluation; empty before the first one after a step.
        examples: a few translations by the initial weights.
    """

    engine: DeepSpeedEngine
    data: RunData
    num_translations: int
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)

    def evaluate_initial(self) -> dict[str, float]:
        """Evaluate the initial weights; every rank calls this."""
        self.before, self.examples = self._values()
        return self.before

    def evaluate(self) -> dict[str, float]:
        """Evaluate the weights as they are now; every rank calls this."""
        self.after, _ = self._values()
        return self.after

    def _values(self) -> tuple[dict[str, float], list[Example]]:
        """What is recorded of an evaluation, and a few translations.

        The values are loss and perplexity and, if something is translated, BLEU and chrF: their
        means, and the values of each direction such as bleu/en-de. Decoding is greedy, since only
        the course of the curve matters.
        """
        engine, data = self.engine, self.data
        batch_size = engine.train_micro_batch_size_per_gpu()
        batches = data.valid_batches(batch_size, *rank_and_world_size())
        found = evaluate(engine.module, batches, engine.device, data.predicted_bytes())
        values = found.to_dict()
        scores = self.translations(beam=1)
        if scores is not None:
            values |= {"bleu": scores.bleu, "chrf": scores.chrf}
            for direction, score in scores.directions.items():
                name = "-".join(direction)
                values |= {f"bleu/{name}": score.bleu, f"chrf/{name}": score.chrf}
        return values, examples_of(scores)

    def translations(self, beam: int) -> TranslationScores | None:
        """Scores of the first sentences of each direction; None if nothing is translated.

        Every rank calls this.
        """
        asked = self.data.to_translate(self.num_translations) if self.num_translations else None
        if asked is None:
            return None
        decoding = Decoding(beam=beam, batch_size=BATCH_SIZE)
        return evaluate_translation(self.engine.module, asked.codec, asked.texts, decoding)


def examples_of(scores: TranslationScores | None) -> list[Example]:
    """One translation of each of a few directions."""
    if scores is None:
        return []
    found = list(scores.examples.items())
    every = max(1, len(found) // NUM_EXAMPLES)
    return [("-".join(d), *texts) for d, texts in found[::every][:NUM_EXAMPLES]]


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts the validation tokens.

    Attributes:
        loss: mean cross entropy in nats per token that is asked about.
        perplexity: exp(loss).
        bits_per_byte: bits per UTF-8 byte of the text, comparable between vocabularies. None for
            a model that has seen the text with masks, since its loss is no probability of the
            text, and for translations.
        num_tokens: tokens that are asked about.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    num_tokens: int

    def to_dict(self) -> dict[str, float]:
        """The values that are not None, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def rank_and_world_size() -> tuple[int, int]:
    """This rank and the number of ranks: 0 and 1 without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    num_bytes: int | None = None,
) -> Evaluation:
    """Loss and perplexity over the batches of all ranks.

    Args:
        model: the model; every rank calls this together, since MoE layers exchange tokens.
        batches: this rank's batches. Every rank has the same number.
        device: the model's device.
        num_bytes: UTF-8 bytes of the predicted text; None if bits per byte mean nothing.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # loss, tokens
    for inputs, targets in batches:
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
