"""The mean of the weights of several checkpoints: often a better model than the last of them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from magnetar.convert.folders import open_whole, require_new, vocabulary_file, write_folder
from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.format import checkpoint_folders
from magnetar.engine.checkpoint.open_run import SavedModel, is_run
from magnetar.engine.checkpoint.run_folder import differing, flat_keys
from magnetar.engine.checkpoint.vocabulary import require_vocabulary
from magnetar.models.weights.files import LazyTensors, Spec


def average(
    paths: Sequence[Path], out: Path, last: int | None, shard_bytes: int | None
) -> list[str]:
    """A report in lines, after writing the mean model to a new folder.

    Args:
        paths: runs (each stands for its newest checkpoint), checkpoints' folders, or folders of
            weights: two or more, or one run with `last`. They are of one model and vocabulary.
        out: new folder.
        last: number of newest checkpoints of the one run.
        shard_bytes: largest size of a file, see `write_files`.
    """
    for path in paths:
        require_new(out, path)
    sources = [open_whole(path, out) for path in _expanded(paths, last)]
    if len(sources) < 2:
        raise UserError(
            f"{paths[0]} alone has no mean: name several checkpoints, or a run with --last 3"
        )
    for index, other in enumerate(sources[1:], start=1):
        if any(other.path.samefile(source.path) for source in sources[:index]):
            raise UserError(f"{other.path} is named twice: name each checkpoint once")
        _require_same_model(sources[0], other)
    tokenizer = vocabulary_file(sources[0])
    without = "" if tokenizer else ", without a tokenizer, which is not where the run read it"
    rows = [("" if index else "averaged", str(one.path)) for index, one in enumerate(sources)]
    rows.append(("wrote", f"{out}{without}"))
    return write_folder(
        out,
        sources[0].config,
        mean_of(sources),
        rows,
        shard_bytes=shard_bytes,
        other_files=tokenizer,
    )


def _expanded(paths: Sequence[Path], last: int | None) -> list[Path]:
    """The folders to average, each checkpoint of `last` by itself."""
    if last is None:
        return list(paths)
    if len(paths) > 1 or not is_run(paths[0]):
        named = f"{len(paths)} folders" if len(paths) > 1 else f"{paths[0]}, which is no run"
        raise UserError(
            f"--last {last} takes the newest checkpoints of one run, not of {named}: name one "
            "run, or leave --last out"
        )
    found = checkpoint_folders(paths[0])
    if not 2 <= last <= len(found):
        raise UserError(
            f"--last {last}: {paths[0]} has {len(found)} checkpoints: use a number from 2 to that "
            "(magnetar.training.keep_checkpoints says how many a run keeps)"
        )
    return found[-last:]  # reading refuses a damaged one


def _require_same_model(first: SavedModel, other: SavedModel) -> None:
    """Refuse another model, by the first key that differs, or another vocabulary."""
    keys, others = (dict(flat_keys(one.config.model_dump(mode="json"))) for one in (first, other))
    for key, there, here in differing(keys, others):
        raise UserError(
            f"{other.path} has another model than {first.path}: magnetar.model.{key} is {here}, "
            f"not {there}: average checkpoints of one model"
        )
    if first.fingerprint and other.fingerprint:
        require_vocabulary(
            f"{other.path} was trained with",
            other.fingerprint,
            str(first.path),
            first.fingerprint,
            "average checkpoints of one vocabulary",
        )


def mean_of(sources: Sequence[SavedModel]) -> LazyTensors:
    """The mean of each tensor, summed in float64, in the sources' type or, if they differ, float32.

    Args:
        sources: weights of one model.
    """

    def dtype_of(name: str) -> torch.dtype:
        dtypes = {source.tensors.specs[name].dtype for source in sources}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def read(name: str) -> Tensor:
        total = sources[0].tensors.read(name).to(torch.float64, copy=True)
        for source in sources[1:]:
            total += source.tensors.read(name)
        return total.div_(len(sources)).to(specs[name].dtype)

    shapes = sources[0].tensors.specs
    specs = {name: Spec(dtype_of(name), spec.shape) for name, spec in shapes.items()}
    return LazyTensors(specs, read)
