"""Training a model from a config: the loop, from start or resume to summary."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor

from data.errors import UserError
from data.pairs import PreparedPairs
from engine.admin import require_profile
from engine.checkpoint import Saver, check_fits, load_checkpoint, newest_whole_checkpoint
from engine.checkpoint_files import complete_checkpoints
from engine.config import RunConfig, check_config
from engine.engine import (
    StepResult,
    build_engine,
    launched_rank,
    loss_weights,
    start_distributed,
    train_step,
)
from engine.metrics import Metrics, keep_records_up_to
from engine.optimizers import require_optimizer_package
from engine.pair_data import MAX_BIN_ROWS
from engine.progress import ProgressLine
from engine.report import describe, finish, validation_words
from engine.run_data import (
    RunData,
    TrainingSet,
    micro_batch,
    open_run_data,
    training_set,
    validation_set,
)
from engine.run_folder import check_run_folder, claim_run_folder, write_whole
from engine.sparse_clip import SparseClip
from engine.starting_weights import require_starting_weights
from engine.validation import evaluation


def prepare_run(config: RunConfig, world_size: int) -> tuple[RunConfig, RunData]:
    """Check everything that can be checked before a process group exists.

    Returns:
        The config with vocab_size filled in and outputs placed in the run's folder; the data.

    Raises:
        UserError: for data that is missing or does not fit, a run folder of another config, an
            Admin model without its profile, or a checkpoint of another model or other data.
    """
    result, prepared = resolve_run(config, world_size)
    check_run_folder(result)
    require_starting_weights(result)
    require_profile(result)
    run_dir = Path(result.training.run_dir)
    for checkpoint in complete_checkpoints(run_dir)[-1:]:
        check_fits(checkpoint, result, prepared)
        if checkpoint.step > result.training.num_steps:
            raise UserError(
                f"magnetar.training.num_steps={result.training.num_steps} is less than the "
                f"{checkpoint.step} steps that {run_dir} has done: use {checkpoint.step} or more, "
                "or name another training.run_dir"
            )
    return result, prepared


def resolve_run(config: RunConfig, world_size: int) -> tuple[RunConfig, RunData]:
    """The config with what depends on the data filled in, and the data.

    Raises:
        UserError: for data that is missing or does not fit, or a missing package of a
            monitor or of the optimizer.
    """
    prepared = open_run_data(config)
    training_set(prepared, config)
    validation_set(prepared, config)
    resolved = config.to_dict()
    resolved["magnetar"]["model"]["vocab_size"] = fitting_vocab_size(config, prepared)
    schedule = resolved["magnetar"]["training"]["lr_schedule"]
    if schedule["type"] == "polynomial" and schedule["total_steps"] is None:
        # Written down, so that a longer run cannot bend the schedule of the steps already done.
        schedule["total_steps"] = config.training.num_steps
    run_dir = config.training.run_dir
    require_monitor_packages(resolved)
    require_optimizer_package(resolved)
    for monitor, name in (("tensorboard", "tensorboard"), ("csv_monitor", "csv")):
        section = resolved.get(monitor, {})
        if section.get("enabled") and not section.get("output_path"):
            section |= {"output_path": run_dir, "job_name": name}
    result, problems = check_config(resolved, world_size)
    assert result is not None, problems
    return result, prepared


def fitting_vocab_size(config: RunConfig, prepared: RunData) -> int:
    """Rows of the embedding: one for each piece of the vocabulary, and one for a mask token.

    Raises:
        UserError: the config asks for fewer.
    """
    given, is_masked = config.model.vocab_size, config.data.masking is not None
    needed = prepared.vocab_size + is_masked
    if given is not None and given < needed:
        with_mask = " and a mask token" if is_masked else ""
        raise UserError(
            f"magnetar.model.vocab_size={given} is smaller than the vocabulary of "
            f"{prepared.path}{with_mask}, {needed}: use null, or at least {needed}"
        )
    return given or needed


def require_monitor_packages(config: dict[str, Any]) -> None:
    """Refuse a monitor whose package is missing; DeepSpeed would notice when all ranks run.

    Raises:
        UserError: naming the section and the package.
    """
    for monitor, package in (("tensorboard",) * 2, ("wandb",) * 2, ("comet", "comet_ml")):
        if config.get(monitor, {}).get("enabled") and find_spec(package) is None:
            raise UserError(
                f"{monitor}.enabled=true needs the package {package}, which is not installed: "
                f"run pip install {package}, or set {monitor}.enabled=false"
            )


@dataclass
class TrainerState:
    """What a checkpoint keeps beside DeepSpeed's own state.

    The position in the data, the learning rate and the noise are functions of the step, so they
    need no entry here.

    Attributes:
        seconds: training time so far, over all starts.
        num_clipped: steps so far that SparseClip clipped.
        num_targets: tokens so far that were asked about.
        before: validation of the initial weights.
        after: the last validation so far.
        examples: what the initial weights made of a few sentences, see engine.validation.
    """

    seconds: float = 0.0
    num_clipped: int = 0
    num_targets: int = 0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    examples: list = field(default_factory=list)


def train(config: RunConfig, prepared: RunData) -> None:
    """Train to the end, resuming where the run's newest checkpoint left off.

    Args:
        config: from `prepare_run`.
        prepared: from `prepare_run`.

    Raises:
        UserError: if the loss stops being a number, or a checkpoint cannot be written or read.
    """
    training, run_dir = config.training, Path(config.training.run_dir)
    # Before the ranks join: the others would report the loss of a refused first rank.
    lock = claim_run_folder(run_dir) if launched_rank() == 0 else None
    device = start_distributed()
    is_first_rank = dist.get_rank() == 0
    train_data, valid_data = training_set(prepared, config), validation_set(prepared, config)
    engine, sparse_clip = build_engine(config, device)
    if is_first_rank:  # not earlier: a start that fails must not claim the folder
        write_whole(run_dir / "config.json", json.dumps(config.to_dict(), indent=1) + "\n")
        if isinstance(prepared, PreparedPairs):  # all that translating needs beside the weights
            name = prepared.manifest.tokenizer_file
            (run_dir / name).write_bytes((prepared.path / name).read_bytes())
    weights = loss_weights(config)
    state = resume(engine, sparse_clip, config)
    first_step = engine.global_steps
    file, max_rows = run_dir / "metrics.jsonl", MAX_BIN_ROWS if config.data.pairs else None
    metrics = Metrics(engine, config, sparse_clip, file, state.num_targets)
    progress = ProgressLine(first_step, training.num_steps, shown=is_first_rank)
    progress.note(describe(config, prepared, train_data, valid_data, first_step))

    if not state.before:
        state.before, state.examples = evaluation(engine, config, prepared, valid_data)
        metrics.write_validation(0, state.before)
    metrics.restart_clock()
    with progress, Saver(engine, config, prepared) as saver:
        for step in range(first_step + 1, training.num_steps + 1):
            batch = micro_batches(config, train_data, step, device)
            result = train_step(engine, batch, weights, training.seed, step, max_rows)
            metrics.count(result)
            is_logged = due(step, training.log_every, training.num_steps)
            is_saved = due(step, training.save_every, training.num_steps)
            if is_logged or is_saved:
                require_finite(engine, result, sparse_clip, step, run_dir)
            if is_logged:
                record = metrics.training_record(step, result)
                metrics.write(record)
                progress.update(record)
            if due(step, training.eval_every, training.num_steps):
                with metrics.paused_clock():
                    state.after, _ = evaluation(engine, config, prepared, valid_data)
                metrics.write_validation(step, state.after)
                progress.note(f"step {step}: validation {validation_words(state.after)}")
            if is_saved:
                with metrics.paused_clock():
                    state.seconds += metrics.lap()
                    state.num_clipped = int(sparse_clip.num_clipped)
                    state.num_targets = int(metrics.num_targets)
                    if training.save_every != "never":
                        saver.save(step, asdict(state))
    state.after = state.after or evaluation(engine, config, prepared, valid_data)[0]
    finish(engine, config, prepared, valid_data, asdict(state), progress)
    engine.destroy()  # its hooks are cycles that no garbage collection finds
    if lock is not None:
        lock.close()


def due(step: int, every: int | str | None, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last one, happens now."""
    return step == last or (isinstance(every, int) and step % every == 0)


