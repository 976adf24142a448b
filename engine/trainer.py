"""Training a model from a config: the loop, from start or resume to summary."""

import json
import math
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch

from magnetar.data.atomic import write_atomically
from magnetar.data.errors import UserError
from magnetar.data.pairs.folder import PreparedPairs
from magnetar.engine import logbook
from magnetar.engine.admin import require_profile
from magnetar.engine.batches import TrainingBatches
from magnetar.engine.build import build_engine, launched_rank, start_distributed
from magnetar.engine.checkpoint.format import Checkpoint, complete_checkpoints
from magnetar.engine.checkpoint.run_folder import (
    check_run_folder,
    claim_run_folder,
    differing,
    flat_keys,
)
from magnetar.engine.checkpoint.save_load import (
    Saver,
    check_fits,
    load_checkpoint,
    newest_whole_checkpoint,
)
from magnetar.engine.checkpoint.starting_weights import require_starting_weights
from magnetar.engine.cluster.signals import Requests
from magnetar.engine.cluster.start_times import StartTimes
from magnetar.engine.cluster.watchdog import Watchdog
from magnetar.engine.config.schema import RunConfig, check_config
from magnetar.engine.evaluate import evaluation
from magnetar.engine.guards import Guards, require_equal_replicas
from magnetar.engine.memory_planner import require_host_memory
from magnetar.engine.metrics import Metrics, keep_records_up_to
from magnetar.engine.optim.adam import require_optimizer_package
from magnetar.engine.pair_data import MAX_BIN_ROWS
from magnetar.engine.progress import ProgressLine
from magnetar.engine.report.samples import describe, finish, validation_words
from magnetar.engine.run_data import RunData, open_run_data, training_set, validation_set
from magnetar.engine.train_step import loss_weights, train_step
from magnetar.engine.translation.translate import require_sacrebleu


