"""Lines that conversions end with."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def how_to_load(out: Path, architecture: str) -> list[str]:
    """Python that loads a folder of weights."""
    tokens = "source, target" if architecture == "encoder_decoder" else "tokens"
    return [
        "from models.weights import load_model",
        f"model = load_model({str(out)!r})",
        f"logits = model({tokens}).logits  # tokens: (batch, length) int64",
    ]


def how_to_train_on(config_file: Path, num_ranks: int) -> str:
    """The command, to be pasted into a shell, with which a run goes on."""
    return (
        f"deepspeed --num_gpus {num_ranks} --module launchers.train --deepspeed_config "
        f"{shlex.quote(str(config_file))}"
    )


def how_to_start(weights: Path, model_keys: Mapping[str, Any]) -> str:
    """What makes a run's config start from a folder of weights: arguments for a shell.

    Args:
        weights: the folder.
        model_keys: of `magnetar.model`, by dotted path, which the run must have otherwise.
    """
    values = [f"magnetar.model.{key}={json.dumps(value)}" for key, value in model_keys.items()]
    values.append(f"magnetar.training.init_from={weights}")
    return " ".join(f"--set {shlex.quote(value)}" for value in values)
