"""Training a model from a config: the loop, and around it the start, rollbacks and the end."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import deepspeed.comm as dist
import torch

from magnetar.data.atomic import write_atomically
from magnetar.data.errors import UserError
from magnetar.data.loader import RunData, TrainingBatches
from magnetar.engine.build import build_engine, start_distributed
from magnetar.engine.checkpoint.format import Checkpoint
from magnetar.engine.checkpoint.run_folder import (
    claim_run_folder,
    differing,
    flat_keys,
)
from magnetar.engine.checkpoint.save_load import Saver, load_checkpoint, newest_whole_checkpoint
from magnetar.engine.cluster import logbook
from magnetar.engine.cluster.environment import launched_rank
from magnetar.engine.cluster.signals import Requests
from magnetar.engine.cluster.start_times import StartTimes
from magnetar.engine.cluster.watchdog import Watchdog
from magnetar.engine.config.batch_sizes import ACCUMULATION, TRAIN
from magnetar.engine.config.schema import RunConfig, TrainingConfig
from magnetar.engine.deepspeed_engine import DeepSpeedEngine
from magnetar.engine.evaluate import Evaluations
from magnetar.engine.guards import Guards, Verdict, require_equal_replicas
from magnetar.engine.metrics import Metrics, keep_records_up_to, purge_tensorboard
from magnetar.engine.report.progress import ProgressLine, RunLog
from magnetar.engine.report.samples import (
    RunTotals,
    describe,
    finish,
    layout_words,
    validation_words,
)
from magnetar.engine.sparse_clip import SparseClip
from magnetar.engine.train_step import (
    LossWeights,
    StepResult,
    loss_weights,
    train_step,
    training_batches,
)


def train(config: RunConfig, data: RunData, times: StartTimes | None = None) -> None:
    """Train to the end, resuming from the run's newest checkpoint.

    A signal may ask the run to stop earlier, see engine.cluster.signals.

    Args:
        config: the config of `prepare_run`.
        data: the data of `prepare_run`.
        times: times of the start so far; None if it begins here.

    Raises:
        UserError: the loss is not finite and rolling back does not help, or a checkpoint cannot
            be written or read.
        MachineError: ranks that should hold the same weights do not.
    """
    run_dir = Path(config.training.run_dir)
    # Before the ranks join, since the others would report the loss of a refused first rank.
    lock = claim_run_folder(run_dir) if launched_rank() == 0 else None
    times = times or StartTimes()
    device = start_distributed()
    times.end("join")
    with Watchdog(run_dir, config.guards.hang_timeout_seconds) as watchdog, Requests() as requests:
        run = start_run(config, data, device, watchdog, requests, times)
        if train_to_the_end(run):
            run.finish()
        run.engine.destroy()
    if lock is not None:
        lock.close()


def train_to_the_end(run: "Run") -> bool:
    """The loop over the steps.

    Returns:
        True if the last step was reached, False if a signal has stopped the run.
    """
    engine, data, guards, training = run.engine, run.data, run.guards, run.config.training
    num_steps = training.num_steps
    run.evaluate_initial()
    with run.log.progress, run.checkpoints.saver:
        for step in run.steps():
            batch = step + guards.batch_offset  # skips what rollbacks have left out
            result = train_step(
                engine,
                run.batches.of_step(batch),
                run.weights,
                training.seed,
                batch,
                data.max_rows,
                guards.watch,  # before the update, so that a bad step changes nothing
            )
            verdict = guards.judge()
            run.note_step(step, result, verdict)
            if verdict is Verdict.ROLL_BACK:
                run.roll_back(step, guards.problem())
                continue
            if due(step, training.log_every, num_steps):
                run.record(step, result)
            if due(step, guards.config.replica_check_every):
                require_equal_replicas(engine.module, step, run.run_dir)
            if due(step, training.eval_every, num_steps):
                run.evaluate(step)
            if problem := run.final_problem(step):  # the last weights must be of use
                run.roll_back(step, problem)
                continue
            if run.checkpoints.are_due(step, verdict, asked=guards.save):
                run.save(step)
            if verdict is Verdict.STOP:
                run.stop(step)
                return False
    return True


class Checkpoints:
    """When a run saves, and what it rolls back to.

    Attributes:
        saver: the writer.
        are_kept: False if training.save_every is "never".
        is_pending: True if a checkpoint is due and waits for a good step.
        num_rollbacks: rollbacks since the last save.
    """

    def __init__(self, saver: Saver, training: TrainingConfig, max_rollbacks: int) -> None:
        self.saver, self.training, self.max_rollbacks = saver, training, max_rollbacks
        self.are_kept = training.save_every != "never"
        self.is_pending, self.num_rollbacks = False, 0

    def are_due(self, step: int, verdict: Verdict, asked: bool) -> bool:
        """Whether to save after a step; `asked` is True if a signal asks for it."""
        training = self.training
        self.is_pending |= asked or due(step, training.save_every, training.num_steps)
        # A rollback must not end among the bad steps, so they wait.
        is_good = verdict is Verdict.GO or step == training.num_steps
        return verdict is Verdict.STOP or (self.is_pending and is_good)

    def save(self, step: int, state: "TrainerState") -> None:
        """Begin to write a checkpoint."""
        if self.are_kept:
            self.saver.save(step, asdict(state))
            self.num_rollbacks = 0
        self.is_pending = False

    def to_roll_back_to(self) -> tuple[Checkpoint | None, str]:
        """The newest checkpoint, and why the run cannot go on from it, or ""."""
        self.saver.wait()
        run_dir = Path(self.training.run_dir)
        checkpoint = newest_whole_checkpoint(run_dir)
        if checkpoint is None:
            return None, "it has saved no checkpoint to go back to"
        if self.num_rollbacks >= self.max_rollbacks:
            return checkpoint, (
                f"going back to step {checkpoint.step} {self.max_rollbacks} times did not help. "
                f"What it saved is in {run_dir / 'checkpoints'}"
            )
        self.num_rollbacks += 1
        return checkpoint, ""


@dataclass
class TrainerState:
    """The part of a checkpoint beside DeepSpeed's own state: the states of a run's components.

    The position in the data, the learning rate and the noise are functions of the step and of
    `batch_offset`, so they have no entry here.

    Attributes:
        seconds: training time over all starts, without evaluations and saves.
        num_clipped: steps that SparseClip clipped.
        num_targets: tokens that were asked about.
        num_bad: steps that the guards left out.
        batch_offset: batches that rollbacks left out.
        recent_losses: losses with which the guards compare the next one.
        before: validation of the initial weights.
        after: the last validation.
        examples: a few translations by the initial weights.
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


