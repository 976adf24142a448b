"""A checkpoint cut for other ranks: rank r's files hold its experts and its share of the rest.

`magnetar train` reads any checkpoint in any layout. Resharding is for ranks without a shared disk,
so that each machine needs only the files of its own ranks. It also tells beforehand whether a
layout can hold the model.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from magnetar.convert.expert_tensors import experts_of_layers, place_of
from magnetar.convert.folders import (
    config_in,
    equal_bits,
    how_to_train_on,
    require_new,
    vocabulary_file,
    watched,
)
from magnetar.data.atomic import atomic_folder
from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.format import (
    Checkpoint,
    CheckpointWriter,
    Piece,
    damaged_files,
    evenly_cut,
    require_whole,
)
from magnetar.engine.checkpoint.open_run import open_run
from magnetar.engine.checkpoint.save_load import part_name
from magnetar.engine.config.schema import Layout
from magnetar.engine.memory_planner import GIB, nearest_layout, parameters_of, problems_of
from magnetar.engine.metrics import keep_records_up_to
from magnetar.models.config import ModelConfig

# Largest size of a file in bytes; its tensors are in memory while it is written.
PART_BYTES = 1 << 30
_FLOAT32_BYTES = 4


def reshard(path: Path, out: Path, layout: Layout, gpu_memory: float | None) -> list[str]:
    """A report in lines, after writing a run's folder for other ranks.

    Args:
        path: a run (its newest complete checkpoint), or a checkpoint's folder.
        out: the run's new folder; it must not exist, or be empty. It is written atomically.
        layout: layout of the ranks that will train.
        gpu_memory: GiB of each rank's GPU; None: its memory is not checked.

    Raises:
        UserError: if the source cannot be read or is damaged, the layout cannot hold the model, the
            folder holds something, or the disk is full.
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
    config = _config_for(checkpoint, source.config, layout, gpu_memory)
    _require_whole(checkpoint)
    try:
        with atomic_folder(out) as folder:
            written = _write(checkpoint, folder, config_in(config, out), layout)
            _compare(checkpoint, written)
            _copy_metrics(checkpoint, folder)
            text = json.dumps(written.manifest["config"], indent=1)
            (folder / "config.json").write_text(text + "\n")
            if config["magnetar"]["data"].get("pairs"):
                for name, content in vocabulary_file(source).items():
                    (folder / name).write_bytes(content)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}): free some space, lift a "
            "limit on the size of files (ulimit -f), or name another folder"
        ) from None
    num_files = len(written.manifest["files"])
    return [
        f"read      {checkpoint.path}, {Layout.stored(checkpoint.manifest).in_words()}",
        f"wrote     {out / 'checkpoints' / written.path.name}, {layout.in_words()}, "
        f"{num_files} file{'s' * (num_files > 1)}, read back and compared",
        f"train on  {how_to_train_on(out / 'config.json', layout.world_size)}",
    ]


def _config_for(
    checkpoint: Checkpoint, model: ModelConfig, layout: Layout, gpu_memory: float | None
) -> dict[str, Any]:
    """The run's config in the layout.

    Raises:
        UserError: if the layout cannot hold the model; it names the nearest that can.
    """
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


def _require_whole(checkpoint: Checkpoint) -> None:
    """`require_whole` with progress."""
    names = list(checkpoint.manifest["files"])
    for index, _ in enumerate(watched("reading", names)):
        if damaged_files(checkpoint, index, len(names)):
            require_whole(checkpoint)  # names all


def _write(
    checkpoint: Checkpoint, folder: Path, config: dict[str, Any], layout: Layout
) -> Checkpoint:
    """The run's folder with the checkpoint alone."""
    # The step decides the name, since the checkpoint that is read may have been renamed.
    final = folder / "checkpoints" / f"step_{checkpoint.step:08d}"
    final.parent.mkdir(parents=True)
    writer = CheckpointWriter(final)
    parts = []
    ranks = {part_name(rank): rank for rank in range(layout.world_size)}
    for name in watched("writing", list(ranks)):
        stretches = stretches_of_rank(checkpoint.shapes, layout, ranks[name])
        for number, group in enumerate(_files(checkpoint, stretches)):
            part = name if number == 0 else name.replace(".", f"_{number:05d}.")
            writer.write_part(part, group)
            group.clear()  # the next is read while this name still stands
            parts.append(part)
    kept = {
        key: value
        for key, value in checkpoint.manifest.items()
        if key not in ("format", "files", "tensors", "sha256")
    }
    about = kept | {"layout": layout._asdict(), "config": config}
    return writer.commit(parts, checkpoint.shapes, about)


def stretches_of_rank(
    shapes: Mapping[str, tuple[int, ...]], layout: Layout, rank: int
) -> Iterator[tuple[str, int, int]]:
    """The content of a rank's files: its part of its own experts, and of everything else.

    Args:
        shapes: name -> shape of every tensor.
        layout: layout of the ranks that will read.
        rank: index of the rank in the layout.

    Yields:
        Name of a tensor, index of the first element, index after the last.
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


def _files(
    checkpoint: Checkpoint, stretches: Iterator[tuple[str, int, int]]
) -> Iterator[list[Piece]]:
    """The stretches of each file, one file after the other; one file at least."""
    pieces: list[Piece] = []
    size = 0
    for name, first, last in stretches:
        states = checkpoint.states(name)
        of_element = _FLOAT32_BYTES * len(states)
        for start, stop in _cut(first, last, PART_BYTES // of_element):
            numel = stop - start
            if pieces and size + numel * of_element > PART_BYTES:  # the file is full
                yield pieces
                pieces, size = [], 0
            values = {state: checkpoint.read(name, state, start, stop) for state in states}
            pieces.append(Piece(name, start, values))
            size += numel * of_element
    yield pieces


def _cut(start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    """The stretch in parts of at most `most` elements."""
    for first in range(start, stop, most):
        yield first, min(first + most, stop)


def _compare(checkpoint: Checkpoint, written: Checkpoint) -> None:
    """Read back and compare what was written.

    Raises:
        OSError: if a file differs from what was written, or holds other values than the source.
    """
    _require_whole(written)
    for name in watched("comparing", list(checkpoint.shapes)):
        for state in checkpoint.states(name):
            numel = prod(checkpoint.shapes[name])
            for start, stop in _cut(0, numel, PART_BYTES // (2 * _FLOAT32_BYTES)):
                read, saved = (one.read(name, state, start, stop) for one in (written, checkpoint))
                if not equal_bits(read, saved):
                    raise OSError(f"{name} is not what was written")


def _copy_metrics(checkpoint: Checkpoint, folder: Path) -> None:
    """The run's curve up to the checkpoint, if the run is still there."""
    metrics = checkpoint.path.parent.parent / "metrics.jsonl"
    if metrics.is_file():
        shutil.copyfile(metrics, folder / metrics.name)
        keep_records_up_to(folder / metrics.name, checkpoint.step)
