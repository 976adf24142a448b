"""Triton kernels beside the plain PyTorch path, and the test for whether they can run."""

from functools import cache
from importlib.util import find_spec

from torch import Tensor

MAX_TOP_K, MAX_EXPERTS = 8, 512  # limits of models.moe.kernels


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def usable(x: Tensor) -> bool:
    """Whether kernels can work on a tensor: an NVIDIA GPU, Triton, and no float64."""
    return x.is_cuda and x.element_size() <= 4 and _has_triton()
