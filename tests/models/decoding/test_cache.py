"""Decoding a few tokens at a time equals decoding all at once."""

import functools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from magnetar.models.config import ModelConfig
from magnetar.models.layers.attention import Cache
from magnetar.models.transformer import EncoderDecoder, Transformer, empty_model, set_checkpointing
from tests.models import brute_force
from tests.models.test_transformer import MOE, NORMS, POSITIONS

VOCAB, T, S = 23, 9, 7
# float32: matmuls of other sizes sum in another order.
ROUNDING = {"rtol": 1e-5, "atol": 2e-5}
CHUNKS = [[1] * T, [5, 3, 1], [4, 5], [1, 7, 1], [T]]


def build(architecture: str, **keys: object) -> Transformer | EncoderDecoder:
    base = {
        "architecture": architecture,
        "vocab_size": VOCAB,
        "num_layers": 2,
        "d_model": 16,
        "d_ff": 24,
        "num_heads": 4,
        "max_seq_len": 12,
        "dropout": 0.3,
        "attention_dropout": 0.3,
        "drop_path": 0.3,
    }
    model = empty_model(ModelConfig.model_validate(base | keys))
    # Smaller than elsewhere: logits of size 1, so that the tolerance is one of them.
    brute_force.randomize(model, std=0.15)
    return model.eval()


def token_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (batch, length), generator=generator)


def source_padding() -> Tensor:
    padding = torch.zeros(3, S, dtype=torch.bool)
    padding[1, -3:] = True
    padding[2, :2] = True
    return padding


def all_at_once(model: Transformer | EncoderDecoder, tokens: Tensor, is_padded: bool) -> Tensor:
    if isinstance(model, Transformer):
        return model(tokens).logits
    padding = source_padding() if is_padded else None
    return model(token_ids(3, S, seed=1), tokens, padding).logits


def in_chunks(
    model: Transformer | EncoderDecoder,
    tokens: Tensor,
    chunks: list[int],
    is_padded: bool,
    forgets_memory: bool = False,
) -> Tensor:
    decoder, memory, padding = model, None, None
    if isinstance(model, EncoderDecoder):
        decoder, padding = model.decoder, source_padding() if is_padded else None
        memory = model.encoder(token_ids(3, S, seed=1), padding).logits
    cache, found = Cache(len(decoder.blocks)), []
    for chunk in tokens.split(chunks, dim=1):
        output = decoder(chunk, memory=memory, memory_padding=padding, cache=cache)
        found.append(output.logits)
        memory = None if forgets_memory else memory
    assert cache.length == sum(chunks)
    return torch.cat(found, dim=1)


@torch.no_grad()
def check(model: Transformer | EncoderDecoder, chunks: list[int], is_padded: bool = True) -> None:
    tokens = token_ids(3, T)
    expected = all_at_once(model, tokens, is_padded)
    torch.testing.assert_close(in_chunks(model, tokens, chunks, is_padded), expected, **ROUNDING)


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_every_norm_decodes_token_by_token(architecture: str, norm: str, moe: dict | None) -> None:
    check(build(architecture, norm=norm, moe=moe), CHUNKS[0])


@pytest.mark.parametrize("over", ["head", "all_heads"])
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_grouped_heads_decode_token_by_token_with_a_smaller_cache(
    architecture: str, over: str
) -> None:
    keys = {"num_kv_heads": 2, "head_dim": 6, "qk_norm": True, "qk_norm_over": over}
    model = build(architecture, norm_type="rmsnorm", attention_positions="rotary", **keys)
    check(model, CHUNKS[1])
    decoder = getattr(model, "decoder", model)
    memory = None if decoder is model else model.encoder(token_ids(3, S)).logits
    cache = Cache(2)
    decoder(token_ids(3, T), memory=memory, cache=cache)
    assert cache.layers[1].own is not None
    assert [tuple(tensor.shape) for tensor in cache.layers[1].own] == 2 * [(3, 2, T, 6)]