@dataclass
class Run:
    """The components of one run in this process; each owns its state.

    Attributes:
        config: the resolved config, for checkpoints and the closing table.
        run_dir: the run's folder.
        weights: weights of the losses.
        data: the data.
        batches: this rank's micro-batches.
        engine: the DeepSpeed engine.
        sparse_clip: its clipping.
        guards: the judge of its steps.
        metrics: its records.
        evaluations: its evaluations.
        checkpoints: its checkpoints.
        log: the terminal and the logbook.
        watchdog: the thread that finds a rank that hangs.
        times: times of the start; None after the first step.
    """

    config: RunConfig
    run_dir: Path
    weights: LossWeights
    data: RunData
    batches: TrainingBatches
    engine: DeepSpeedEngine
    sparse_clip: SparseClip
    guards: Guards
    metrics: Metrics
    evaluations: Evaluations
    checkpoints: Checkpoints
    log: RunLog
    watchdog: Watchdog
    times: StartTimes | None

    def steps(self) -> Iterator[int]:
        """The steps to do, from 1; a rollback goes on behind its checkpoint."""
        while self.engine.global_steps < self.config.training.num_steps:
            step = self.engine.global_steps + 1
            self.watchdog.beat(f"step {step}")
            yield step

    def evaluate_initial(self) -> None:
        """Evaluate the initial weights, unless an earlier start has, and start the clock."""
        if not self.evaluations.before:
            self.watchdog.beat("the first evaluation")
            self.metrics.write_validation(0, self.evaluations.evaluate_initial())
            if self.times is not None:
                self.times.end("evaluation")
        self.metrics.restart_clock()

    def note_step(self, step: int, result: StepResult, verdict: Verdict) -> None:
        """Count a step, and tell what is special about it."""
        self.metrics.count(result)
        if self.times is not None:
            self.times.end("first step")
            self.log.write("going", f"first step after {self.times}")
            self.times = None
        if problem := self.guards.problem():
            self.log.tell("skip", f"step {step} is left out: {problem}")
        if self.guards.save and verdict is not Verdict.ROLL_BACK:
            self.log.tell("signal", f"SIGUSR1 asks for a checkpoint after step {step}")

    def record(self, step: int, result: StepResult) -> None:
        """Write and show the record of a step."""
        record = self.metrics.training_record(step, result, self.guards.num_bad)
        self.metrics.write(record)
        self.log.progress.update(record)

    def evaluate(self, step: int) -> None:
        """Evaluate the weights after a step."""
        with self.metrics.paused_clock():
            self.watchdog.beat(f"the evaluation after step {step}")
            values = self.evaluations.evaluate()
            self.metrics.write_validation(step, values)
            self.log.progress.note(f"step {step}: validation {validation_words(values)}")

    def final_problem(self, step: int) -> str:
        """Why the last step's weights are no result, or ""."""
        loss = self.evaluations.after["loss"] if step == self.config.training.num_steps else 0.0
        return "" if math.isfinite(loss) else f"validation loss {loss}"

    def save(self, step: int) -> None:
        """Save the state after a step."""
        with self.metrics.paused_clock():
            self.watchdog.beat(f"the checkpoint of step {step}")
            self.metrics.end_lap()
            self.checkpoints.save(step, self.state())

    def state(self) -> TrainerState:
        """The states of the components, for a checkpoint."""
        metrics, guards, evaluations = self.metrics, self.guards, self.evaluations
        return TrainerState(
            seconds=metrics.seconds,
            num_clipped=int(self.sparse_clip.num_clipped),
            num_targets=int(metrics.num_targets),
            num_bad=guards.num_bad,
            batch_offset=guards.batch_offset,
            recent_losses=guards.recent_losses,
            before=evaluations.before,
            after=evaluations.after,
            examples=evaluations.examples,
        )

    def restore(self, state: TrainerState) -> None:
        """Give the components the states of a checkpoint."""
        clip, guards, evaluations = self.sparse_clip, self.guards, self.evaluations
        clip.num_clipped = torch.full_like(clip.num_clipped, state.num_clipped)
        guards.start_from(state.num_bad, state.batch_offset, state.recent_losses)
        evaluations.before, evaluations.after = state.before, state.after
        evaluations.examples = state.examples
        self.metrics.start_from(state.num_targets, state.seconds)

    def roll_back(self, step: int, problem: str) -> None:
        """Load the newest checkpoint again, and leave out the batches since.

        Args:
            step: number of the step after which the run cannot go on.
            problem: reason of the rollback, in words.

        Raises:
            UserError: there is no checkpoint, or the run has rolled back to it often enough.
        """
        checkpoint, why = self.checkpoints.to_roll_back_to()
        if checkpoint is None or why:
            self.log.write("divergence", f"step {step}: {problem}")
            out = "a longer training.lr_schedule.warmup_steps"
            if self.guards.config.spike_deviations is not None:
                out += ", or more guards.spike_deviations"
            raise UserError(
                f"the run diverged: {problem} at step {step}, and {why}. Start in another "
                f"training.run_dir with a lower optimizer.params.lr or gradient_clipping, or {out}",
                on_every_rank=True,
            )
        state = load_state(self.engine, self.config, checkpoint)
        batch_offset = self.guards.batch_offset + step - checkpoint.step
        self.restore(replace(state, num_bad=self.guards.num_bad, batch_offset=batch_offset))
        self.log.tell(
            "rollback",
            f"back from step {step} ({problem}) to step {checkpoint.step}; the batches between "
            "are left out",
        )

    def stop(self, step: int) -> None:
        """Wait for the last checkpoint, and tell that a signal has stopped the run."""
        self.checkpoints.saver.wait()
        kept = "saved"
        if not self.checkpoints.are_kept:
            kept = 'not saved, by magnetar.training.save_every="never"'
        self.log.tell(
            "signal",
            f"stopped by {self.guards.stop} after step {step}, {kept}; the same command goes on",
        )

    def finish(self) -> None:
        """Write summary.json, and print the closing table."""
        self.watchdog.beat("the last evaluation")
        values = self.evaluations.after or self.evaluations.evaluate()
        steps = self.engine.global_steps
        totals = RunTotals(
            steps=steps,
            tokens=self.metrics.num_tokens(steps),
            seconds=self.metrics.seconds,
            num_clipped=int(self.sparse_clip.num_clipped),
        )
        finish(
            self.evaluations,
            self.config.model,
            self.config.training,
            totals,
            has_tensorboard=self.config.deepspeed.get("tensorboard", {}).get("enabled", False),
            progress=self.log.progress,
        )
        self.log.write("end", f"{steps} steps: {validation_words(values)}")


