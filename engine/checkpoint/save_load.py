"""Saving a run in the background while it trains, and resuming it in any layout.

`engine.checkpoint.format` describes the files, and `engine.zero` the shard of each parameter that a
rank keeps.
"""

import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch

from magnetar.data.errors import UserError
from magnetar.data.loader import RunData
from magnetar.engine.checkpoint.format import (
    CHECKPOINTS,
    PARTIAL,
    WEIGHT,
    Checkpoint,
    CheckpointWriter,
    Piece,
    checkpoint_folders,
    damaged_files,
    looked_at,
    remove,
    remove_old,
)
from magnetar.engine.checkpoint.run_folder import LAYOUT_KEYS, differing, with_defaults
from magnetar.engine.config.schema import RunConfig
from magnetar.engine.deepspeed_engine import DeepSpeedEngine
from magnetar.engine.optim.adam import EightBitMoment, Moment
from magnetar.engine.optim.ema import EMA
from magnetar.engine.zero import (
    Share,
    adam_step,
    finish_adam,
    shares,
    small_parameters_sharded,
    start_adam,
    whole_weights,
)
from magnetar.models.config import ModelConfig
from magnetar.models.weights.load_save import check_tensors, tensor_shapes

_POLL_SECONDS = 0.05


def part_name(rank: int) -> str:
    """Name of the file that a rank saves."""
    return f"rank_{rank:05d}.safetensors"


