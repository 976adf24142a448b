"""Checkpoints of small models, made without training."""

import json
from pathlib import Path
from typing import Any

import torch

from magnetar.engine.checkpoint.exported_run import TrainerEntry
from magnetar.engine.checkpoint.format import (
    WEIGHT,
    Checkpoint,
    CheckpointWriter,
    Piece,
    evenly_cut,
)
from magnetar.engine.config.schema import RunConfig, check_config
from magnetar.engine.optim.adam import MOMENTS
from magnetar.models.transformer import build_model
from magnetar.models.weights.load_save import tensor_shapes, tied_names
from tests.engine.programs import BASE, with_keys


def run_config(
    run_dir: Path, world_size: int = 2, changes: dict[str, Any] | None = None
) -> RunConfig:
    """BASE with dotted keys set, as the config of a run in a folder."""
    keys = {"magnetar.training.run_dir": str(run_dir)} | (changes or {})
    config, problems = check_config(with_keys(BASE, keys), world_size)
    assert config is not None, problems
    return config


def write_checkpoint(
    run_dir: Path,
    step: int = 5,
    *,
    world_size: int = 2,
    changes: dict[str, Any] | None = None,
    seed: int = 1,
    tensors: dict[str, torch.Tensor] | None = None,
    moments: dict[str, torch.Tensor] | None = None,
    manifest_model: dict[str, Any] | None = None,
    entries: dict[str, Any] | None = None,
) -> Checkpoint:
    """A checkpoint of BASE's model with random moments, as `world_size` ranks would write it.

    Args:
        run_dir: the run's folder, which also gets its config.json.
        step: optimizer steps done.
        world_size: files; each holds an even share of every tensor.
        changes: dotted keys of the config.
        seed: of the weights and the moments.
        tensors: weights that replace drawn ones.
        moments: the same for both moments.
        manifest_model: keys of the model that the manifest claims.
        entries: of the manifest, in place of what `about` makes up.
    """
    config = run_config(run_dir, world_size, changes)
    weights = small_model(config, seed) | (tensors or {})
    generator = torch.Generator().manual_seed(seed)
    states = {
        name: {WEIGHT: weight.flatten()}
        | {state: torch.rand(weight.numel(), generator=generator) for state in MOMENTS}
        for name, weight in weights.items()
    }
    for name, moment in (moments or {}).items():
        states[name] |= dict.fromkeys(MOMENTS, moment.flatten())
    writer = CheckpointWriter(run_dir / "checkpoints" / f"step_{step:08d}")
    parts = [f"rank_{rank:05d}.safetensors" for rank in range(world_size)]
    for rank, part in enumerate(parts):
        pieces = []
        for name, values in states.items():
            start, stop = evenly_cut(weights[name].numel(), rank, world_size)
            if start < stop:
                cut = {state: value[start:stop].clone() for state, value in values.items()}
                pieces.append(Piece(name, start, cut))
        writer.write_part(part, pieces)
    (run_dir / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")
    with (run_dir / "metrics.jsonl").open("w") as file:
        for at in range(1, step + 3):
            file.write(json.dumps({"step": at, "loss": 5.0 / at}) + "\n")
    claimed = about(config, world_size, step) | (entries or {})
    claimed["config"]["magnetar"]["model"] |= manifest_model or {}
    return writer.commit(parts, tensor_shapes(config.model), claimed)


def small_model(config: RunConfig, seed: int) -> dict[str, torch.Tensor]:
    """Initial weights, every expert here, tied tensors once; biases are drawn as well."""
    one_rank = config.model
    if one_rank.moe is not None:
        moe = one_rank.moe.model_copy(update={"ep_size": 1})
        one_rank = one_rank.model_copy(update={"moe": moe})
    model = build_model(one_rank, seed)
    tied = tied_names(model)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


def about(config: RunConfig, world_size: int, step: int) -> dict[str, Any]:
    """The manifest's entries beside files and tensors."""
    moe = config.model.moe
    return {
        "step": step,
        "layout": {
            "world_size": world_size,
            "ep_size": moe.ep_size if moe else 1,
            "zero_stage": config.zero_stage,
        },
        "config": config.to_dict(),
        "tokenizer_fingerprint": "a" * 64,
        "data_fingerprint": "b" * 64,
        "trainer": TrainerEntry(seconds=1.0).model_dump(),
        "optimizer": {"step": step, "schedule_step": step, "skipped_steps": 0, "loss_scaler": {}},
    }
