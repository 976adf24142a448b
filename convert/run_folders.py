"""Run folders with one checkpoint: cut for other ranks, with a decaying rate, of exported weights.

`magnetar train` reads any checkpoint in any layout. Resharding is for ranks without a shared disk,
so that each machine needs only the files of its own ranks: rank r's files hold its experts and its
share of the rest. It also tells beforehand whether a layout can hold the model.
"""

import copy
import json
import math
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from magnetar.convert.experts import experts_of_layers, place_of
from magnetar.convert.folders import (
    aligned,
    checked_numbers,
    how_to_start,
    require_new,
    vocabulary_file,
    warning_rows,
    watched,
)
from magnetar.data.atomic import atomic_folder
from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.exported_run import RUN_KEY, read_entry
from magnetar.engine.checkpoint.format import (
    WEIGHT,
    Checkpoint,
    CheckpointWriter,
    Piece,
    complete_checkpoints,
    evenly_cut,
    require_whole,
)
from magnetar.engine.checkpoint.open_run import SavedModel, of_checkpoint, open_run
from magnetar.engine.checkpoint.save_load import part_name
from magnetar.engine.config.batch_sizes import ACCUMULATION, MICRO, TRAIN
from magnetar.engine.config.schema import Layout, RunConfig, check_config
from magnetar.engine.memory_planner import GIB, nearest_layout, parameters_of, problems_of
from magnetar.engine.metrics import keep_records_up_to, read_records
from magnetar.models.config import ModelConfig
from magnetar.models.weights.files import LazyTensors, as_type, grouped
from magnetar.models.weights.load_save import CONFIG_FILE

# Largest sizes of a file in bytes; its tensors are in memory while it is written.
PART_BYTES = 1 << 30
IMPORTED_PART_BYTES = 1 << 26
_FLOAT32_BYTES = 4

# Name of a tensor, index of the first of its flattened elements, index after the last.
Stretch = tuple[str, int, int]


class _Weights(NamedTuple):
    """Weights without moments, as the content of a checkpoint."""

    tensors: LazyTensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.tensors.shapes

    def states(self, _name: str) -> tuple[str, ...]:
        return (WEIGHT,)

    def read(self, name: str, _state: str, start: int, stop: int) -> Tensor:
        return self.tensors.read(name).view(-1)[start:stop]


def reshard(path: Path, out: Path, layout: Layout, gpu_memory: float | None) -> list[str]:
    """A report in lines, after writing a run's folder for other ranks.

    Args:
        path: a run (its newest complete checkpoint), or a checkpoint's folder.
        out: the run's new folder.
        layout: layout of the ranks that will train, which must be able to hold the model.
        gpu_memory: GiB of each rank's GPU; None: its memory is not checked.
    """
    require_new(out, path)
    source = open_run(path)
    checkpoint = source.checkpoint
    if checkpoint is None:
        raise UserError(
            f"{path} is a folder of weights, which are of no step and no layout: name a run, or a "
            "checkpoint step_..."
        )
    _ = source.tensors  # names and shapes first: comparing hashes takes longer
    config = _config_in(_config_for(checkpoint, source.config, layout, gpu_memory), out)
    written, num_files = _write_cut(out, source, checkpoint, layout, config)
    files = f"{num_files} file{'s' * (num_files > 1)}"
    there, here = (Layout.stored(one.manifest).in_words() for one in (checkpoint, written))
    return aligned(
        [
            ("read", f"{checkpoint.path}, {there}"),
            ("wrote", f"{written.path}, {here}, {files}, read back and compared"),
            ("train on", _how_to_train_on(out, layout.world_size)),
        ]
    )


