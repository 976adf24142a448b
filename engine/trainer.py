"""Training a language model from a config: the loop, from start or resume to summary."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor

from data.errors import UserError
from data.packed_lm import PackedLM, train_micro_batch
from data.token_files import Prepared, open_prepared
from engine.checkpoint import check_fits, complete_checkpoints, load_checkpoint, save_checkpoint
from engine.config import RunConfig, check_config
from engine.engine import build_engine, seed_noise, start_distributed, train_step
from engine.evaluation import Evaluation, evaluate
from engine.metrics import Metrics, keep_records_up_to
from engine.progress import ProgressLine
from engine.report import describe, finish
from engine.run_folder import check_run_folder
from engine.sparse_clip import SparseClip


def prepare_run(config: RunConfig, world_size: int) -> tuple[RunConfig, Prepared]:
    """Check everything that can be checked before a process group exists.

    Returns:
        The config with vocab_size filled in and outputs placed in the run's folder; the data.

    Raises:
        UserError: for data that is missing or does not fit, a run folder of another config, or a
            checkpoint of another model, layout or data.
    """
    prepared = open_prepared(Path(config.data.path))
    PackedLM(prepared.train, config.data.seq_len)
    PackedLM(prepared.valid, config.data.seq_len)
    resolved = config.to_dict()
    model = resolved["magnetar"]["model"]
    if model["vocab_size"] is None:
        model["vocab_size"] = prepared.vocab_size
    elif model["vocab_size"] < prepared.vocab_size:
        raise UserError(
            f"magnetar.model.vocab_size={model['vocab_size']} is smaller than the vocabulary of "
            f"{prepared.path}, {prepared.vocab_size}: use null, or at least {prepared.vocab_size}"
        )
    run_dir = config.training.run_dir
    for monitor, name in (("tensorboard", "tensorboard"), ("csv_monitor", "csv")):
        section = resolved.get(monitor, {})
        if section.get("enabled") and not section.get("output_path"):
            section |= {"output_path": run_dir, "job_name": name}
    result, problems = check_config(resolved, world_size)
    assert result is not None, problems
    check_run_folder(result)
    for checkpoint in complete_checkpoints(Path(run_dir))[-1:]:
        check_fits(checkpoint, result, prepared, world_size)
    return result, prepared


@dataclass
class TrainerState:
    """What a checkpoint keeps beside DeepSpeed's own state.

    The position in the data, the learning rate and the noise are functions of the step, so they
    need no entry here.

    Attributes:
        seconds: training time so far, over all starts.
        num_clipped: steps so far that SparseClip clipped.
        before: validation of the initial weights.
        after: the last validation so far.
    """

    seconds: float = 0.0
    num_clipped: int = 0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)


def train(config: RunConfig, prepared: Prepared) -> None:
    """Train to the end, resuming where the run's newest checkpoint left off.

    Args:
        config: from `prepare_run`.
        prepared: from `prepare_run`.

    Raises:
        UserError: if the loss stops being a number, or a checkpoint cannot be written or read.
    """
    training, run_dir = config.training, Path(config.training.run_dir)
    device = start_distributed()
    is_first_rank = dist.get_rank() == 0
    train_data = PackedLM(prepared.train, config.data.seq_len)
    valid_data = PackedLM(prepared.valid, config.data.seq_len)
    if is_first_rank:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")
    engine, sparse_clip = build_engine(config, device)
    aux_loss_weight = config.model.moe.aux_loss_weight if config.model.moe else 0.0
    state = resume(engine, sparse_clip, config)
    first_step = engine.global_steps
    metrics = Metrics(engine, config, sparse_clip, run_dir / "metrics.jsonl")
    progress = ProgressLine(first_step, training.num_steps, shown=is_first_rank)
    progress.note(describe(config, prepared, first_step))

    def validate() -> Evaluation:
        batch_size = engine.train_micro_batch_size_per_gpu()
        return evaluate(engine.module, valid_data, batch_size, device, training.eval_sequences)

    if not state.before:
        state.before = asdict(validate())
        metrics.write_validation(0, state.before)
    metrics.restart_clock()
    with progress:
        for step in range(first_step + 1, training.num_steps + 1):
            seed_noise(training.seed, step)
            result = train_step(
                engine, micro_batches(engine, train_data, step, training.seed), aux_loss_weight
            )
            if due(step, training.log_every, training.num_steps):
                record = metrics.training_record(step, result)
                require_finite(record, run_dir)
                metrics.write(record)
                progress.update(record)
            if due(step, training.eval_every, training.num_steps):
                with metrics.paused_clock():
                    state.after = asdict(validate())
                metrics.write_validation(step, state.after)
                progress.note(
                    f"step {step}: validation perplexity {state.after['perplexity']:,.2f}"
                )
            if due(step, training.save_every, training.num_steps):
                with metrics.paused_clock():
                    state.seconds += metrics.lap()
                    state.num_clipped = int(sparse_clip.num_clipped)
                    save_checkpoint(engine, step, config, prepared, asdict(state))
    state.after = state.after or asdict(validate())
    finish(engine, config, prepared, asdict(state), progress)
    dist.destroy_process_group()


def due(step: int, every: int | None, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last one, happens now."""
    return step == last or (every is not None and step % every == 0)


def micro_batches(
    engine: Any, dataset: PackedLM, step: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of the samples of an optimizer step (from 1): pairs of (B, T) int64."""
    for micro_step in range(engine.gradient_accumulation_steps()):
        inputs, targets = train_micro_batch(
            dataset,
            first_sample=(step - 1) * engine.train_batch_size(),
            micro_step=micro_step,
            micro_batch_size=engine.train_micro_batch_size_per_gpu(),
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            seed=seed,
        )
        yield (
            torch.from_numpy(inputs).to(engine.device, non_blocking=True),
            torch.from_numpy(targets).to(engine.device, non_blocking=True),
        )


def resume(engine: Any, sparse_clip: SparseClip, config: RunConfig) -> TrainerState:
    """Load the run's newest complete checkpoint, if there is one, on every rank alike."""
    run_dir = Path(config.training.run_dir)
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        # One rank looks: another might see a folder that is just being renamed.
        found = [next(reversed(complete_checkpoints(run_dir)), None)]
        keep_records_up_to(run_dir / "metrics.jsonl", found[0].step if found[0] else -1)
    torch.distributed.broadcast_object_list(found, src=0)
    if found[0] is None:
        return TrainerState()
    state = TrainerState(**load_checkpoint(engine, found[0])["trainer"])
    sparse_clip.num_clipped += state.num_clipped
    return state


def require_finite(record: dict[str, float], run_dir: Path) -> None:
    """Stop a run whose loss is no number any more.

    Raises:
        UserError: on every rank alike, since the record is of the whole batch.
    """
    if not math.isfinite(record["loss"]):
        raise UserError(
            f"loss={record['loss']} at step {record['step']}: the run has diverged; what it saved "
            f"before is in {run_dir / 'checkpoints'}: lower optimizer.params.lr or "
            "gradient_clipping, or lengthen training.lr_schedule.warmup_steps"
        )
