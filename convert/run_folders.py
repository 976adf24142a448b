"""What the conversions that write a run's folder share."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def config_in(config: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """A run's config with its output in another folder."""
    moved, old = copy.deepcopy(dict(config)), config["magnetar"]["training"]["run_dir"]
    moved["magnetar"]["training"]["run_dir"] = str(run_dir)
    for monitor in ("tensorboard", "csv_monitor"):
        if (moved.get(monitor) or {}).get("output_path") == old:
            moved[monitor]["output_path"] = str(run_dir)
    return moved


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Whether float32 tensors are equal to the last bit, what is no number too."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))
