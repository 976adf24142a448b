"""What a model in training makes of the validation split: losses and, of pairs, translations."""

from typing import Any

from data.codec import parse_direction
from data.pair_batches import ValidBins
from data.pairs import PreparedPairs
from data.token_files import Prepared
from engine.config import RunConfig
from engine.evaluation import evaluate, evaluate_batches, rank_and_world_size
from engine.pair_data import rank_bins
from engine.run_data import RunData, ValidationSet
from engine.translation import Decoding, TranslationScores, evaluate_translation, validation_texts
from engine.windows import predicted_bytes

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
