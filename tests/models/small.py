"""Models of a few thousand numbers, none of which is 0 or 1."""

from typing import Any

from magnetar.models.config import ModelConfig
from magnetar.models.transformer import EncoderDecoder, Transformer, empty_model
from tests.models import brute_force

VOCAB = 23
SIZES = {"num_layers": 2, "d_model": 16, "d_ff": 24, "num_heads": 4, "max_seq_len": 12}


def config(**keys: Any) -> ModelConfig:
    return ModelConfig.model_validate({"vocab_size": VOCAB} | SIZES | keys)


def random_model(**keys: Any) -> Transformer | EncoderDecoder:
    model = empty_model(config(**keys))
    brute_force.randomize(model)
    return model
