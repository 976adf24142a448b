"""Positions against loops over their papers' formulas."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from magnetar.models.layers.positions import (
    RelativeBias,
    Rotary,
    fairseq_sinusoidal_table,
    relative_bucket,
    sinusoidal_table,
)
from tests.models import brute_force
from tests.models.small import random_model

DISTANCES = [*range(-700, 701), -5000, 5000, -(10**6), 10**6]


@pytest.mark.parametrize(("length", "width"), [(1, 4), (9, 6), (700, 16)])
def test_sinusoids_equal_the_papers_formula(length: int, width: int) -> None:
    for kind, table in (
        ("sinusoidal", sinusoidal_table(length, width)),
        ("sinusoidal_fairseq", fairseq_sinusoidal_table(length, width)),
    ):
        expected = [brute_force.position_vector(kind, p, width) for p in range(length)]
        assert table.dtype == torch.float32
        # fairseq computes its angles in float32: up to 700 * 2^-24, once for each factor.
        tolerance = 1e-7 if kind == "sinusoidal" else 2e-4
        torch.testing.assert_close(table.double(), torch.stack(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(
    ("num_buckets", "max_distance"),
    [(32, 128), (32, 20), (6, 5), (8, 8), (4, 3), (4, 800), (320, 800), (64, 500), (10, 60)],
)
def test_buckets_equal_t5s_formula_in_whole_numbers(
    num_buckets: int, max_distance: int, both: bool
) -> None:
    found = relative_bucket(torch.tensor(DISTANCES), num_buckets, max_distance, both).tolist()
    expected = [
        brute_force.relative_bucket(distance, num_buckets, max_distance, both)
        for distance in DISTANCES
    ]
    different = [
        (distance, a, b)
        for distance, a, b in zip(DISTANCES, found, expected, strict=True)
        if a != b
    ]
    assert different == []


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(("first", "queries", "keys"), [(0, 6, 6), (4, 1, 5), (3, 2, 9)])
def test_a_bias_is_looked_up_by_the_distance_of_each_pair(
    first: int, queries: int, keys: int, both: bool
) -> None:
    module = RelativeBias(8, 3, 6, both)
    brute_force.randomize(module)
    bias = module(first, queries, keys)
    assert bias.shape == (1, 3, queries, keys)
    for t in range(queries):
        for s in range(keys):
            bucket = brute_force.relative_bucket(s - (first + t), 8, 6, both)
            assert torch.equal(bias[0, :, t, s], module.weight[bucket])  # a look-up


def heads(seed: int, length: int = 1, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 1, length, width, generator=generator)


@pytest.mark.parametrize("scale_base", [None, 512.0, 20.0])
@pytest.mark.parametrize("distance", [0, 1, 3, 50])
def test_turned_queries_and_keys_depend_on_their_distance_alone(
    scale_base: float | None, distance: int
) -> None:
    rotary, q, k = Rotary(8, 200, scale_base), heads(0), heads(1)
    expected = brute_force.rotary_product(q.flatten(), k.flatten(), distance, scale_base).item()
    for position in (0, 1, 17, 149):
        turned_q, _ = rotary(q, q, position + distance)
        _, turned_k = rotary(k, k, position)
        # Queries grow as keys shrink: rounding, relative to factors of up to 3.5^(100 / 20).
        found = (turned_q * turned_k).sum().item()
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_later_chunk_is_turned_like_its_part_of_the_whole() -> None:
    rotary, q, k = Rotary(8, 20, 9.0), heads(0, 12), heads(1, 12)
    whole = rotary(q, k, 0)
    part = rotary(q[:, :, 5:9], k[:, :, 5:9], 5)
    for found, expected in zip(part, whole, strict=True):
        assert torch.equal(found, expected[:, :, 5:9])  # element by element


def test_rotary_keeps_lengths_and_xpos_attention_decays_with_the_distance() -> None:
    q = heads(0, 30)
    turned, _ = Rotary(8, 30, None)(q, q, 0)
    # Four roundings of float32 a number (assert_close allows 1.3e-6 and 1e-5).
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
    aligned = torch.zeros(1, 1, 1, 8)
    aligned[..., 6] = 1.0  # the slowest pair of numbers, which turns 0.001 a position
    products = [
        brute_force.rotary_product(aligned.flatten(), aligned.flatten(), d, 30.0).item()
        for d in range(100)
    ]
    rotary = Rotary(8, 100, 30.0)
    _, key = rotary(aligned, aligned, 0)
    found = [(rotary(aligned, aligned, d)[0] * key).sum().item() for d in range(100)]
    assert found == pytest.approx(products, rel=1e-4)
    assert all(nearer > farther for nearer, farther in itertools.pairwise(found))


@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_tables_stay_float32_in_a_bfloat16_model(scale_base: float | None) -> None:
    exact, cast = Rotary(64, 3000, scale_base), Rotary(64, 3000, scale_base).bfloat16()
    q, k = (heads(seed, 3000, 64).bfloat16() for seed in (0, 1))
    for found, expected in zip(cast(q, k, 0), exact(q, k, 0), strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)  # the same float32 tables


def test_nothing_of_a_kind_of_positions_without_parameters_is_saved() -> None:
    for positions, inside in (("sinusoidal", "xpos"), ("sinusoidal_fairseq", "rotary")):
        model = model_of("decoder", positions=positions, attention_positions=inside)
        assert not [n for n in model.state_dict() if "sinusoid" in n or "rotary" in n]
        assert model.positions is None


def model_of(architecture: str, **keys: object) -> nn.Module:
    base = {"num_heads": 2, "max_seq_len": 32, "architecture": architecture}
    return random_model(**base | keys).eval()


RELATIVE = {"relative_buckets": 8, "relative_max_distance": 6}


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder_decoder"])
@pytest.mark.parametrize(
    ("keys", "is_relative"),
    [
        ({"attention_positions": "relative", **RELATIVE}, True),
        ({"attention_positions": "rotary"}, True),
        ({"attention_positions": "xpos", "xpos_scale_base": 20.0}, True),
        ({"attention_positions": "xpos_relative", "xpos_scale_base": 20.0, **RELATIVE}, True),
        ({"positions": "none"}, True),
        ({}, False),
        ({"positions": "sinusoidal"}, False),
        ({"positions": "sinusoidal_fairseq"}, False),
        ({"positions": "learned", "attention_positions": "rotary"}, False),
        ({"positions": "sinusoidal", "attention_positions": "relative", **RELATIVE}, False),
    ],
    ids=str,
)
def test_a_shifted_sequence_gives_the_same_logits_only_where_distances_alone_count(
    architecture: str, keys: dict, is_relative: bool
) -> None:
    model, shift, length = model_of(architecture, **keys), 13, 9
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(23, (2, length + shift), generator=generator)
    padding = (torch.arange(length + shift) < shift).expand(2, -1)
    plain, padded = (tokens[:, shift:],), (tokens, padding)
    if architecture == "encoder_decoder":
        plain, padded = (plain[0], plain[0]), (tokens, tokens, padding, padding)
    with torch.no_grad():
        expected, found = model(*plain).logits, model(*padded).logits[:, shift:]
    difference = (found - expected).abs().max().item()
    assert difference < 1e-4 if is_relative else difference > 1e-2, difference
