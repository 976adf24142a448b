"""A split as the config's model sees it: its windows, and what is asked about them."""

from magnetar.data.text.masked_lm import Masking, denoising, masked_lm
from magnetar.data.text.packed_lm import Objective, PackedLM, causal
from magnetar.data.text.token_files import Prepared, TokenSplit
from magnetar.engine.config.schema import RunConfig


def windows(split: TokenSplit, config: RunConfig) -> PackedLM:
    """The windows of a split, with the objective of the config's architecture.

    Raises:
        UserError: the split is shorter than one window.
    """
    return PackedLM(split, config.data.seq_len, objective(config, split.vocab_size))


def objective(config: RunConfig, vocab_size: int) -> Objective:
    """What a model of the config's architecture learns on data of this vocabulary."""
    masking = config.data.masking
    if config.model.architecture == "decoder":
        return causal
    assert masking is not None
    mean_span_length = masking.mean_span_length if masking.unit == "span" else None
    how = Masking(masking.probability, mean_span_length, masking.replace, vocab_size)
    return masked_lm(how) if config.model.architecture == "encoder" else denoising(how)


def predicted_bytes(
    prepared: Prepared, valid: PackedLM, config: RunConfig, max_sequences: int | None
) -> int | None:
    """UTF-8 bytes of the text that validation predicts; None where the model has seen it."""
    if config.data.masking is not None:
        return None
    return prepared.num_text_bytes(valid.num_targets(max_sequences))


def unigram_perplexity(prepared: Prepared, config: RunConfig, num_tokens: int) -> float:
    """That of the frequencies of the very tokens asked about, or of those they are drawn from.

    Args:
        prepared: the data.
        config: the run's.
        num_tokens: that validation asked about.
    """
    # A decoder and an encoder-decoder predict all but the first, an encoder some of the split.
    stop = None if config.model.architecture == "encoder" else 1 + num_tokens
    return prepared.valid.unigram_perplexity(1, stop)