def micro_batches(
    config: RunConfig, dataset: TrainingSet, step: int, device: torch.device
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """This rank's part of the samples of an optimizer step (from 1): inputs and targets."""

    def on_device(array: Any) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    rank, world_size = dist.get_rank(), dist.get_world_size()
    for micro_step in range(config.deepspeed["gradient_accumulation_steps"]):
        inputs, targets = micro_batch(config, dataset, step, micro_step, rank, world_size)
        yield tuple(map(on_device, inputs)), on_device(targets)


def resume(engine: Any, sparse_clip: SparseClip, config: RunConfig) -> TrainerState:
    """Load the run's newest whole checkpoint, if there is one, on every rank alike."""
    run_dir = Path(config.training.run_dir)
    checkpoint = newest_whole_checkpoint(run_dir)
    if dist.get_rank() == 0:
        keep_records_up_to(run_dir / "metrics.jsonl", checkpoint.step if checkpoint else -1)
    if checkpoint is None:
        return TrainerState()
    state = TrainerState(**load_checkpoint(engine, config, checkpoint))
    sparse_clip.num_clipped += state.num_clipped
    purge_tensorboard(engine.monitor, checkpoint.step)
    return state


def purge_tensorboard(monitor: Any, step: int) -> None:
    """Have TensorBoard forget what was logged after a step: it will be logged again."""
    writer = getattr(monitor.tb_monitor, "summary_writer", None)
    if writer is not None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        writer.file_writer.add_event(start, step + 1)


def require_finite(
    engine: Any, result: StepResult, sparse_clip: SparseClip, step: int, run_dir: Path
) -> None:
    """Stop a run whose loss or gradient is no number any more, before it is saved.

    Raises:
        UserError: on every rank alike.
    """
    # A step that DeepSpeed skipped for an overflow (fp16) is no divergence, and has no norm.
    skipped = bool(getattr(engine.optimizer, "overflow", False))
    norm = torch.zeros_like(sparse_clip.norm) if skipped else sparse_clip.norm
    values = torch.stack([result.loss, norm])
    dist.all_reduce(values)
    if not values.isfinite().all():
        raise UserError(
            f"the run diverged: loss {float(result.loss)}, gradient norm "
            f"{float(sparse_clip.norm)} at step {step}. What it saved before is in "
            f"{run_dir / 'checkpoints'}. Start in another training.run_dir with a lower "
            "optimizer.params.lr or gradient_clipping, or a longer "
            "training.lr_schedule.warmup_steps",
            on_every_rank=True,
        )
