"""A small model that has learnt nothing and its vocabulary, for tests of translation."""

from pathlib import Path

import torch

from magnetar.data.pairs.codec import Codec, tag
from magnetar.data.text.tokenizer import load_tokenizer, train_sentencepiece
from magnetar.models.config import ModelConfig
from magnetar.models.transformer import EncoderDecoder, empty_model
from magnetar.models.weights.load_save import save_weights
from tests.models import brute_force

LANGUAGES = ("de", "en", "zh")
MAX_LEN = 24
TEXTS = {
    ("de", "en"): (
        ["Das Meer ist ruhig.", "", "Zwei Schiffe", "Meer " * 40],
        ["The sea is calm.", "Nothing.", "Two ships", "Sea " * 40],
    ),
    ("en", "zh"): (["The sea", "A ship is here."], ["海洋", "船在这里。"]),
    ("de", "zh"): (["Meer"], ["海"]),
}


def make_vocabulary(folder: Path) -> Path:
    """A vocabulary with the tags of LANGUAGES, trained on TEXTS."""
    file = folder / "tokenizer.model"
    texts = [text for sides in TEXTS.values() for side in sides for text in side]
    train_sentencepiece(texts, 300, file, symbols=[tag(language) for language in LANGUAGES])
    return file


def make_codec(folder: Path) -> Codec:
    """The codec of that vocabulary."""
    return Codec(load_tokenizer(make_vocabulary(folder)), LANGUAGES)


def model_config(ep_size: int = 1, **keys: object) -> ModelConfig:
    """An encoder-decoder with MoE layers; some ids more than the vocabulary has."""
    base = {
        "architecture": "encoder_decoder",
        "vocab_size": 304,
        "num_layers": 2,
        "d_model": 16,
        "d_ff": 24,
        "num_heads": 4,
        "max_seq_len": MAX_LEN,
        "moe": {"num_experts": 4, "every": 2, "ep_size": ep_size},
    }
    return ModelConfig.model_validate(base | keys)


def make_model(**keys: object) -> EncoderDecoder:
    """Random weights, biases and norms too."""
    model = empty_model(model_config(**keys))
    assert isinstance(model, EncoderDecoder)
    brute_force.randomize(model)
    return model


def make_folder(folder: Path, **keys: object) -> Path:
    """A folder of weights with a vocabulary."""
    model = make_model(**keys)
    save_weights(folder, model.config, model.state_dict())
    make_vocabulary(folder)
    return folder


def scores_on_a_rank(folder: Path) -> tuple[dict, dict]:
    """What a rank with half of the experts finds; see tests.ranks."""
    import torch.distributed as dist

    from magnetar.engine.translation.translate import Decoding, evaluate_translation
    from magnetar.models.moe.all_to_all import Peers
    from magnetar.models.moe.layer import SparseFeedForward

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    whole = dict(make_model().named_parameters())
    part = empty_model(model_config(ep_size=2))
    assert isinstance(part, EncoderDecoder)
    for name, parameter in part.named_parameters():
        value = whole[name]
        if parameter.shape != value.shape:
            value = value.chunk(2)[dist.get_rank()]
        parameter.data.copy_(value.detach())
    for module in part.modules():
        if isinstance(module, SparseFeedForward):
            module.peers = Peers(dist.group.WORLD, dist.get_rank())
    codec = Codec(load_tokenizer(folder / "tokenizer.model"), LANGUAGES)
    scores = evaluate_translation(part, codec, TEXTS, Decoding(beam=3, batch_size=2))
    return scores.to_dict(), scores.examples