class Saver:
    """Writes checkpoints of one run in the background; only `training.keep_checkpoints` remain.

    `save` returns at once. A thread copies this rank's shards while the next step's forward and
    backward passes run. Only the optimizer update modifies those tensors, so it waits for the copy.
    The thread then writes the copy. When the parts of all ranks are on the disk, rank 0 commits the
    checkpoint, and `wait` returns. As a context manager it waits at the end, and after an error
    that every rank raises.
    """

    def __init__(self, engine: DeepSpeedEngine, config: RunConfig, prepared: RunData) -> None:
        """Make the optimizer wait for copies, and remove partial folders of a killed run."""
        self.engine, self.config, self.prepared = engine, config, prepared
        self.folder = Path(config.training.run_dir) / CHECKPOINTS
        self.is_first_rank = dist.get_rank() == 0
        # Steps of checkpoints that this process has read or written.
        self.whole = {engine.global_steps}
        self.problem = ""
        self.aborted = threading.Event()
        self.writing: threading.Thread | None = None
        self.committing: threading.Thread | None = None
        self.memory = torch.empty(0)  # for the copy; the first save allocates it
        self.copied = threading.Event()
        self.copied.set()
        engine.basic_optimizer.register_step_pre_hook(lambda *_: self._wait_for_copy())
        if self.is_first_rank:
            for leftover in self.folder.glob(f"{PARTIAL}*"):
                remove(leftover)
        dist.barrier()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if error is None or (isinstance(error, UserError) and error.on_every_rank):
            self.wait()

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Begin a checkpoint; every rank calls this.

        Args:
            step: Number of optimizer steps done.
            state: State of the trainer, in JSON's types.

        Raises:
            UserError: if a rank could not write the checkpoint before. Every rank raises it.
        """
        self.wait()
        writer = CheckpointWriter(self.folder / f"step_{step:08d}")
        self.aborted.clear()
        self.copied.clear()
        begun = None
        if self.engine.device.type == "cuda":
            begun = torch.cuda.Event()
            begun.record()
        self.writing = _thread(self._write, writer, self._pieces(), begun)
        if self.is_first_rank:
            about = self._about(step, state)
            self.committing = _thread(self._commit, writer, about)

    def wait(self) -> None:
        """Return when the last checkpoint is complete; every rank calls this.

        Raises:
            UserError: if a rank could not write it. Every rank raises it. Older checkpoints stay.
        """
        if self.writing is None:
            return
        self.writing.join()
        problems = _of_all_ranks(self.problem)
        if any(problems):
            self.aborted.set()
        if self.committing is not None:
            self.committing.join()
        problems = problems if any(problems) else _of_all_ranks(self.problem)
        self.writing = self.committing = None
        self.problem = ""
        for rank, problem in enumerate(problems):
            if problem:
                raise UserError(self._could_not_write(rank, problem), on_every_rank=True)

    def _could_not_write(self, rank: int, problem: str) -> str:
        disk = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free = shutil.disk_usage(disk).free / 2**20
        return (
            f"{self.folder}: rank {rank} could not write the checkpoint ({problem}; "
            f"{free:.0f} MiB free): what was saved before is as it was; free some space, and "
            "start the same command again"
        )

    def _wait_for_copy(self) -> None:
        self.copied.wait()

    def _pieces(self) -> list[tuple[str, int, dict[str, Moment]]]:
        """Views of what this rank saves, as in a Piece, but moments may be 8-bit."""
        return [
            (name, place, {s: v.narrow(0, index - share.start, n) for s, v in values.items()})
            for share in shares(self.engine)
            for values in [share.values]
            for name, place, index, n in share.tensors.stretches(*share.saved)
        ]

    def _about(self, step: int, state: Mapping[str, Any]) -> dict[str, Any]:
        engine = self.engine
        scaler = vars(engine.optimizer.loss_scaler) if self.config.dtype == "fp16" else {}
        return {
            "step": step,
            "layout": self.config.layout(dist.get_world_size())._asdict(),
            "config": self.config.to_dict(),
            "tokenizer_fingerprint": self.prepared.manifest.tokenizer_fingerprint,
            "data_fingerprint": self.prepared.fingerprint,
            "trainer": dict(state),
            "optimizer": {
                "step": adam_step(engine),
                "schedule_step": engine.lr_scheduler.last_epoch,
                "skipped_steps": engine.skipped_steps,
                "loss_scaler": {
                    name: value for name, value in scaler.items() if isinstance(value, (int, float))
                },
            },
        }

    def _write(
        self,
        writer: CheckpointWriter,
        pieces: list[tuple[str, int, dict[str, Moment]]],
        begun: torch.cuda.Event | None,
    ) -> None:
        try:
            try:
                copy = self._copy_of(pieces, begun)
            finally:
                self.copied.set()
            writer.write_part(part_name(dist.get_rank()), copy)
        except Exception as error:  # this is a thread; `wait` raises it on every rank
            self.problem = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"

    def _copy_of(
        self, pieces: list[tuple[str, int, dict[str, Moment]]], begun: torch.cuda.Event | None
    ) -> list[Piece]:
        """A copy of the pieces on the host, with their values at the event `begun`."""
        is_cuda = begun is not None
        numel = sum(value.numel() for _, _, states in pieces for value in states.values())
        if self.memory.numel() < numel:
            self.memory = torch.empty(numel, pin_memory=is_cuda)
        copies, position = [], 0
        with torch.cuda.stream(torch.cuda.Stream(self.engine.device) if is_cuda else None):
            if begun is not None:
                begun.wait()
            for name, start, states in pieces:
                values = {}
                for state, source in states.items():
                    values[state] = self.memory[position : position + source.numel()]
                    if isinstance(source, EightBitMoment):
                        source.copy_to(values[state], non_blocking=is_cuda)
                    else:
                        values[state].copy_(source, non_blocking=is_cuda)
                    position += source.numel()
                copies.append(Piece(name, start, values))
            if is_cuda:
                torch.cuda.current_stream().synchronize()
        return copies

    def _commit(self, writer: CheckpointWriter, about: dict[str, Any]) -> None:
        parts = [part_name(rank) for rank in range(dist.get_world_size())]
        while not all(writer.has_part(part) for part in parts):
            if self.aborted.is_set():
                writer.abandon()
                return
            time.sleep(_POLL_SECONDS)
        try:
            writer.commit(parts, tensor_shapes(self.config.model), about)
            self.whole.add(about["step"])
            keep = self.config.training.keep_checkpoints
            remove_old(self.folder.parent, about["step"], keep, self.whole)
        except Exception as error:  # as in `_write`
            self.problem = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            writer.abandon()


def _thread(target: Callable[..., Any], *arguments: Any) -> threading.Thread:
    # A daemon: if another rank has died, the commit waits for its part, and must not keep this
    # process alive.
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def _of_all_ranks(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def newest_whole_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint of a run without a damaged file; every rank calls this.

    The ranks divide the reading. A damaged file is named on stderr, and the checkpoint before it is
    taken.

    Raises:
        UserError: if there are checkpoints, and none is whole. Every rank raises it.
    """
    # One rank looks for all: two could see different folders while one is being renamed.
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [[looked_at(path) for path in reversed(checkpoint_folders(run_dir))]]
        except UserError as error:
            found = [str(error)]
    torch.distributed.broadcast_object_list(found, src=0)
    if isinstance(found[0], str):
        raise UserError(found[0], on_every_rank=True)
    problems: list[str] = []
    for checkpoint, damaged in found[0]:
        if checkpoint is not None:
            mine = damaged_files(checkpoint, dist.get_rank(), dist.get_world_size())
            damaged = [line for lines in _of_all_ranks(mine) for line in lines]
            if not damaged:
                for problem in problems if dist.get_rank() == 0 else ():
                    words = f"warning: {problem}: going on from an older one"
                    print(words, file=sys.stderr, flush=True)
                return checkpoint
        problems += damaged
    if problems:
        lines = [
            f"{run_dir / CHECKPOINTS}: no checkpoint is whole:",
            *problems,
            "bring the files back, readable and as they were saved, or train anew in another "
            "training.run_dir",
        ]
        raise UserError("\n  ".join(lines), on_every_rank=True)
    return None


