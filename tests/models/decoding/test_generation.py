"""Sampling against brute force on tiny vocabularies."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from magnetar.data.errors import UserError
from magnetar.models.config import ModelConfig
from magnetar.models.decoding.generation import _draw, sample
from magnetar.models.transformer import Transformer, empty_model
from tests.models import brute_force

VOCAB, MAX_LEN = 11, 8


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(
        vocab_size=VOCAB,
        num_layers=2,
        d_model=16,
        d_ff=16,
        num_heads=2,
        max_seq_len=MAX_LEN,
        dropout=0.3,
        moe={"num_experts": 4, "dispatch": "capacity", "capacity_factor": 0.5},
    )
    decoder = empty_model(config)
    assert isinstance(decoder, Transformer)
    brute_force.randomize(decoder)
    return decoder


def prompt(length: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, VOCAB, (batch, length), generator=generator)


def greedy(model: Transformer, tokens: Tensor, num_tokens: int) -> list[list[int]]:
    """The most probable next token of each prompt, one prompt and one token at a time."""
    model.eval()
    rows = tokens.tolist()
    for row in rows:
        for _ in range(num_tokens):
            logits = model(torch.tensor([row[-MAX_LEN:]])).logits[0, -1].tolist()
            row.append(max(range(VOCAB), key=logits.__getitem__))
    model.train()
    return rows


@pytest.mark.parametrize("length", [1, 5, MAX_LEN, MAX_LEN + 1, 3 * MAX_LEN])
def test_temperature_0_takes_the_most_probable_token(model: Transformer, length: int) -> None:
    tokens = prompt(length)
    found = sample(model, tokens, 6, temperature=0.0)
    assert found.tolist() == greedy(model, tokens, 6)


def test_a_long_prompt_is_seen_through_its_last_tokens(model: Transformer) -> None:
    tokens = prompt(3 * MAX_LEN)
    other = tokens.clone()
    other[:, : 2 * MAX_LEN] = (other[:, : 2 * MAX_LEN] + 1) % VOCAB
    for temperature in (0.0, 1.0):
        first, second = (sample(model, t, 5, temperature=temperature) for t in (tokens, other))
        assert torch.equal(first[:, 2 * MAX_LEN :], second[:, 2 * MAX_LEN :])


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model: Transformer) -> None:
    tokens, texts = prompt(3), []
    for seed in (1, 1, 2):
        torch.rand(3)  # the global generator has no say
        texts.append(sample(model, tokens, 30, temperature=1.0, top_p=1.0, seed=seed))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert torch.equal(texts[0][:, :3], tokens)
    assert texts[0].shape == (2, 33)


def test_sampling_leaves_the_model_in_its_mode_and_its_weights_without_gradients(
    model: Transformer,
) -> None:
    for training in (True, False):
        model.train(training)
        sample(model, prompt(2), 2)
        assert model.training == training
        assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def nucleus(probs: list[float], top_p: float) -> set[int]:
    """The fewest tokens, most probable first, whose probabilities sum to at least top_p."""
    chosen: set[int] = set()
    total = 0.0
    for token in sorted(range(len(probs)), key=lambda token: -probs[token]):
        if total >= top_p:
            break
        chosen.add(token)
        total += probs[token]
    return chosen


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution_inside_the_nucleus(temperature: float, top_p: float) -> None:
    logits = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.9])
    scaled = (logits.double() / temperature).tolist()
    exponentials = [torch.tensor(s).exp().item() for s in scaled]
    probs = [e / sum(exponentials) for e in exponentials]
    allowed = nucleus(probs, top_p)
    draws = 20_000
    generator = torch.Generator().manual_seed(0)
    found = _draw(logits.expand(draws, -1), temperature, top_p, generator)
    assert found.shape == (draws, 1)
    counts = Counter(found.flatten().tolist())
    assert set(counts) == allowed
    mass = sum(probs[token] for token in allowed)
    for token in allowed:
        expected = probs[token] / mass
        # Four standard deviations of a binomial share: below 4 * 0.5 / sqrt(20000) = 0.0142.
        assert counts[token] / draws == pytest.approx(expected, abs=0.0142)


@pytest.mark.parametrize("temperature", [5e-324, 1e-50, 1e-30, 1e-6])
@pytest.mark.parametrize("top_p", [5e-324, 1e-50, 1.0])
def test_tiny_temperatures_and_shares_are_the_limit(temperature: float, top_p: float) -> None:
    logits = torch.tensor([[0.3, 80.0, -1000.0, 79.0], [-5.0, -70.0, -71.0, -80.0]])
    generator = torch.Generator().manual_seed(0)
    for given in ((temperature, 1.0), (1.0, top_p / 2), (temperature, top_p)):
        if given[1] == 1.0 and given[0] == 1.0:
            continue
        found = _draw(logits, *given, generator).flatten().tolist()
        assert found == [1, 0] or given == (1.0, 0.5)
    huge = _draw(logits, 1e308, 1.0, generator)
    assert huge.shape == (2, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_whose_logits_are_no_numbers_says_so(
    model: Transformer, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = model.forward

    def damaged(*given: object, **keys: object) -> object:
        output = forward(*given, **keys)
        return output._replace(logits=output.logits + value)

    monkeypatch.setattr(model, "forward", damaged)
    with pytest.raises(UserError, match=r"logits are NaN or infinite: use an earlier checkpoint"):
        sample(model, prompt(2), 2)


def test_text_stays_in_the_nucleus_of_the_models_own_distribution(model: Transformer) -> None:
    text = sample(model, prompt(1, batch=16), 6, temperature=1.0, top_p=0.4)
    model.eval()
    for row in text:
        for end in range(1, row.numel()):
            with torch.no_grad():
                logits = model(row[:end].unsqueeze(0)).logits[0, -1].double()
            assert row[end].item() in nucleus(logits.softmax(-1).tolist(), 0.4)
    model.train()


def test_equal_logits_are_drawn_in_a_fixed_order() -> None:
    # A stable sort: which of two equal tokens is inside the nucleus does not vary.
    generator = torch.Generator().manual_seed(0)
    found = _draw(torch.zeros(200, 4), 1.0, 0.5, generator)
    assert set(found.flatten().tolist()) == {0, 1}


@pytest.mark.parametrize(
    "keys",
    [
        {"attention_positions": "xpos_relative", "relative_max_distance": 17},
        {"positions": "sinusoidal", "norm": "deepnorm"},
        {"positions": "none", "attention_positions": "rotary", "norm": "normformer"},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 5, MAX_LEN])
def test_a_cache_changes_no_choice(keys: dict, length: int) -> None:
    base = {"vocab_size": VOCAB, "num_layers": 2, "d_model": 16, "d_ff": 16, "num_heads": 2}
    config = ModelConfig.model_validate(base | {"max_seq_len": MAX_LEN} | keys)
    decoder = empty_model(config)
    assert isinstance(decoder, Transformer)
    brute_force.randomize(decoder)
    tokens = prompt(length)
    found = sample(decoder, tokens, MAX_LEN + 2, temperature=0.0)
    assert found.tolist() == greedy(decoder, tokens, MAX_LEN + 2)


def test_each_step_sees_one_new_token_until_the_positions_are_used_up(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    forward = model.forward

    def counted(tokens: Tensor, *given: object, **keys: object) -> object:
        lengths.append(tokens.size(1))
        return forward(tokens, *given, **keys)

    monkeypatch.setattr(model, "forward", counted)
    sample(model, prompt(3), 8)
    assert lengths == [3, 1, 1, 1, 1, 1, MAX_LEN, MAX_LEN]
    assert torch.equal(sample(model, prompt(3), 0), prompt(3))
