"""A folder that `export` has written as a run's folder again: one checkpoint, weights alone."""

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from convert.export import RUN_KEY, Run
from convert.folders import require_new
from convert.progress import watched
from data.errors import UserError
from engine.checkpoint import part_name
from engine.checkpoint_files import WEIGHT, Checkpoint, CheckpointWriter, Piece
from engine.config import check_config
from engine.run_folder import differing, flat_keys
from models.config import ModelConfig
from models.weight_files import LazyTensors, as_type, grouped
from models.weights import CONFIG_FILE, open_weights

_PART_BYTES = 1 << 28  # of a checkpoint's file, whose tensors are in memory at once
# An exported model belongs to no layout.
_FREE_KEYS = {"moe.ep_size"}


def import_weights(path: Path, out: Path) -> list[str]:
    """Write a run's folder; the lines that say so.

    Args:
        path: a folder that `export` has written.
        out: the run's folder; must not exist, or be empty.

    Raises:
        UserError: if it does not say which run it is from, its config is not one of this version
            or of another model, a file is damaged, or the folder holds something.
    """
    require_new(out)
    try:
        config, tensors, about = open_weights(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    run = _run(path, config, about)
    tensors = as_type(tensors, torch.float32)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as partial:
        folder = Path(partial, "run")
        (folder / "checkpoints").mkdir(parents=True)
        checkpoint = _write_checkpoint(folder, run, tensors)
        for name in watched("checking", list(tensors.specs)):
            if not _equal_bits(checkpoint.tensor(name), tensors.read(name)):
                raise UserError(f"{out}: {name} is not what was written: use another disk")
        text = json.dumps(_config_in(run.config, out), indent=1)
        (folder / CONFIG_FILE).write_text(text + "\n")
        os.replace(folder, out)
    return [
        f"imported  {path}",
        f"wrote     {out / 'checkpoints' / checkpoint.path.name}, weights alone: Adam starts anew, "
        "the schedule goes on",
        f"train on  deepspeed --module launchers.train --deepspeed_config {out / CONFIG_FILE}",
    ]


def _run(path: Path, config: ModelConfig, about: dict[str, Any]) -> Run:
    file = path / CONFIG_FILE
    if RUN_KEY not in about:
        raise UserError(
            f"{file} has no {RUN_KEY!r}, so it does not say which training these weights are from: "
            "start a run of your own from them, with "
            f"--set magnetar.training.init_from={path}"
        )
    try:
        run = Run.model_validate(about[RUN_KEY])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (RUN_KEY, *first["loc"])))
        raise UserError(f"{file}: {key}: {first['msg']}: export it again") from None
    trained, problems = check_config(run.config)
    if trained is None:
        listed = "\n  ".join(problem.text for problem in problems)
        raise UserError(
            f"{file}: its run.config is not one that this version can read:\n  {listed}"
        )
    there, here = (
        dict(flat_keys(section.model_dump(mode="json"))) for section in (trained.model, config)
    )
    for key, in_run, in_model in differing(there, here, _FREE_KEYS):
        raise UserError(
            f"{file} contradicts itself: model.{key} is {in_model}, and {in_run} in run.config: "
            "export it again"
        )
    return run


def _write_checkpoint(folder: Path, run: Run, tensors: LazyTensors) -> Checkpoint:
    writer = CheckpointWriter(folder / "checkpoints" / f"step_{run.step:08d}")
    sizes = {name: spec.num_bytes for name, spec in tensors.specs.items()}
    coming = iter(watched("writing", list(sizes)))
    parts = []
    for index, names in enumerate(grouped(sizes, _PART_BYTES)):
        pieces = [
            Piece(name, 0, {WEIGHT: tensors.read(name).view(-1)})
            for name, _ in zip(names, coming, strict=False)
        ]
        parts.append(part_name(index))
        writer.write_part(parts[-1], pieces)
    next(coming, None)  # the last one has been written
    about = run.model_dump() | {
        "layout": {"world_size": len(parts), "ep_size": 1, "zero_stage": 0},
        "optimizer": run.optimizer | {"step": 0},
    }
    return writer.commit(parts, tensors.shapes, about)


def _equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to the last bit, what is no number too."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def _config_in(config: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """A run's config with its output in another folder."""
    moved, old = copy.deepcopy(config), config["magnetar"]["training"]["run_dir"]
    moved["magnetar"]["training"]["run_dir"] = str(run_dir)
    for monitor in ("tensorboard", "csv_monitor"):
        if moved.get(monitor, {}).get("output_path") == old:
            moved[monitor]["output_path"] = str(run_dir)
    return moved
