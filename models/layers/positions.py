"""Positions: tables added to embeddings, rotation of queries and keys, bias of attention.

Letters: B batch, H num_heads, T tokens, S keys, D d_model, d = D / H width of a head.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from magnetar.models.layers.init import RandomSource

BIAS_STD = 0.02


def sinusoidal_table(num_positions: int, d_model: int) -> Tensor:
    """PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i + 1) = cos(the same) (arXiv 1706.03762, 3.5).

    Returns:
        (num_positions, D) float32.
    """
    angles = _angles(torch.arange(num_positions), d_model)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2).float()


def fairseq_sinusoidal_table(num_positions: int, d_model: int) -> Tensor:
    """Fairseq's variant, for imported sinusoidal weights.

    Row p stands for position p + 2, all sines come before all cosines, and the frequencies are
    10000^(-i / (D/2 - 1)).

    Returns:
        (num_positions, D) float32.
    """
    half = d_model // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float) * -(math.log(10000) / (half - 1)))
    angles = torch.arange(2, num_positions + 2).float().unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _angles(positions: Tensor, width: int, theta: float = 10000.0) -> Tensor:
    """positions (T,) -> (T, width / 2) float64: p / theta^(2i / width)."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    return positions.double().unsqueeze(-1) / theta**exponents


class FrequencyScaling(NamedTuple):
    """Slower rotary frequencies, for more positions than a model was first trained with.

    Attributes:
        factor: divisor of the frequencies of pairs that turn slowly.
        original_len: positions that the model was first trained with; None: every pair is slow.
        low: turns over original_len up to which a pair is slow.
        high: turns over original_len from which a pair keeps its frequency; between the two the
            divisor changes linearly in the number of turns.
    """

    factor: float
    original_len: int | None = None
    low: float = 1.0
    high: float = 4.0

    def scaled(self, angles: Tensor) -> Tensor:
        """Angles (T, d / 2) of consecutive positions from 0 on -> (T, d / 2)."""
        if self.original_len is None or len(angles) < 2:
            return angles / self.factor
        turns = self.original_len * angles[1] / (2 * math.pi)  # (d / 2,)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return angles * (kept + (1 - kept) / self.factor)


class Rotary(nn.Module):
    """Rotation of pairs of numbers of queries and keys, by angles that grow with the position.

    RoFormer (arXiv 2104.09864), and with a scale base xPos (arXiv 2212.10554, eq. 9-13): queries
    are multiplied by zeta^(p / scale_base) and keys by its inverse, so that attention decays with
    the distance; zeta_i = (2i / d + 0.4) / 1.4.
    """

    def __init__(
        self,
        d_head: int,
        max_len: int,
        scale_base: float | None,
        theta: float = 10000.0,
        scaling: FrequencyScaling | None = None,
    ) -> None:
        """Build the tables of all positions.

        Args:
            d_head: d, even.
            max_len: number of positions.
            scale_base: distance over which xPos decays; None is plain rotary.
            theta: base of the frequencies; pair i turns by theta^(-2i / d) from one position to
                the next.
            scaling: change of the frequencies; None: nothing.
        """
        super().__init__()
        positions = torch.arange(max_len)
        angles = _angles(positions, d_head, theta)
        if scaling is not None:
            angles = scaling.scaled(angles)
        scale = torch.ones_like(angles)
        if scale_base is not None:
            zeta = (torch.arange(0, d_head, 2, dtype=torch.float64) / d_head + 0.4) / 1.4
            # Only differences of exponents matter. Centred on the middle they are smallest.
            exponents = (positions.double() - max_len // 2) / scale_base
            scale = zeta ** exponents.unsqueeze(-1)
        for name, table in (
            ("query_cos", angles.cos() * scale),
            ("query_sin", angles.sin() * scale),
            ("key_cos", angles.cos() / scale),
            ("key_sin", angles.sin() / scale),
        ):
            doubled = table.float().repeat_interleave(2, dim=-1)  # (max_len, d)
            self.register_buffer(name, doubled, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the tables with the model but keep them float32, since bf16 would blur distances."""
        tables = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, moved in self.named_buffers(recurse=False):
            table = tables[name]
            assert table is not None
            self._buffers[name] = table.to(moved.device)
        return self

    def forward(self, q: Tensor, k: Tensor, first_position: int) -> tuple[Tensor, Tensor]:
        """Turn queries and keys (B, H, T, d) whose positions start at first_position."""
        at = slice(first_position, first_position + q.size(2))
        q_turned = _turn(q, self.query_cos[at], self.query_sin[at])  # type: ignore[index]
        return q_turned, _turn(k, self.key_cos[at], self.key_sin[at])  # type: ignore[index]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin) for each pair; float32, then x's dtype."""
    wide = x.float()
    pairs = wide.unflatten(-1, (-1, 2))
    crossed = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return (wide * cos + crossed * sin).to(x.dtype)


def relative_bucket(distance: Tensor, num_buckets: int, max_distance: int, both: bool) -> Tensor:
    """The bucket of key position minus query position (T5, arXiv 1910.10683, sec. 2.1).

    Half of the buckets are for one small distance each, the others for ranges that grow
    logarithmically up to max_distance, beyond which all share the last.

    Args:
        distance: int64 of any shape.
        num_buckets: number of buckets.
        max_distance: distance in tokens from which all keys share the last bucket.
        both: whether half of the buckets are for keys after the query; otherwise those share
            bucket 0.

    Returns:
        int64 in [0, num_buckets), the shape of distance.
    """
    behind = -distance
    offset = torch.zeros_like(distance)
    if both:
        num_buckets //= 2
        offset = (behind < 0).long() * num_buckets
        behind = behind.abs()
    else:
        behind = behind.clamp_min(0)
    num_exact = num_buckets // 2
    growth = torch.log(behind.clamp_min(1).float() / num_exact)
    growth = growth / math.log(max_distance / num_exact) * (num_buckets - num_exact)
    large = (num_exact + growth.long()).clamp_max(num_buckets - 1)
    return offset + torch.where(behind < num_exact, behind, large)


class RelativeBias(nn.Embedding):
    """A learned bias of attention logits for each head and bucket of distance: (buckets, H)."""

    def __init__(self, num_buckets: int, num_heads: int, max_distance: int, both: bool) -> None:
        """Build the table; see `relative_bucket`."""
        super().__init__(num_buckets, num_heads)
        self.max_distance = max_distance
        self.both = both

    def init_weights(self, source: RandomSource) -> None:
        """N(0, 0.02^2): attention starts nearly unbiased."""
        source.normal_(self.weight.data, "weight", BIAS_STD)

    def forward(self, first_query: int, num_queries: int, num_keys: int) -> Tensor:  # type: ignore[override]
        """The bias of queries from position first_query on and keys from 0 on: (1, H, T, S)."""
        device = self.weight.device
        queries = torch.arange(first_query, first_query + num_queries, device=device)
        distance = torch.arange(num_keys, device=device) - queries.unsqueeze(1)  # (T, S)
        bucket = relative_bucket(distance, self.num_embeddings, self.max_distance, self.both)
        return super().forward(bucket).permute(2, 0, 1).unsqueeze(0)
