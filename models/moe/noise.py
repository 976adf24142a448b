"""Random numbers that are functions of a key: the same bits in every layout, on every device.

Letters: B batch, T tokens, N tokens that draw, M numbers a token.

A generator's n-th draw belongs to whoever asks n-th, so what a token draws from it depends on which
tokens share its rank. Here a token's numbers are functions of its key alone: SplitMix64 (Steele et
al., 2014) in int64, whose sums and products wrap as those of uint64 do.
"""

import torch
from torch import Tensor


def _signed(word: int) -> int:
    """The int64 with the bits of a uint64."""
    return word - (1 << 64) if word >> 63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST_FACTOR = _signed(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = _signed(0x94D049BB133111EB)

# What a token draws numbers for: a stream each.
JITTER, SECOND_EXPERT, CAPACITY_ORDER = 1, 2, 3


def mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser of x + gamma, int64: every input bit moves every output bit."""
    x = x + _GAMMA
    x ^= _shifted(x, 30)
    x *= _FIRST_FACTOR
    x ^= _shifted(x, 27)
    x *= _SECOND_FACTOR
    x ^= _shifted(x, 31)
    return x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros from the left: int64's own shift repeats the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def token_keys(sample_keys: Tensor, num_positions: int, layer: int) -> Tensor:
    """A key for each token in one MoE layer.

    Args:
        sample_keys: (B,) int64, different for each sample of each step.
        num_positions: T.
        layer: different for each MoE layer of a model.

    Returns:
        (B, T) int64.
    """
    positions = torch.arange(num_positions, device=sample_keys.device)
    return mixed(mixed(mixed(sample_keys).unsqueeze(-1) + positions) + layer)


def drawn_sample_keys(num_samples: int, device: torch.device) -> Tensor:
    """(B,) int64 from torch's own generator, for a forward pass that nobody gave keys."""
    return torch.randint(2**62, (num_samples,), device=device)


def uniform(keys: Tensor, num_draws: int, stream: int) -> Tensor:
    """Numbers from the open interval (0, 1), multiples of 2^-24.

    Args:
        keys: (N,) int64.
        num_draws: M.
        stream: what they are for.

    Returns:
        (N, M) float32.
    """
    counters = torch.arange(num_draws, device=keys.device) * _GAMMA
    words = mixed(mixed(keys + stream).unsqueeze(-1) + counters)  # (N, M)
    # 23 bits and a half: float32 holds them exactly, and neither 0 nor 1 is among them.
    return _shifted(words, 41).float().add_(0.5).mul_(2.0**-23)
