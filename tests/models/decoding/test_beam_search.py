"""Beam search against loops and against every sequence that there is."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from magnetar.models.config import ModelConfig
from magnetar.models.decoding.beam_search import (
    Sampling,
    Translation,
    default_max_len,
    drawn,
    translate,
)
from magnetar.models.moe.layer import SparseFeedForward
from magnetar.models.moe.noise import uniform
from magnetar.models.transformer import EncoderDecoder, empty_model
from tests.models import brute_force

VOCAB, EOS, S, MAX_LEN = 6, 1, 7, 12
MOE = {"num_experts": 4, "every": 2}
MODELS: dict[str, dict] = {
    "dense": {},
    "moe": {"moe": MOE},
    "capacity": {"moe": MOE | {"eval_capacity_fraction": 0.25}},
    "relative": {
        "attention_positions": "relative",
        "relative_buckets": 6,
        "relative_max_distance": 5,
        "moe": MOE,
    },
    "deepnorm": {"norm": "deepnorm", "num_decoder_layers": 3, "positions": "sinusoidal"},
    "xpos": {"attention_positions": "xpos", "xpos_scale_base": 7.0},
}
# float32: matmuls of other sizes sum in another order.
ROUNDING = 1e-5


def build(name: str = "dense", seed: int = 0, vocab: int = VOCAB) -> EncoderDecoder:
    base = {
        "architecture": "encoder_decoder",
        "vocab_size": vocab,
        "num_layers": 2,
        "d_model": 16,
        "d_ff": 24,
        "num_heads": 4,
        "max_seq_len": MAX_LEN,
        "dropout": 0.3,
    }
    model = empty_model(ModelConfig.model_validate(base | MODELS[name]))
    assert isinstance(model, EncoderDecoder)
    brute_force.randomize(model, seed)
    return model


def sources(lengths: list[int], seed: int = 0, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(0, vocab, (len(lengths), max(lengths)), generator=generator)
    padding = torch.arange(max(lengths)) >= torch.tensor(lengths).unsqueeze(1)
    return source, padding


def found(model: EncoderDecoder, lengths: list[int], seed: int = 0, **keys) -> list[Translation]:
    source, padding = sources(lengths, seed, model.config.vocab_size or 0)
    max_len = keys.pop("max_len", torch.full((len(lengths),), MAX_LEN))
    return translate(model, source, padding, EOS, max_len=max_len, **keys)


@torch.no_grad()
def next_log_probs(model: EncoderDecoder, source: Tensor, tokens: list[int]) -> list[float]:
    """Of the token after some tokens, everything computed anew, without padding."""
    model.eval()
    logits = model(source.unsqueeze(0), torch.tensor([[EOS, *tokens]])).logits[0, -1]
    return logits.double().log_softmax(-1).tolist()


def greedy(model: EncoderDecoder, source: Tensor, limit: int) -> Translation:
    tokens: list[int] = []
    total = 0.0
    while True:
        log_probs = next_log_probs(model, source, tokens)
        token = max(range(VOCAB), key=log_probs.__getitem__)
        if len(tokens) == limit - 1:
            token = EOS
        total += log_probs[token]
        if token == EOS:
            return Translation(tokens, total)
        tokens.append(token)


def beam_by_loops(
    model: EncoderDecoder, source: Tensor, limit: int, beam: int, penalty: float
) -> Translation:
    """The search of models.decoding.beam_search, one hypothesis at a time."""
    live, path = [(0.0, ())], ()
    ended: dict[tuple, float] = {}
    for length in range(1, limit + 1):
        steps = []
        for total, tokens in live:
            for token, value in enumerate(next_log_probs(model, source, list(tokens))):
                if length < limit or token == EOS:
                    steps.append((total + value, (*tokens, token)))
        steps.sort(reverse=True)
        if path is not None:
            own = [step for step in steps if step[1][:-1] == path]
            path_step = max(own)
            path = path_step[1]
        top = [step for step in steps[:beam] if step[1][-1] == EOS]
        if path is not None and path[-1] == EOS:
            top.append(path_step)
            path = None
        for total, tokens in top:
            ended[tokens] = total / length**penalty
        live = [step for step in steps if step[1][-1] != EOS][:beam]
        if path is not None and path not in [tokens for _, tokens in live]:
            live = [*live[: beam - 1], path_step]
        best = max(ended.values(), default=-math.inf)
        if not live or best >= max(total for total, _ in live) / limit**penalty:
            break
        if len(ended) >= beam and path is None:
            break
    tokens = max(ended, key=ended.__getitem__)
    return Translation(list(tokens[:-1]), ended[tokens])


def best_of_all(model: EncoderDecoder, source: Tensor, limit: int, penalty: float) -> Translation:
    """Of every sequence of fewer than limit tokens and the end."""
    size = model.config.vocab_size
    assert size is not None
    others = [token for token in range(size) if token != EOS]
    scored = []
    for n in range(limit):
        for tokens in itertools.product(others, repeat=n):
            total = 0.0
            for i, token in enumerate((*tokens, EOS)):
                total += next_log_probs(model, source, list(tokens[:i]))[token]
            scored.append(Translation(list(tokens), total / (n + 1) ** penalty))
    return max(scored, key=lambda translation: translation.score)


def same(one: Translation, other: Translation) -> None:
    assert one.tokens == other.tokens
    assert one.score == pytest.approx(other.score, rel=ROUNDING, abs=ROUNDING)


@pytest.mark.parametrize("name", MODELS)
def test_a_beam_of_1_is_greedy_decoding(name: str) -> None:
    lengths = [3, 7, 5, 1]
    for seed in range(3):
        model, (source, _) = build(name, seed), sources(lengths, seed)
        results = found(model, lengths, seed, beam=1, length_penalty=0.0)
        if name == "capacity":
            model = without_capacity(model)
        for row, length, result in zip(source, lengths, results, strict=True):
            same(result, greedy(model, row[:length], MAX_LEN))


def without_capacity(model: EncoderDecoder) -> EncoderDecoder:
    free = build("moe")
    free.load_state_dict(model.state_dict())
    return free


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.5])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_beam_that_holds_everything_finds_the_best_of_all_sequences(
    name: str, penalty: float
) -> None:
    limit, lengths = 4, [4, 2]
    for seed in range(2):
        model = build(name, seed, vocab=4)
        # 27 hypotheses of three tokens, 40 that end.
        max_len = torch.tensor([limit, limit])
        results = found(model, lengths, seed, beam=40, length_penalty=penalty, max_len=max_len)
        source, _ = sources(lengths, seed, vocab=4)
        for row, length, result in zip(source, lengths, results, strict=True):
            same(result, best_of_all(model, row[:length], limit, penalty))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([name for name in MODELS if name != "capacity"]),
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(1, S), min_size=1, max_size=4),
    beam=st.integers(1, 5),
    penalty=st.sampled_from([0.0, 0.6, 1.0, 1.4]),
    limit=st.integers(1, 7),
)
def test_the_search_is_that_of_plain_loops(
    name: str, seed: int, lengths: list[int], beam: int, penalty: float, limit: int
) -> None:
    model, (source, _) = build(name, seed), sources(lengths, seed)
    limits = torch.tensor([limit + i for i in range(len(lengths))])
    results = found(model, lengths, seed, beam=beam, length_penalty=penalty, max_len=limits)
    for row, length, own, result in zip(source, lengths, limits, results, strict=True):
        same(result, beam_by_loops(model, row[:length], int(own), beam, penalty))


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    seed=st.integers(0, 10_000),
    beam=st.integers(2, 5),
    penalty=st.sampled_from([0.0, 0.6, 1.0, 1.4]),
)
def test_no_beam_is_worse_than_greedy_decoding(
    name: str, seed: int, beam: int, penalty: float
) -> None:
    model, lengths = build(name, seed), [5, 7, 2, 3, 6, 4]
    wide = found(model, lengths, seed, beam=beam, length_penalty=penalty)
    narrow = found(model, lengths, seed, beam=1, length_penalty=penalty)
    for better, worse in zip(wide, narrow, strict=True):
        assert better.score >= worse.score - ROUNDING


def test_a_beam_alone_would_be_worse_than_greedy_decoding_somewhere() -> None:
    # Or else greedy's place would need no test: without it, some answer is worse.
    def worse_without(seed: int) -> bool:
        model, lengths = build("dense", seed), [5]
        source, _ = sources(lengths, seed)
        best = greedy(model, source[0], MAX_LEN)
        live, ended = [(0.0, ())], dict[tuple, float]()
        for length in range(1, MAX_LEN + 1):
            steps = sorted(
                (
                    (total + value, (*tokens, token))
                    for total, tokens in live
                    for token, value in enumerate(next_log_probs(model, source[0], list(tokens)))
                    if length < MAX_LEN or token == EOS
                ),
                reverse=True,
            )
            ended |= {t: total / length for total, t in steps[:2] if t[-1] == EOS}
            live = [step for step in steps if step[1][-1] != EOS][:2]
            if len(ended) >= 2:
                break
        return max(ended.values()) < best.score / (len(best.tokens) + 1) - ROUNDING

    assert any(worse_without(seed) for seed in range(40))


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_gives_what_each_sentence_gives_alone(name: str, beam: int) -> None:
    lengths = [7, 1, 4, 6, 2, 3]
    model, (source, _) = build(name), sources(lengths)
    together = found(model, lengths, beam=beam)
    for row, length, result in zip(source, lengths, together, strict=True):
        alone = translate(
            model,
            row[:length].unsqueeze(0),
            None,
            EOS,
            max_len=torch.tensor([MAX_LEN]),
            beam=beam,
        )
        same(result, alone[0])


@pytest.mark.parametrize("sampling", [None, Sampling(1.0, 0.9, 3)])
@pytest.mark.parametrize("name", MODELS)
def test_the_cache_changes_nothing(name: str, sampling: Sampling | None) -> None:
    model, lengths = build(name), [7, 3, 5]
    keys = {"beam": 3, "sampling": sampling}
    with_cache, without = (found(model, lengths, cached=c, **keys) for c in (True, False))
    for one, other in zip(with_cache, without, strict=True):
        same(one, other)


def test_the_encoder_and_its_keys_are_computed_once() -> None:
    model, calls = build(), Counter[str]()
    model.encoder.register_forward_hook(lambda *_: calls.update(["encoder"]))
    for block in model.decoder.blocks:
        block.cross_attention.kv_proj.register_forward_hook(
            lambda _module, given, _output: calls.update({"keys": 1, "rows": given[0].size(0)})
        )
    model.decoder.register_forward_hook(
        lambda _module, given, _output: calls.update({"steps": 1, "tokens": given[0].size(1)})
    )
    found(model, [5, 3, 4], beam=4)
    assert calls["encoder"] == 1
    assert (calls["keys"], calls["rows"]) == (2, 2 * 3), "each layer, each sentence, not each beam"
    assert calls["tokens"] == calls["steps"] > 1


def steps_needed(
    monkeypatch: pytest.MonkeyPatch, probs: list[list[float]], **keys: object
) -> tuple[int, Translation]:
    """Decoder steps, and the answer, with these probabilities of [other, end, other]."""
    model, table, steps = build(vocab=3), torch.tensor(probs).log(), list[int]()
    forward = model.decoder.forward

    def of_length(tokens: Tensor, *given: object, **named: object) -> object:
        output = forward(tokens, *given, **named)
        row = table[min(len(steps), len(table) - 1)]
        steps.append(1)
        return output._replace(logits=output.logits * 0 + row)

    monkeypatch.setattr(model.decoder, "forward", of_length)
    result = found(model, [3], **keys)[0]
    return len(steps), result


def test_the_search_stops_when_nothing_that_goes_on_can_win(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # After one step the end has 0.59, and all else together 0.41 at any length.
    probs = [[0.4, 0.59, 0.01]]
    steps, result = steps_needed(monkeypatch, probs, beam=4, length_penalty=0.0)
    assert (steps, result.tokens) == (1, [])
    # With a length penalty 0.4 might still be the first of many tokens that are certain.
    steps, _ = steps_needed(monkeypatch, probs, beam=4, length_penalty=1.0)
    assert steps > 1


def test_a_later_end_that_scores_better_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # The end is likeliest at once (0.5), but 0.45 and then certainty is better a token.
    probs = [[0.45, 0.5, 0.05], [0.01, 0.98, 0.01]]
    _, result = steps_needed(monkeypatch, probs, beam=2, length_penalty=1.0)
    assert result.tokens == [0]
    assert result.score == pytest.approx(math.log(0.45 * 0.98) / 2, rel=1e-6)
    _, result = steps_needed(monkeypatch, probs, beam=2, length_penalty=0.0)
    assert result.tokens == []


def test_the_limit_ends_what_would_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    probs = [[0.9, 1e-6, 0.1]]
    max_len = torch.tensor([5])
    steps, result = steps_needed(monkeypatch, probs, beam=2, max_len=max_len)
    assert (steps, result.tokens) == (5, [0] * 4)
    assert result.score == pytest.approx((4 * math.log(0.9) + math.log(1e-6)) / 5, rel=1e-3)


def test_no_translation_exceeds_the_decoders_positions() -> None:
    model = build()
    model.decoder.max_len = 4
    results = found(model, [3, 5], beam=2, max_len=torch.tensor([90, 3]))
    assert len(results[0].tokens) <= 3
    assert len(results[1].tokens) <= 2


@pytest.mark.parametrize("sampling", [None, Sampling()])
def test_what_is_not_allowed_is_not_chosen(sampling: Sampling | None) -> None:
    model, allowed = build(), torch.tensor([False, True, False, True, False, False])
    results = found(model, [3, 5, 7], beam=3, allowed=allowed, sampling=sampling)
    assert {token for result in results for token in result.tokens} <= {3}


def test_the_model_keeps_its_mode_its_capacity_and_no_gradients() -> None:
    model = build("capacity")
    for training in (True, False):
        model.train(training)
        found(model, [3], beam=2)
        assert all(module.training == training for module in model.modules())
    layers = [module for module in model.modules() if isinstance(module, SparseFeedForward)]
    assert [layer.moe.eval_capacity_fraction for layer in layers] == [0.25, 0.25]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("sampling", [None, Sampling()])
def test_ranks_that_are_done_keep_calling_the_model(sampling: Sampling | None) -> None:
    model, calls, active = build("moe"), [], []
    model.decoder.register_forward_hook(lambda *_: calls.append(1))
    expected = found(model, [3, 5], beam=2, sampling=sampling)
    needed = len(calls)
    calls.clear()

    def any_rank(is_active: bool) -> bool:
        active.append(is_active)
        return len(active) <= needed + 3

    assert found(model, [3, 5], beam=2, sampling=sampling, any_rank=any_rank) == expected
    assert len(calls) == needed + 3
    assert active == [True] * needed + [False] * 4


def test_draws_follow_the_models_distribution() -> None:
    model, draws = build(), 4000
    source, _ = sources([3])
    results = translate(
        model,
        source.expand(draws, -1),
        None,
        EOS,
        max_len=torch.full((draws,), 2),
        sampling=Sampling(seed=5),
    )
    counts = Counter(result.tokens[0] if result.tokens else EOS for result in results)
    probs = torch.tensor(next_log_probs(model, source[0], [])).exp()
    for token in range(VOCAB):
        # Five standard deviations of a binomial share: below 5 * 0.5 / sqrt(4000) = 0.04.
        assert counts[token] / draws == pytest.approx(float(probs[token]), abs=0.04)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("top_p", [0.3, 0.7, 1.0])
def test_draws_follow_the_probabilities_inside_the_nucleus(
    temperature: float, top_p: float
) -> None:
    logits = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.9])
    probs = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(5), key=lambda token: -probs[token])
    nucleus = list[int]()
    while order and sum(probs[token] for token in nucleus) < top_p:
        nucleus.append(order.pop(0))
    mass = sum(probs[token] for token in nucleus)
    draws = 40_000
    numbers = uniform(torch.arange(draws), 5, 0)
    tokens = drawn(logits.expand(draws, -1), numbers, Sampling(temperature, top_p)).flatten()
    counts = Counter(tokens.tolist())
    assert set(counts) <= set(nucleus)
    for token in nucleus:
        # Five standard deviations of a binomial share: at most 5 * 0.5 / sqrt(draws) = 0.0125.
        assert counts[token] / draws == pytest.approx(probs[token] / mass, abs=0.0125)


@pytest.mark.parametrize("sampling", [Sampling(5e-324), Sampling(1e-30), Sampling(1.0, 5e-324)])
def test_tiny_temperatures_and_shares_take_the_likeliest_token(sampling: Sampling) -> None:
    log_probs = torch.tensor([[-3.0, -0.7, -0.9, -torch.inf], [-200.0, -90.0, -95.0, -91.0]])
    tokens = drawn(log_probs, uniform(torch.arange(2), 4, 0), sampling)
    assert tokens.tolist() == [[1], [1]]


def test_a_draw_depends_on_seed_and_sentence_and_not_on_the_batch() -> None:
    model, lengths = build("moe"), [5, 5, 3, 7]
    ids = torch.tensor([4, 9, 2, 7])

    def texts(seed: int, sample_ids: Tensor = ids) -> list[list[int]]:
        results = found(model, lengths, sampling=Sampling(seed=seed), sample_ids=sample_ids)
        return [result.tokens for result in results]

    whole = texts(0)
    torch.rand(3)  # the global generator has no say
    assert texts(0) == whole
    assert texts(1) != whole
    assert texts(0, ids + 1) != whole
    source, padding = sources(lengths)
    alone = translate(
        model,
        source[2:3],
        padding[2:3],
        EOS,
        max_len=torch.tensor([MAX_LEN]),
        sampling=Sampling(),
        sample_ids=ids[2:3],
    )
    assert alone[0].tokens == whole[2]


def test_the_score_of_a_draw_is_the_models_own() -> None:
    model, lengths = build(), [5, 3]
    source, _ = sources(lengths)
    results = found(model, lengths, sampling=Sampling(0.7, 0.8), length_penalty=1.0)
    for row, length, result in zip(source, lengths, results, strict=True):
        total = sum(
            next_log_probs(model, row[:length], result.tokens[:i])[token]
            for i, token in enumerate([*result.tokens, EOS])
        )
        assert result.score == pytest.approx(total / (len(result.tokens) + 1), rel=1e-4)


def test_longer_sources_may_have_longer_translations() -> None:
    lengths = [default_max_len(n) for n in (1, 10, 100)]
    assert lengths == sorted(lengths)
    assert all(limit > n for limit, n in zip(lengths, (1, 10, 100), strict=True))


@pytest.mark.parametrize("top_p", [0.7, 1.0])
def test_rounding_does_not_change_what_is_drawn(top_p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1000, 16_000, generator=generator)
    nudged = logits + 1e-4 * torch.randn(logits.shape, generator=generator)
    numbers = uniform(torch.arange(1000), 16_000, 0)
    one, other = (drawn(each, numbers, Sampling(1.0, top_p)) for each in (logits, nudged))
    # Numbers that fall between sums of probabilities change 7 of these draws.
    assert (one != other).sum() <= 1