@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_decoding_in_chunks_equals_decoding_at_once(
    architecture: str, kind: str, chunks: list[int], is_padded: bool
) -> None:
    moe = MOE if is_padded else None
    model = build(architecture, moe=moe, norm="normformer", qk_norm=True, **POSITIONS[kind])
    check(model, chunks, is_padded)


@torch.no_grad()
@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize("kind", POSITIONS)
def test_the_encoders_output_is_needed_once(kind: str, is_padded: bool) -> None:
    model, tokens = build("encoder_decoder", **POSITIONS[kind]), token_ids(3, T)
    found = in_chunks(model, tokens, [4, 1, 4], is_padded, forgets_memory=True)
    torch.testing.assert_close(found, all_at_once(model, tokens, is_padded), **ROUNDING)


@torch.no_grad()
@pytest.mark.parametrize("kind", POSITIONS)
def test_a_padded_prompt_decodes_like_the_whole(kind: str) -> None:
    model, tokens = build("decoder", moe=MOE, **POSITIONS[kind]), token_ids(3, T)
    padding = torch.zeros(3, T, dtype=torch.bool)
    padding[1, :2] = padding[2, 1] = True
    expected = model(tokens, padding).logits
    cache, first, found = Cache(2), 0, []
    for chunk in tokens.split([5, 1, 3], dim=1):
        first += chunk.size(1)
        found.append(model(chunk, padding[:, :first], cache=cache).logits)
    real = ~padding
    torch.testing.assert_close(torch.cat(found, dim=1)[real], expected[real], **ROUNDING)


@torch.no_grad()
@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_selected_rows_go_on_from_the_rows_that_they_come_from(
    architecture: str, kind: str
) -> None:
    model, rows = build(architecture, moe=MOE, **POSITIONS[kind]), torch.tensor([2, 0, 0, 1])
    decoder, memory, padding = model, None, None
    source = token_ids(3, S, seed=1)
    if isinstance(model, EncoderDecoder):
        decoder, padding = model.decoder, source_padding()
        memory = model.encoder(source, padding).logits
    begin, rest = token_ids(3, 4), token_ids(4, 3, seed=2)
    cache = Cache(2)
    decoder(begin, memory=memory, memory_padding=padding, cache=cache)
    cache.select(rows)
    memory, padding = (None if part is None else part[rows] for part in (memory, padding))
    found = decoder(rest, memory=memory, memory_padding=padding, cache=cache).logits
    whole = torch.cat([begin[rows], rest], dim=1)
    if isinstance(model, EncoderDecoder):
        expected = model(source[rows], whole, padding).logits
    else:
        expected = model(whole).logits
    torch.testing.assert_close(found, expected[:, 4:], **ROUNDING)
    assert cache.length == 7


def test_an_empty_cache_may_be_selected() -> None:
    cache = Cache(2)
    cache.select(torch.tensor([0, 1]))
    assert all(layer.own is None and layer.cross is None for layer in cache.layers)


@torch.no_grad()
def test_what_exceeds_the_positions_is_refused_and_what_fits_is_not() -> None:
    model, cache = build("decoder"), Cache(2)
    model(token_ids(1, 9), cache=cache)
    with pytest.raises(ValueError, match="a sequence of 13 tokens exceeds the model's max_seq_len"):
        model(token_ids(1, 4), cache=cache)
    assert cache.length == 9, "a refused call leaves the cache as it was"
    model(token_ids(1, 3), cache=cache)
    assert cache.length == 12


def test_a_model_that_recomputes_activations_fills_its_cache_too() -> None:
    model = build("decoder", dropout=0.0, attention_dropout=0.0, drop_path=0.0)
    tokens = token_ids(3, T)
    expected = model(tokens).logits
    set_checkpointing(model.train(), functools.partial(checkpoint, use_reentrant=False))
    found = in_chunks(model, tokens, [5, 4], is_padded=False)
    torch.testing.assert_close(found, expected, **ROUNDING)