def branch(path: Path, out: Path, at: int, decay: int) -> list[str]:
    """A report in lines, after writing a run's folder whose rate decays from a step of another run.

    The new run equals one with schedule `wsd` whose decay begins after that step, to the last bit.

    Args:
        path: a run with schedule `constant`, or `wsd`, whose shape and end of the decay stay.
        out: the new run's folder.
        at: step of the checkpoint that it starts from.
        decay: number of steps of the decay, which ends the new run.
    """
    require_new(out, path)
    found = {checkpoint.step: checkpoint for checkpoint in complete_checkpoints(path)}
    if at not in found:
        there = f"use {' or '.join(map(str, found))}" if found else "it has none: name another run"
        raise UserError(f"--at {at}: {path} has no complete checkpoint of that step: {there}")
    source = of_checkpoint(found[at], path)
    _ = source.tensors  # names and shapes first: comparing hashes takes longer
    assert source.run_config is not None  # a checkpoint has one
    training = source.run_config.training
    schedule = training.lr_schedule
    if schedule.type not in ("constant", "wsd"):
        raise UserError(
            f"{path} has magnetar.training.lr_schedule.type={json.dumps(schedule.type)}, which "
            'changes the rate at every step: a decay begins in a run of type "constant" or "wsd"'
        )
    first, last = schedule.warmup_steps, math.inf
    if schedule.decay_steps is not None:
        last = (schedule.total_steps or training.num_steps) - schedule.decay_steps
    if not first <= at <= last:
        steps = f"from step {first} on" if last == math.inf else f"from step {first} to {last}"
        raise UserError(f"--at {at}: {path} has its full learning rate {steps}: use such a step")
    config = _config_in(source.run_config.to_dict(), out)
    section = config["magnetar"]["training"]
    section["num_steps"] = at + decay
    section["lr_schedule"] |= {"type": "wsd", "total_steps": at + decay, "decay_steps": decay}
    checked, problems = check_config(config)
    assert checked is not None, problems
    layout = Layout.stored(found[at].manifest)
    written, _ = _write_cut(out, source, found[at], layout, checked.to_dict())
    return aligned(
        [
            ("read", str(found[at].path)),
            ("wrote", f"{written.path}, read back and compared"),
            ("decays", f"from step {at + 1} to step {at + decay}, the last one"),
            ("train on", _how_to_train_on(out, layout.world_size)),
        ]
    )


def import_weights(path: Path, out: Path) -> list[str]:
    """A report in lines, after writing a run's folder with one checkpoint without moments.

    The source is a folder that `export` has written, which names its run.
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
    tensors, warnings = checked_numbers(as_type(source.tensors, torch.float32))
    sizes = {name: spec.num_bytes for name, spec in tensors.specs.items()}
    parts = {
        part_name(index): [(name, 0, prod(tensors.specs[name].shape)) for name in names]
        for index, names in enumerate(grouped(sizes, IMPORTED_PART_BYTES))
    }
    about = run.model_dump(exclude_unset=True) | {
        "layout": Layout(len(parts), 1, 0)._asdict(),
        "optimizer": run.optimizer.model_dump() | {"step": 0},
    }
    written = _write_run(out, source, _Weights(tensors), parts, about, _config_in(run.config, out))
    return aligned(
        [
            ("imported", str(path)),
            ("wrote", f"{written.path}, weights alone: Adam starts anew, the schedule goes on"),
            *warning_rows(warnings),
            ("train on", _how_to_train_on(out, _num_ranks(config))),
        ]
    )


def _write_cut(
    out: Path,
    source: SavedModel,
    checkpoint: Checkpoint,
    layout: Layout,
    config: dict[str, Any],
) -> tuple[Checkpoint, int]:
    """A whole checkpoint cut for a layout in its final place, and the number of its files.

    Args:
        out: the run's folder.
        source: what is converted.
        checkpoint: its checkpoint.
        layout: layout of the ranks that will train.
        config: content of config.json.
    """
    require_whole(checkpoint)
    parts: dict[str, list[Stretch]] = {}
    for rank in range(layout.world_size):
        stretches = stretches_of_rank(checkpoint.shapes, layout, rank)
        for number, group in enumerate(_files(checkpoint, stretches)):
            name = part_name(rank)
            parts[name if number == 0 else name.replace(".", f"_{number:05d}.")] = group
    dropped = ("format", "files", "tensors", "sha256")
    about = {key: value for key, value in checkpoint.manifest.items() if key not in dropped}
    about |= {"layout": layout._asdict(), "config": config}
    return _write_run(out, source, checkpoint, parts, about, config), len(parts)


def _write_run(
    out: Path,
    source: SavedModel,
    content: Checkpoint | _Weights,
    parts: Mapping[str, Sequence[Stretch]],
    about: Mapping[str, Any],
    config: Mapping[str, Any],
) -> Checkpoint:
    """The checkpoint in its final place, after it was read back and compared.

    Args:
        out: the run's folder.
        source: what is converted.
        content: its tensors.
        parts: name of each file -> what it holds.
        about: other entries of the manifest.
        config: content of config.json.
    """
    with atomic_folder(out) as folder:
        # The step decides the name, since the checkpoint that is read may have been renamed.
        place = Path("checkpoints", f"step_{about['step']:08d}")
        writer = CheckpointWriter(folder / place)
        for part in watched("writing", list(parts)):
            writer.write_part(part, _pieces(content, parts[part]))
        written = writer.commit(parts, content.shapes, about)
        for part in watched("comparing", list(parts)):
            for name, start, stop in parts[part]:
                for state in content.states(name):
                    one, other = (c.read(name, state, start, stop) for c in (written, content))
                    # As integers, since a NaN is no other float's equal.
                    if not torch.equal(one.view(torch.int32), other.view(torch.int32)):
                        raise UserError(f"{out}: {name} is not what was written: use another disk")
        require_whole(written)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")
        if config["magnetar"]["data"].get("pairs"):  # a run of pairs keeps its vocabulary
            for name, data in vocabulary_file(source).items():
                (folder / name).write_bytes(data)
        metrics = source.path.parent.parent / "metrics.jsonl"
        if source.checkpoint is not None and metrics.is_file():  # the curve up to the checkpoint
            shutil.copyfile(metrics, folder / metrics.name)
            keep_records_up_to(folder / metrics.name, about["step"])
            if words := read_records(metrics)[2]:
                print(f"warning: {words}", file=sys.stderr, flush=True)
    return Checkpoint(out / place, written.manifest)


def _pieces(content: Checkpoint | _Weights, stretches: Sequence[Stretch]) -> list[Piece]:
    """All that a file will hold."""
    pieces = []
    for name, start, stop in stretches:
        states = content.states(name)
        values = {state: content.read(name, state, start, stop) for state in states}
        pieces.append(Piece(name, start, values))
    return pieces


def _config_in(config: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """A run's config with its outputs in another folder."""
    moved, old = copy.deepcopy(dict(config)), config["magnetar"]["training"]["run_dir"]
    moved["magnetar"]["training"]["run_dir"] = str(run_dir)
    for monitor in ("tensorboard", "csv_monitor"):
        if (moved.get(monitor) or {}).get("output_path") == old:
            moved[monitor]["output_path"] = str(run_dir)
    return moved