def start_run(
    config: RunConfig,
    data: RunData,
    device: torch.device,
    watchdog: Watchdog,
    requests: Requests,
    times: StartTimes,
) -> Run:
    """The components of a run, with the newest checkpoint loaded if there is one.

    The order matters: the checkpoint is loaded into the engine, and what is shown and written
    first depends on its step.

    Args:
        config: the resolved config.
        data: the run's data.
        device: this rank's device.
        watchdog: the thread that finds a rank that hangs.
        requests: signals that the run has received.
        times: times of the start so far.
    """
    run_dir, training = Path(config.training.run_dir), config.training
    batches = training_batches(data, config.deepspeed[ACCUMULATION], device)
    engine, sparse_clip = build_engine(config, device)
    times.end("build")
    guards = Guards(engine, sparse_clip, config.guards, requests)
    if dist.get_rank() == 0:  # not earlier, since a start that fails must not claim the folder
        write_config(config, data)
    state, checkpoint = TrainerState(), newest_whole_checkpoint(run_dir)
    if checkpoint is None:
        forget_records_after(run_dir, -1)
    else:
        state = load_state(engine, config, checkpoint)
    times.end("load")
    first_step = engine.global_steps
    weights = loss_weights(config.model.moe, training)
    metrics = Metrics(
        engine,
        sparse_clip,
        run_dir / "metrics.jsonl",
        config.model,
        config.data.seq_len,
        data.tokens_per_step,
        weights,
    )
    progress = ProgressLine(first_step, training.num_steps, shown=dist.get_rank() == 0)
    saver = Saver(engine, config, data)
    run = Run(
        config=config,
        run_dir=run_dir,
        data=data,
        batches=batches,
        weights=weights,
        engine=engine,
        sparse_clip=sparse_clip,
        guards=guards,
        metrics=metrics,
        evaluations=Evaluations(engine, data, training.eval_translations),
        checkpoints=Checkpoints(saver, training, config.guards.max_rollbacks),
        log=RunLog(run_dir, progress),
        watchdog=watchdog,
        times=times,
    )
    run.restore(state)
    layout = layout_words(
        dist.get_world_size(),
        config.model.moe.ep_size if config.model.moe else 1,
        config.zero_stage,
        config.dtype,
    )
    train_batch_size = config.deepspeed[TRAIN]
    about = describe(config.model, layout, data, training, train_batch_size, first_step)
    run.log.tell("resume" if first_step else "start", about)
    return run


