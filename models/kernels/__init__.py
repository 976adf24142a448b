"""Triton kernels for the MoE layer on a GPU. Everything has a plain PyTorch path beside it."""

from functools import cache
from importlib.util import find_spec

from torch import Tensor

MAX_TOP_K, MAX_EXPERTS = 8, 512  # of the router's kernels


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def usable(x: Tensor) -> bool:
    """Whether the kernels can work on a tensor: on an NVIDIA GPU, with Triton, not in float64."""
    return x.is_cuda and x.element_size() <= 4 and _has_triton()