def prepare_run(config: RunConfig, world_size: int) -> tuple[RunConfig, RunData]:
    """Check everything that can be checked before a process group exists.

    Returns:
        The config with vocab_size filled in and outputs placed in the run's folder; the data.

    Raises:
        UserError: for data that is missing or does not fit, a model that this machine's memory
            does not hold, a run folder of another config, an Admin model without its profile, or
            a checkpoint of another model or other data.
    """
    result, prepared = resolve_run(config, world_size)
    require_host_memory(result, world_size)
    check_run_folder(result)
    require_starting_weights(result, prepared.manifest.tokenizer_fingerprint)
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
    if config.data.pairs is not None:
        require_sacrebleu()
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

    The position in the data, the learning rate and the noise are functions of the step and of
    `batch_offset`, so they need no entry here.

    Attributes:
        seconds: training time so far, over all starts.
        num_clipped: steps so far that SparseClip clipped.
        num_targets: tokens so far that were asked about.
        num_bad: steps so far that engine.guards left out.
        batch_offset: batches that were left out when the run went back: step s trains on batch
            s + batch_offset.
        recent_losses: with which engine.guards compares the next one.
        before: validation of the initial weights.
        after: the last validation so far.
        examples: what the initial weights made of a few sentences, see engine.evaluate.
    """

    seconds: float = 0.0
    num_clipped: int = 0
    num_targets: int = 0
    num_bad: int = 0
    batch_offset: int = 0
    recent_losses: list[float] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    examples: list = field(default_factory=list)


def train(config: RunConfig, prepared: RunData, times: StartTimes | None = None) -> None:
    """Train to the end, resuming where the run's newest checkpoint left off.

    A signal may ask it to stop earlier: see engine.cluster.signals.

    Args:
        config: from `prepare_run`.
        prepared: from `prepare_run`.
        times: of the start so far; None: of this function on.

    Raises:
        UserError: if the loss stops being a number and going back does not help, or a checkpoint
            cannot be written or read.
        MachineError: if ranks that should hold the same weights do not.
    """
    run_dir = Path(config.training.run_dir)
    # Before the ranks join: the others would report the loss of a refused first rank.
    lock = claim_run_folder(run_dir) if launched_rank() == 0 else None
    times = times or StartTimes()
    device = start_distributed()
    times.end("join")
    with Watchdog(run_dir, config.guards.hang_timeout_seconds) as watchdog, Requests() as requests:
        trainer = Trainer(config, prepared, device, watchdog, requests, times)
        if trainer.run():
            watchdog.beat("the last evaluation")
            trainer.finish()
        trainer.engine.destroy()  # its hooks are cycles that no garbage collection finds
    if lock is not None:
        lock.close()


class Trainer:
    """One run in this process: from start or resume to its last step."""

    def __init__(
        self,
        config: RunConfig,
        prepared: RunData,
        device: torch.device,
        watchdog: Watchdog,
        requests: Requests,
        times: StartTimes,
    ) -> None:
        """Build the engine, and load the newest checkpoint if there is one."""
        self.config, self.prepared, self.device = config, prepared, device
        self.watchdog, self.times = watchdog, times
        self.run_dir = Path(config.training.run_dir)
        self.is_first_rank = dist.get_rank() == 0
        self.train_data = training_set(prepared, config)
        self.batches = TrainingBatches(config, self.train_data, device)
        self.valid_data = validation_set(prepared, config)
        self.weights = loss_weights(config)
        self.engine, self.sparse_clip = build_engine(config, device)
        times.end("build")
        self.guards = Guards(self.engine, self.sparse_clip, config.guards, requests)
        if self.is_first_rank:  # not earlier: a start that fails must not claim the folder
            self._write_config()
        self.state = TrainerState()
        self.num_returns, self.save_is_due, self.has_begun = 0, False, False
        checkpoint = newest_whole_checkpoint(self.run_dir)
        self._forget_records_after(checkpoint.step if checkpoint else -1)
        if checkpoint is not None:
            self._load(checkpoint)
            purge_tensorboard(self.engine.monitor, checkpoint.step)
        times.end("load")
        first_step = self.engine.global_steps
        self.metrics = Metrics(
            self.engine,
            config,
            self.sparse_clip,
            self.run_dir / "metrics.jsonl",
            self.state.num_targets,
        )
        self.metrics.num_bad = self.state.num_bad
        num_steps = config.training.num_steps
        self.progress = ProgressLine(first_step, num_steps, shown=self.is_first_rank)
        about = describe(config, prepared, self.train_data, self.valid_data, first_step)
        self.progress.note(about)
        self._log("resume" if first_step else "start", about)

    def run(self) -> bool:
        """Train to the last step; whether it was reached, and no signal has stopped the run."""
        training, engine, state = self.config.training, self.engine, self.state
        if not state.before:
            self.watchdog.beat("the first evaluation")
            state.before, state.examples = evaluation(
                engine, self.config, self.prepared, self.valid_data
            )
            self.metrics.write_validation(0, state.before)
            self.times.end("evaluation")
        self.metrics.restart_clock()
        with self.progress, Saver(engine, self.config, self.prepared) as self.saver:
            while engine.global_steps < training.num_steps:
                if problem := self._step(engine.global_steps + 1):
                    self._go_back(problem)
                elif self.guards.stop:
                    self._stop()
                    return False
        return True

    def finish(self) -> None:
        """Evaluate, write summary.json and print the closing table."""
        state = self.state
        if not state.after:
            state.after, _ = evaluation(self.engine, self.config, self.prepared, self.valid_data)
        finish(
            self.engine, self.config, self.prepared, self.valid_data, asdict(state), self.progress
        )
        self._log("end", f"{self.engine.global_steps} steps: {validation_words(state.after)}")

    def _step(self, step: int) -> str:
        """One step and what is due after it; why the run cannot go on from here, or ""."""
        config, training, guards = self.config, self.config.training, self.guards
        self.watchdog.beat(f"step {step}")
        batch = step + self.state.batch_offset
        result = train_step(
            self.engine,
            self.batches.of_step(batch),
            self.weights,
            training.seed,
            batch,
            MAX_BIN_ROWS if config.data.pairs else None,
            guards.watch,
        )
        self.metrics.count(result)
        if not self.has_begun:
            self.has_begun = True
            self.times.end("first step")
            self._log("going", f"first step after {self.times}")
        if problem := guards.problem():
            self.state.num_bad += 1
            self.metrics.num_bad = self.state.num_bad
            self._tell("skip", f"step {step} is left out: {problem}")
            if guards.has_had_enough():
                return problem
        if guards.save:
            self._tell("signal", f"SIGUSR1 asks for a checkpoint after step {step}")
        if due(step, training.log_every, training.num_steps):
            record = self.metrics.training_record(step, result)
            self.metrics.write(record)
            self.progress.update(record)
        if due(step, config.guards.replica_check_every, None):
            require_equal_replicas(self.engine.module, step, self.run_dir)
        if due(step, training.eval_every, training.num_steps):
            with self.metrics.paused_clock():
                self._evaluate(step)
            if step == training.num_steps and not math.isfinite(self.state.after["loss"]):
                return f"validation loss {self.state.after['loss']}"
        self.save_is_due |= due(step, training.save_every, training.num_steps) or guards.save
        # What the run goes back to shall lie before the bad steps.
        if guards.stop or (self.save_is_due and (not problem or step == training.num_steps)):
            with self.metrics.paused_clock():
                self._save(step)
        return ""

    def _evaluate(self, step: int) -> None:
        self.watchdog.beat(f"the evaluation after step {step}")
        self.state.after, _ = evaluation(self.engine, self.config, self.prepared, self.valid_data)
        self.metrics.write_validation(step, self.state.after)
        self.progress.note(f"step {step}: validation {validation_words(self.state.after)}")

    def _save(self, step: int) -> None:
        self.watchdog.beat(f"the checkpoint of step {step}")
        state = self.state
        state.seconds += self.metrics.lap()
        state.num_clipped = int(self.sparse_clip.num_clipped)
        state.num_targets = int(self.metrics.num_targets)
        state.recent_losses = self.guards.recent_losses
        if self.config.training.save_every != "never":
            self.saver.save(step, asdict(state))
            self.num_returns = 0
        self.save_is_due = False

    def _stop(self) -> None:
        self.saver.wait()
        kept = "saved"
        if self.config.training.save_every == "never":
            kept = 'not saved, by magnetar.training.save_every="never"'
        self._tell(
            "signal",
            f"stopped by {self.guards.stop} after step {self.engine.global_steps}, {kept}; the "
            "same command goes on",
        )

    def _go_back(self, problem: str) -> None:
        """Load the newest checkpoint again, and leave out the batches since.

        Args:
            problem: why.

        Raises:
            UserError: if there is none, or the run has gone back to it often enough.
        """
        step, limit = self.engine.global_steps, self.config.guards.max_rollbacks
        self.saver.wait()
        checkpoint = newest_whole_checkpoint(self.run_dir)
        if checkpoint is None or self.num_returns >= limit:
            self._log("divergence", f"step {step}: {problem}")
            why = "it has saved no checkpoint to go back to"
            if checkpoint is not None:
                why = (
                    f"going back to step {checkpoint.step} {limit} times did not help. What it "
                    f"saved is in {self.run_dir / 'checkpoints'}"
                )
            out = "a longer training.lr_schedule.warmup_steps"
            if self.config.guards.spike_deviations is not None:
                out += ", or more guards.spike_deviations"
            raise UserError(
                f"the run diverged: {problem} at step {step}, and {why}. Start in another "
                f"training.run_dir with a lower optimizer.params.lr or gradient_clipping, or {out}",
                on_every_rank=True,
            )
        self.num_returns += 1
        num_bad, offset = self.state.num_bad, self.state.batch_offset
        self._load(checkpoint)
        self.state.num_bad = num_bad
        self.state.batch_offset = offset + step - checkpoint.step
        self.metrics.go_back(self.state.num_targets)
        self._forget_records_after(checkpoint.step)
        purge_tensorboard(self.engine.monitor, checkpoint.step)
        self._tell(
            "rollback",
            f"back from step {step} ({problem}) to step {checkpoint.step}; the batches between "
            "are left out",
        )

    def _load(self, checkpoint: Checkpoint) -> None:
        self.state = TrainerState(**load_checkpoint(self.engine, self.config, checkpoint))
        self.sparse_clip.num_clipped = torch.full_like(
            self.sparse_clip.num_clipped, self.state.num_clipped
        )
        self.guards.start_over(self.state.recent_losses)

    def _forget_records_after(self, step: int) -> None:
        if self.is_first_rank:
            keep_records_up_to(self.run_dir / "metrics.jsonl", step)

    def _tell(self, event: str, text: str) -> None:
        """Say what has happened, and write it into the logbook."""
        self.progress.note(text)
        self._log(event, text)

    def _log(self, event: str, text: str) -> None:
        if self.is_first_rank:
            logbook.write(self.run_dir, event, text)

    def _write_config(self) -> None:
        """Keep the config, and write into the logbook what has changed since the last start."""
        file, config = self.run_dir / "config.json", self.config.to_dict()
        if file.is_file():
            there = dict(flat_keys(json.loads(file.read_text())))
            changes = differing(there, dict(flat_keys(config)))
            if changes:
                lines = [f"{key}: {old} -> {new}" for key, old, new in changes]
                logbook.write(self.run_dir, "change", "\n".join(["the JSON:", *lines]))
        write_atomically(file, json.dumps(config, indent=1) + "\n")
        if isinstance(self.prepared, PreparedPairs):  # all that translating needs but the weights
            name = self.prepared.manifest.tokenizer_file
            write_atomically(self.run_dir / name, (self.prepared.path / name).read_bytes())


def due(step: int, every: int | str | None, last: int | None) -> bool:
    """Whether something that happens every so many steps, and at the last one, happens now."""
    return step == last or (isinstance(every, int) and step % every == 0)


def purge_tensorboard(monitor: Any, step: int) -> None:
    """Have TensorBoard forget what was logged after a step: it will be logged again."""
    writer = getattr(monitor.tb_monitor, "summary_writer", None)
    if writer is not None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        writer.file_writer.add_event(start, step + 1)
