"""Random numbers that are functions of a key: the same bits in every layout, on every device.

Letters: B batch, T tokens, N tokens that draw, M numbers per token.

A generator gives its n-th number to the n-th caller, so a token's number would depend on the other
tokens of its rank. Here it depends on the token's key alone. The function is SplitMix64 (Steele et
al., 2014) in int64, whose sums and products wrap as those of uint64 do.
"""

import torch
from torch import Tensor


def _signed(unsigned: int) -> int:
    """The int64 with the bits of a uint64."""
    return unsigned - (1 << 64) if unsigned >> 63 else unsigned


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST_FACTOR = _signed(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = _signed(0x94D049BB133111EB)

# Streams: one for each use of random numbers.
JITTER, SECOND_EXPERT, CAPACITY_ORDER = 1, 2, 3


def splitmix64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser of x + gamma, int64: every input bit moves every output bit."""
    x = x + _GAMMA
    x ^= _shifted(x, 30)
    x *= _FIRST_FACTOR
    x ^= _shifted(x, 27)
    x *= _SECOND_FACTOR
    x ^= _shifted(x, 31)
    return x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; int64's own shift repeats the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def token_keys(sample_keys: Tensor, num_positions: int, layer: int) -> Tensor:
    """(B, T) int64, a key for each token in one MoE layer, which has an index of its own.

    Sample keys are (B,) int64, another one for each sample of each step.
    """
    positions = torch.arange(num_positions, device=sample_keys.device)
    return splitmix64(splitmix64(splitmix64(sample_keys).unsqueeze(-1) + positions) + layer)


def drawn_sample_keys(num_samples: int, device: torch.device) -> Tensor:
    """(B,) int64 from torch's own generator, for a forward pass without keys."""
    return torch.randint(2**62, (num_samples,), device=device)


def uniform(keys: Tensor, num_draws: int, stream: int) -> Tensor:
    """Keys (N,) int64 -> (N, M) float32 from the open interval (0, 1), multiples of 2^-24.

    The stream is one of those above.
    """
    counters = torch.arange(num_draws, device=keys.device) * _GAMMA
    random_bits = splitmix64(splitmix64(keys + stream).unsqueeze(-1) + counters)  # (N, M)
    # 23 bits plus a half: float32 holds them exactly, and they never reach 0 or 1.
    return _shifted(random_bits, 41).float().add_(0.5).mul_(2.0**-23)
