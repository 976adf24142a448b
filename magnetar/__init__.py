"""Sparse and very deep Transformers on DeepSpeed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magnetar.engine.build import parameter_groups as parameter_groups
    from magnetar.engine.checkpoint.open_run import open_run
    from magnetar.engine.sparse_clip import SparseClip as SparseClip
    from magnetar.models.moe.drop_in import MoE as MoE
    from magnetar.models.moe.drop_in import PartitionedMoE as PartitionedMoE
    from magnetar.models.transformer import build_model as build_model

    load = open_run

__version__ = "0.2.0"

# Imported when they are first asked for: torch and DeepSpeed take seconds.
_PLACES = {
    "MoE": "models.moe.drop_in:MoE",
    "PartitionedMoE": "models.moe.drop_in:PartitionedMoE",
    "SparseClip": "engine.sparse_clip:SparseClip",
    "build_model": "models.transformer:build_model",
    "load": "engine.checkpoint.open_run:open_run",
    "parameter_groups": "engine.build:parameter_groups",
}


def __getattr__(name: str) -> Any:
    """A name of the library, docs/library.md."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(f"magnetar.{module}"), attribute)


def __dir__() -> list[str]:
    """Every name, those not yet imported too."""
    return sorted([*globals(), *_PLACES])
