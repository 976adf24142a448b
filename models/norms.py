"""Where the LayerNorms of a block stand, and how large its weights start: one row a style.

The residual stream of one sublayer f (attention or feed-forward):

    pre     x --+--> LN --> f ----------------------------> + --> x
                |                                           ^
                +-------------------------------------------+

    subln   x --+--> LN --> f_in --> LN --> f_out --------> + --> x
                |                                           ^
                +-------------------------------------------+

    f_out is attention's output projection or the feed-forward network's second matrix. Both
    styles end the stack with one more LayerNorm.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class NormStyle:
    """One row of the table.

    Attributes:
        inner: a second LayerNorm inside each sublayer, before its last matrix.
        gain: number of layers -> gain of the Xavier-normal feed-forward, value and output
            projections (query and key have gain 1).
    """

    inner: bool
    gain: Callable[[int], float]


def subln_gain(num_layers: int) -> float:
    """gamma = sqrt(ln 2M) of a decoder-only or encoder-only model (arXiv 2210.06423, sec. 3)."""
    return math.sqrt(math.log(2 * num_layers))


NORM_STYLES = {
    "pre": NormStyle(inner=False, gain=lambda num_layers: 1.0),
    "subln": NormStyle(inner=True, gain=subln_gain),
}
