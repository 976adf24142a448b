"""The routers' noise: uniform, independent, and a function of its key alone."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from magnetar.models.moe.noise import (
    CAPACITY_ORDER,
    JITTER,
    SECOND_EXPERT,
    drawn_sample_keys,
    splitmix64,
    token_keys,
    uniform,
)

TABLE_OF_KEYS = [
    [-3399887778992548060, -4784904354155427983],
    [4547576149025192648, 5824636656361412448],
]
TABLE_OF_NUMBERS = [
    [1295667.0, 3914387.0],
    [5480011.0, 9759849.0],
    [7419867.0, 10102757.0],
    [8012469.0, 15955893.0],
]
SAMPLES, POSITIONS, DRAWS = 64, 64, 16
N = SAMPLES * POSITIONS


def draws(layer: int = 1, stream: int = JITTER, first: int = 1000) -> Tensor:
    """(SAMPLES, POSITIONS, DRAWS) float64 of neighbouring samples and positions."""
    keys = token_keys(torch.arange(first, first + SAMPLES), POSITIONS, layer).view(N)
    return uniform(keys, DRAWS, stream).double().view(SAMPLES, POSITIONS, DRAWS)


def test_the_words_are_splitmix64s() -> None:
    # The first outputs of the reference implementation (Vigna, splitmix64.c) for seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found, state = [], 1234567
    for _ in expected:
        found.append(int(splitmix64(torch.tensor([state]))) % 2**64)
        state += 0x9E3779B97F4A7C15
        state = (state + 2**63) % 2**64 - 2**63
    assert found == expected


def test_numbers_are_the_same_in_every_version() -> None:
    keys = token_keys(torch.tensor([0, 2**61 + 5]), 2, layer=3)
    assert keys.tolist() == TABLE_OF_KEYS
    numbers = uniform(keys.view(-1), 2, SECOND_EXPERT).double() * 2**24
    assert numbers.tolist() == TABLE_OF_NUMBERS


def test_a_tokens_numbers_depend_on_nothing_but_its_key_and_the_stream() -> None:
    keys = token_keys(torch.arange(SAMPLES), POSITIONS, 1)
    some = torch.tensor([[5, 60], [17, 0], [5, 3]])
    whole = uniform(keys.view(N), DRAWS, JITTER).view(SAMPLES, POSITIONS, DRAWS)
    alone = token_keys(some[:, 0], POSITIONS, 1)[torch.arange(3), some[:, 1]]
    # Integer arithmetic, so exactly.
    assert torch.equal(uniform(alone, DRAWS, JITTER), whole[some[:, 0], some[:, 1]])
    assert torch.equal(uniform(alone, 3, JITTER), whole[some[:, 0], some[:, 1], :3])


def test_numbers_are_uniform() -> None:
    u = draws().flatten()
    count = u.numel()  # 65536
    assert 0 < u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1
    for power in (1, 2, 3, 4):
        # The mean of u^p is 1 / (p + 1), its variance below 1 / 12; five standard deviations.
        assert u.pow(power).mean().item() == pytest.approx(
            1 / (power + 1), abs=5 * (1 / 12 / count) ** 0.5
        )
    bins = (u * 256).long().bincount(minlength=256).double()
    expected = count / 256
    chi_squared = ((bins - expected).square() / expected).sum().item()
    assert abs(chi_squared - 255) < 5 * (2 * 255) ** 0.5
    low_bits = (u * 2**23 - 0.5).long() % 16
    shares = low_bits.bincount(minlength=16).double() / count
    assert (shares - 1 / 16).abs().max() < 5 * (1 / 16 / count) ** 0.5


def correlation(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1])


def test_neighbours_are_independent() -> None:
    u = draws()
    others = {
        "sample": (u[1:], u[:-1]),
        "position": (u[:, 1:], u[:, :-1]),
        "diagonal": (u[1:, :-1], u[:-1, 1:]),
        "element": (u[..., 1:], u[..., :-1]),
        "layer": (u, draws(layer=2)),
        "stream": (u, draws(stream=SECOND_EXPERT)),
        "step": (u, draws(first=2**40)),
    }
    for name, (x, y) in others.items():
        # The standard deviation of the correlation of n independent pairs is 1 / sqrt(n).
        assert abs(correlation(x, y)) < 5 / x.numel() ** 0.5, name
        assert abs(correlation((x - 0.5).abs(), (y - 0.5).abs())) < 5 / x.numel() ** 0.5, name
        assert (x == y).double().mean() < 1e-4, name


def test_layers_streams_and_tokens_share_no_number() -> None:
    tables = [draws(layer, stream) for layer in (0, 1, 2) for stream in (1, 2, 3)]
    for one, other in combinations(tables, 2):
        # 65536 numbers out of 2^23: two sets of them have about 512 in common by chance.
        assert torch.isin(one, other).sum() < 700
    assert {JITTER, SECOND_EXPERT, CAPACITY_ORDER} == {1, 2, 3}
    keys = torch.stack([token_keys(torch.arange(500), 500, layer) for layer in range(4)])
    assert keys.unique().numel() == keys.numel()


def test_keys_that_nobody_gave_come_from_torchs_generator() -> None:
    torch.manual_seed(0)
    first, second = (drawn_sample_keys(5, torch.device("cpu")) for _ in range(2))
    assert torch.cat([first, second]).unique().numel() == 10
    torch.manual_seed(0)
    assert torch.equal(drawn_sample_keys(5, torch.device("cpu")), first)