def check_fits(checkpoint: Checkpoint, config: RunConfig, prepared: RunData) -> None:
    """Refuse to resume from a checkpoint of another model or other data.

    Raises:
        UserError: if a key differs; the message names each.
    """
    manifest = checkpoint.manifest
    saved_model = with_defaults(manifest["config"])["magnetar"]["model"]
    data = {"fingerprint": prepared.fingerprint[:12]}
    for kind, saved, now in (
        ("model", saved_model, config.model.model_dump(mode="json")),
        ("data set", {"fingerprint": manifest["data_fingerprint"][:12]}, data),
    ):
        different = [
            f"{key} {value} there and {own} here"
            for key, value, own in differing(saved, now, LAYOUT_KEYS)
        ]
        if different:
            raise UserError(
                f"{checkpoint.path} was saved with another {kind}: {', '.join(different)}: go on "
                f"with the {kind} that it was saved with, or start in another training.run_dir"
            )


@torch.no_grad()
def load_checkpoint(engine: DeepSpeedEngine, config: RunConfig, checkpoint: Checkpoint) -> dict:
    """Read this rank's shards and the counters; return the trainer's state.

    Raises:
        UserError: if another version has named the tensors. Every rank raises it.
    """
    require_same_tensors(checkpoint, config.model)
    with small_parameters_sharded(engine):
        for tensors, start, values in whole_weights(engine):
            _fill(checkpoint, Share(tensors, start, {WEIGHT: values}, (start, start + len(values))))
    about = checkpoint.manifest["optimizer"]
    if about["step"] > 0:
        start_adam(engine, about["step"])
    for share in shares(engine):
        _fill(checkpoint, share)
    finish_adam(engine)
    _set_counters(engine, checkpoint.step, about)
    return checkpoint.manifest["trainer"]


def _fill(checkpoint: Checkpoint, share: Share) -> None:
    """Read a shard of a parameter from the tensors that it consists of."""
    numel = len(next(iter(share.values.values())))
    for name, place, index, length in share.tensors.stretches(share.start, share.start + numel):
        for state, values in share.values.items():
            # An imported run has no EMA, so it starts from the weights.
            stored = checkpoint.states(name)
            source = WEIGHT if state == EMA and EMA not in stored else state
            if source in stored:
                assert not isinstance(values, EightBitMoment)  # before `finish_adam`
                saved = checkpoint.read(name, source, place, place + length)
                at = index - share.start
                values[at : at + length].copy_(saved)


def _set_counters(engine: DeepSpeedEngine, step: int, about: dict[str, Any]) -> None:
    """Set the counters of the engine, the schedule and the loss scale to those of a step."""
    engine.global_steps = step
    engine.global_samples = step * engine.train_batch_size()
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    engine.skipped_steps = about["skipped_steps"]
    scheduler = engine.lr_scheduler
    scheduler.last_epoch = about["schedule_step"]
    scheduler._last_lr = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, lr in zip(engine.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = lr
    for name, value in about["loss_scaler"].items():
        setattr(engine.optimizer.loss_scaler, name, value)


def require_same_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Refuse a checkpoint whose tensors have other names or shapes than the config's model."""
    try:
        check_tensors(tensor_shapes(config), checkpoint.shapes)
    except ValueError as error:
        raise UserError(
            f"{checkpoint.path} was saved by a version with another model inside ({error}): use "
            "that version of Magnetar, or train anew in another training.run_dir",
            on_every_rank=True,
        ) from None