def load_state(engine: DeepSpeedEngine, config: RunConfig, checkpoint: Checkpoint) -> TrainerState:
    """Load a checkpoint into the engine, and forget what was recorded after it."""
    state = TrainerState(**load_checkpoint(engine, config, checkpoint))
    forget_records_after(Path(config.training.run_dir), checkpoint.step)
    purge_tensorboard(engine.monitor, checkpoint.step)
    return state


def forget_records_after(run_dir: Path, step: int) -> None:
    """Remove the records after a step, which a resumed run writes again; only rank 0 does it."""
    if dist.get_rank() == 0:
        keep_records_up_to(run_dir / "metrics.jsonl", step)


def write_config(config: RunConfig, data: RunData) -> None:
    """Keep the config, and write into the logbook what has changed since the last start.

    For pairs the vocabulary is kept as well, so that translating needs the run's folder only.
    """
    run_dir, now = Path(config.training.run_dir), config.to_dict()
    file = run_dir / "config.json"
    if file.is_file():
        there = dict(flat_keys(json.loads(file.read_text())))
        changes = differing(there, dict(flat_keys(now)))
        if changes:
            lines = [f"{key}: {old} -> {new}" for key, old, new in changes]
            logbook.write(run_dir, "change", "\n".join(["the JSON:", *lines]))
    write_atomically(file, json.dumps(now, indent=1) + "\n")
    for name in data.run_files:
        write_atomically(run_dir / name, (data.path / name).read_bytes())


def due(step: int, every: int | str | None, last: int | None = None) -> bool:
    """Whether something is due that happens every `every` steps, and after the last one."""
    return step == last or (isinstance(every, int) and step % every == 0)