def _how_to_train_on(run_dir: Path, num_ranks: int) -> str:
    """The shell command that continues a run."""
    return shlex.join(
        ["magnetar", "train", str(run_dir / CONFIG_FILE), "--num_gpus", str(num_ranks)]
    )


def _num_ranks(config: RunConfig) -> int:
    """Number of ranks whose micro-batches make up the batch; the smallest if one is open."""
    train, micro, accumulation = (config.deepspeed.get(key) for key in (TRAIN, MICRO, ACCUMULATION))
    if train is None or micro is None or accumulation is None:
        return config.model.moe.ep_size if config.model.moe else 1
    return train // (micro * accumulation)


def _config_for(
    checkpoint: Checkpoint, model: ModelConfig, layout: Layout, gpu_memory: float | None
) -> dict[str, Any]:
    """The run's config in the layout, which must be able to hold the model."""
    saved = checkpoint.manifest["config"]
    limit = None if gpu_memory is None else gpu_memory * GIB
    parameters = parameters_of(model)
    config, problems = problems_of(saved, layout, parameters, limit)
    if config is not None:
        return config.to_dict()
    nearest = nearest_layout(saved, layout, parameters, limit)
    way_out = (
        "no layout that divides its batch can: use GPUs with more memory (--gpu-memory), or train "
        "a smaller model"
        if nearest is None
        else f"the nearest layout that can: {nearest}"
    )
    lines = [f"{layout} cannot hold the model of {checkpoint.path}:", *problems]
    raise UserError("\n  ".join(lines) + f"\n{way_out}")


def stretches_of_rank(
    shapes: Mapping[str, tuple[int, ...]], layout: Layout, rank: int
) -> Iterator[Stretch]:
    """The content of a rank's files: its part of its own experts, and of everything else.

    Args:
        shapes: name -> shape of every tensor.
        layout: layout of the ranks that will read.
        rank: index of the rank in the layout.
    """
    num_experts = experts_of_layers(shapes)
    for name, shape in shapes.items():
        part, num_parts = rank, layout.world_size
        place = place_of(name)
        if place is not None and place.expert is not None:
            num_local_experts = num_experts[place.ffn] // layout.ep_size
            if place.expert // num_local_experts != rank % layout.ep_size:
                continue
            # The ranks that hold the same experts: every ep_size-th.
            part, num_parts = rank // layout.ep_size, layout.world_size // layout.ep_size
        start, stop = evenly_cut(prod(shape), part, num_parts)
        if start < stop:
            yield name, start, stop


def _files(checkpoint: Checkpoint, stretches: Iterator[Stretch]) -> Iterator[list[Stretch]]:
    """The stretches of each file, one file after the other; one file at least."""
    held: list[Stretch] = []
    size = 0
    for name, first, last in stretches:
        of_element = _FLOAT32_BYTES * len(checkpoint.states(name))
        most = PART_BYTES // of_element
        for start in range(first, last, most):
            stop = min(start + most, last)
            if held and size + (stop - start) * of_element > PART_BYTES:  # the file is full
                yield held
                held, size = [], 0
            held.append((name, start, stop))
            size += (stop - start) * of_element
    yield held
