"""An exported folder as a run's folder again, with one checkpoint of weights without moments."""

import json
from pathlib import Path

import torch

from magnetar.convert.folders import (
    config_in,
    equal_bits,
    how_to_start,
    how_to_train_on,
    require_new,
    vocabulary_file,
    watched,
)
from magnetar.data.atomic import atomic_folder
from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.exported_run import RUN_KEY, ExportedRun, read_entry
from magnetar.engine.checkpoint.format import WEIGHT, Checkpoint, CheckpointWriter, Piece
from magnetar.engine.checkpoint.open_run import open_run
from magnetar.engine.checkpoint.save_load import part_name
from magnetar.engine.config.batch_sizes import ACCUMULATION, MICRO, TRAIN
from magnetar.engine.config.schema import Layout, RunConfig
from magnetar.models.weights.files import LazyTensors, as_type, grouped
from magnetar.models.weights.load_save import CONFIG_FILE

PART_BYTES = 1 << 26  # bytes of a checkpoint's file, whose tensors are in memory at once


def import_weights(path: Path, out: Path) -> list[str]:
    """A report in lines, after writing a run's folder.

    Args:
        path: a folder that `export` has written.
        out: the run's new folder; it must not exist, or be empty.

    Raises:
        UserError: if the folder does not name its run, its config is of another version or model, a
            file is damaged or of another vocabulary, or `out` holds something.
    """
    require_new(out, path)
    source = open_run(path)
    if source.checkpoint is not None:
        raise UserError(
            f"{path} is a run or a checkpoint, and not what export has written: train on from it, "
            "or name a folder of weights"
        )
    config = source.run_config
    if config is None:
        raise UserError(
            f"{path / CONFIG_FILE} has no {RUN_KEY!r}, so it does not say which training these "
            "weights are from: start a run of your own from them, with "
            f"{how_to_start(path, {})}"
        )
    run = read_entry(path, source.about)
    tensors = as_type(source.tensors, torch.float32)
    with atomic_folder(out) as folder:
        (folder / "checkpoints").mkdir()
        checkpoint = _write_checkpoint(folder, run, tensors)
        for name in watched("checking", list(tensors.specs)):
            if not equal_bits(checkpoint.tensor(name), tensors.read(name)):
                raise UserError(f"{out}: {name} is not what was written: use another disk")
        text = json.dumps(config_in(run.config, out), indent=1)
        (folder / CONFIG_FILE).write_text(text + "\n")
        if config.data.pairs is not None:  # a run of pairs keeps its vocabulary
            for name, content in vocabulary_file(source).items():
                (folder / name).write_bytes(content)
    return [
        f"imported  {path}",
        f"wrote     {out / 'checkpoints' / checkpoint.path.name}, weights alone: Adam starts anew, "
        "the schedule goes on",
        f"train on  {how_to_train_on(out / CONFIG_FILE, _num_ranks(config))}",
    ]


def _num_ranks(config: RunConfig) -> int:
    """Number of ranks whose micro-batches make up the batch; the smallest if one is open."""
    train, micro, accumulation = (config.deepspeed.get(key) for key in (TRAIN, MICRO, ACCUMULATION))
    if train is None or micro is None or accumulation is None:
        return config.model.moe.ep_size if config.model.moe else 1
    return train // (micro * accumulation)


def _write_checkpoint(folder: Path, run: ExportedRun, tensors: LazyTensors) -> Checkpoint:
    writer = CheckpointWriter(folder / "checkpoints" / f"step_{run.step:08d}")
    sizes = {name: spec.num_bytes for name, spec in tensors.specs.items()}
    coming = iter(watched("writing", list(sizes)))
    parts = []
    for index, names in enumerate(grouped(sizes, PART_BYTES)):
        pieces = [
            Piece(name, 0, {WEIGHT: tensors.read(name).view(-1)})
            for name, _ in zip(names, coming, strict=False)
        ]
        parts.append(part_name(index))
        writer.write_part(parts[-1], pieces)
    next(coming, None)  # the last one has been written
    about = run.model_dump(exclude_unset=True) | {
        "layout": Layout(len(parts), 1, 0)._asdict(),
        "optimizer": run.optimizer.model_dump() | {"step": 0},
    }
    return writer.commit(parts, tensors.shapes, about)
