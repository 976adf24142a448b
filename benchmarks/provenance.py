"""The provenance of a measurement: hardware, versions, commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("torch", "triton", "deepspeed", "torchscale", "transformers", "megatron-core"),
    *("transformer-engine", "megablocks", "tutel"),
)


def hardware(device: torch.device) -> dict[str, Any]:
    """The hardware of the measurement."""
    found: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "cpu_threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return found


def versions() -> dict[str, str | None]:
    """Versions of Python and of every package that takes part; None if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def nccl_settings() -> dict[str, str]:
    """NCCL's settings in the environment."""
    return {
        key: value for key, value in os.environ.items() if key.startswith(("NCCL_", "TORCH_NCCL"))
    }


def git_commit() -> str | None:
    """The commit of the sources, with "+" if a tracked file differs; None without git."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
