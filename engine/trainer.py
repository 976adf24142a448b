"""Training a model from a config: the loop, and around it the start, rollbacks and the end."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import deepspeed.comm as dist
import torch

from magnetar.data.atomic import write_atomically
from magnetar.data.errors import UserError, read_json_object
from magnetar.data.loader import RunData
from magnetar.engine.build import build_engine, early_end, start_distributed
from magnetar.engine.checkpoint.exported_run import TrainerEntry
from magnetar.engine.checkpoint.format import Checkpoint
from magnetar.engine.checkpoint.run_folder import claim_run_folder, differing
from magnetar.engine.checkpoint.save_load import Saver, load_checkpoint, newest_whole_checkpoint
from magnetar.engine.cluster import logbook
from magnetar.engine.cluster.environment import launched_rank
from magnetar.engine.cluster.signals import Requests
from magnetar.engine.cluster.start_times import StartTimes
from magnetar.engine.cluster.watchdog import Watchdog
from magnetar.engine.config.batch_sizes import ACCUMULATION, TRAIN
from magnetar.engine.config.schema import RunConfig
from magnetar.engine.evaluate import Evaluations
from magnetar.engine.guards import Guards, Verdict, require_equal_replicas
from magnetar.engine.metrics import Metrics
from magnetar.engine.report.progress import ProgressLine, RunLog
from magnetar.engine.report.samples import (
    RunTotals,
    describe,
    finish,
    validation_words,
)
from magnetar.engine.train_step import StepResult, loss_weights, train_step, training_batches


def train(config: RunConfig, data: RunData, times: StartTimes | None = None) -> None:
    """Train to the end with the config and data of `prepare_run`, from the newest checkpoint.

    A signal may ask the run to stop earlier, see engine.cluster.signals. `times` are those of the
    start so far.

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
        run = Run(config, data, device, watchdog, requests, times)
        if train_to_the_end(run):
            run.finish()
        run.engine.destroy()
    if lock is not None:
        lock.close()


def train_to_the_end(run: "Run") -> bool:
    """The loop over the steps; False if a signal has stopped it before the last one."""
    engine, guards, training = run.engine, run.guards, run.training
    run.evaluate_initial()
    with run.log.progress, run.saver:
        for step in run.steps():
            batch = step + guards.batch_offset  # skips what rollbacks have left out
            result = train_step(
                engine,
                run.batches.of_step(batch),
                run.weights,
                training.seed,
                batch,
                run.data.max_rows,
                guards.watch,  # before the update, so that a bad step changes nothing
            )
            verdict = guards.judge()
            run.note_step(step, result, verdict)
            if verdict is Verdict.ROLL_BACK:
                run.roll_back(step, guards.problem())
                continue
            if due(step, training.log_every, training.num_steps):
                run.record(step, result)
            if due(step, guards.config.replica_check_every):
                require_equal_replicas(engine.module, step, run.run_dir)
            if due(step, training.eval_every, training.num_steps):
                run.evaluate(step)
            if problem := run.final_problem(step):  # the last weights must be of use
                run.roll_back(step, problem)
                continue
            if run.is_to_save(step, verdict):
                run.save(step)
            if verdict is Verdict.STOP:
                run.stop(step)
                return False
    return True


class Run:
    """The components of one run in this process; each owns its state.

    Attributes:
        weights: weights of the losses.
        batches: this rank's micro-batches.
        log: the terminal and the logbook.
        save_is_pending: True if a checkpoint is due and waits for a good step.
        num_rollbacks: rollbacks since the last save.
        times: times of the start; None after the first step.
    """

    def __init__(
        self,
        config: RunConfig,
        data: RunData,
        device: torch.device,
        watchdog: Watchdog,
        requests: Requests,
        times: StartTimes,
    ) -> None:
        """Make the components, and load the newest checkpoint if there is one.

        The order matters: what is shown and written first depends on the checkpoint's step.
        """
        self.config, self.training, self.data = config, config.training, data
        self.run_dir, self.watchdog = Path(config.training.run_dir), watchdog
        self.times: StartTimes | None = times
        self.saves = self.training.save_every != "never"
        self.save_is_pending, self.num_rollbacks = False, 0
        self.is_first_rank = dist.get_rank() == 0
        self.batches = training_batches(data, config.deepspeed[ACCUMULATION], device)
        self.engine, self.sparse_clip = build_engine(config, device)
        times.end("build")
        self.guards = Guards(self.engine, self.sparse_clip, config.guards, requests)
        if self.is_first_rank:  # not earlier, since a start that fails must not claim the folder
            write_config(config, data)
        self.weights = loss_weights(config.model.moe, self.training)
        self.metrics = Metrics(
            self.engine,
            self.sparse_clip,
            self.run_dir / "metrics.jsonl",
            config.model,
            config.data.seq_len,
            data.tokens_per_step,
            self.weights,
        )
        self.evaluations = Evaluations(self.engine, data, self.training.eval_translations)
        checkpoint = newest_whole_checkpoint(self.run_dir)
        first_step = checkpoint.step if checkpoint else 0
        progress = ProgressLine(first_step, self.training.num_steps, self.is_first_rank)
        self.log = RunLog(self.run_dir, progress)
        if checkpoint is None:
            self.forget_after(-1)
        else:
            self.load(checkpoint)
        times.end("load")
        self.saver = Saver(self.engine, config, data)
        layout = f"{config.layout(dist.get_world_size()).in_words()}, {config.dtype}"
        batch_size = config.deepspeed[TRAIN]
        about = describe(config.model, layout, data, self.training, batch_size, first_step)
        self.log.tell("resume" if first_step else "start", about)
        if words := early_end(self.training.lr_schedule, self.training.num_steps):
            self.log.tell("schedule", words)

    def steps(self) -> Iterator[int]:
        """The steps to do, from 1; a rollback goes on behind its checkpoint."""
        while self.engine.global_steps < self.training.num_steps:
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
        loss = self.evaluations.after["loss"] if step == self.training.num_steps else 0.0
        return "" if math.isfinite(loss) else f"validation loss {loss}"

    def is_to_save(self, step: int, verdict: Verdict) -> bool:
        """Whether to save after a step."""
        num_steps = self.training.num_steps
        self.save_is_pending |= self.guards.save or due(step, self.training.save_every, num_steps)
        # A rollback must not end among the bad steps, so they wait.
        is_good = verdict is Verdict.GO or step == num_steps
        return verdict is Verdict.STOP or (self.save_is_pending and is_good)

    def save(self, step: int) -> None:
        """Begin to write a checkpoint of the state after a step."""
        with self.metrics.paused_clock():
            self.watchdog.beat(f"the checkpoint of step {step}")
            self.metrics.end_lap()
            if self.saves:
                self.saver.save(step, self.state().model_dump())
                self.num_rollbacks = 0
        self.save_is_pending = False

    def state(self) -> TrainerEntry:
        """The states of the components, for a checkpoint."""
        metrics, guards, evaluations = self.metrics, self.guards, self.evaluations
        return TrainerEntry(
            seconds=metrics.seconds,
            num_clipped=int(self.sparse_clip.num_clipped),
            num_targets=int(metrics.num_targets),
            num_bad=guards.num_bad,
            batch_offset=guards.batch_offset,
            recent_losses=guards.recent_losses,
            before=evaluations.before,
            after=evaluations.after,
            examples=[list(example) for example in evaluations.examples],
        )

    def load(self, checkpoint: Checkpoint) -> None:
        """Give the engine and the components the states of a checkpoint."""
        state = TrainerEntry(**load_checkpoint(self.engine, self.config, checkpoint))
        clip, evaluations = self.sparse_clip, self.evaluations
        clip.num_clipped = torch.full_like(clip.num_clipped, state.num_clipped)
        self.guards.start_from(state.num_bad, state.batch_offset, state.recent_losses)
        evaluations.before, evaluations.after = state.before, state.after
        evaluations.examples = [(d, s, r, t) for d, s, r, t in state.examples]
        self.metrics.start_from(state.num_targets, state.seconds)
        self.forget_after(checkpoint.step)

    def forget_after(self, step: int) -> None:
        """Remove what was recorded after a step, and tell what in metrics.jsonl is no record."""
        if words := self.metrics.forget_after(step):
            self.log.tell("metrics", words)

    def roll_back(self, step: int, problem: str) -> None:
        """Load the newest checkpoint again, since the run cannot go on after a step.

        The batches since the checkpoint are left out.

        Raises:
            UserError: there is no checkpoint, or the run has rolled back to it often enough.
        """
        self.saver.wait()
        checkpoint, guards = newest_whole_checkpoint(self.run_dir), self.guards
        if checkpoint is None:
            raise self.divergence(step, problem, "it has saved no checkpoint to go back to")
        if self.num_rollbacks >= guards.config.max_rollbacks:
            why = f"going back to step {checkpoint.step} {self.num_rollbacks} times did not help"
            why += f". What it saved is in {self.run_dir / 'checkpoints'}"
            raise self.divergence(step, problem, why)
        self.num_rollbacks += 1
        num_bad, batch_offset = guards.num_bad, guards.batch_offset + step - checkpoint.step
        self.load(checkpoint)
        guards.num_bad, guards.batch_offset = num_bad, batch_offset
        self.log.tell(
            "rollback",
            f"back from step {step} ({problem}) to step {checkpoint.step}; the batches between "
            "are left out",
        )

    def divergence(self, step: int, problem: str, why: str) -> UserError:
        """The error that ends a run which cannot go on after a step; `why` ends its sentence."""
        self.log.write("divergence", f"step {step}: {problem}")
        out = "a longer training.lr_schedule.warmup_steps"
        if self.guards.config.spike_deviations is not None:
            out += ", or more guards.spike_deviations"
        return UserError(
            f"the run diverged: {problem} at step {step}, and {why}. Start in another "
            f"training.run_dir with a lower optimizer.params.lr or gradient_clipping, or {out}",
            on_every_rank=True,
        )

    def stop(self, step: int) -> None:
        """Wait for the last checkpoint, and tell that a signal has stopped the run."""
        self.saver.wait()
        kept = "saved" if self.saves else 'not saved, by magnetar.training.save_every="never"'
        self.log.tell(
            "signal",
            f"stopped by {self.guards.stop} after step {step}, {kept}; the same command goes on",
        )

    def finish(self) -> None:
        """Write summary.json, and print the closing table."""
        self.watchdog.beat("the last evaluation")
        values = self.evaluations.after or self.evaluations.evaluate()
        steps, metrics = self.engine.global_steps, self.metrics
        num_clipped = int(self.sparse_clip.num_clipped)
        finish(
            self.evaluations,
            self.config.model,
            self.training,
            RunTotals(steps, metrics.num_tokens(steps), metrics.seconds, num_clipped),
            has_tensorboard=self.config.deepspeed.get("tensorboard", {}).get("enabled", False),
            progress=self.log.progress,
        )
        self.log.write("end", f"{steps} steps: {validation_words(values)}")


def write_config(config: RunConfig, data: RunData) -> None:
    """Keep the config, and write into the logbook what has changed since the last start.

    For pairs the vocabulary is kept as well, so that translating needs the run's folder only.
    """
    run_dir, now = Path(config.training.run_dir), config.to_dict()
    file = run_dir / "config.json"
    if file.is_file():
        changes = differing(read_json_object(file), now)
        if changes:
            lines = [f"{key}: {old} -> {new}" for key, old, new in changes]
            logbook.write(run_dir, "change", "\n".join(["the JSON:", *lines]))
    write_atomically(file, json.dumps(now, indent=1) + "\n")
    for name in data.run_files:
        write_atomically(run_dir / name, (data.path / name).read_bytes())


def due(step: int, every: int | str | None, last: int | None = None) -> bool:
    """Whether something is due that happens every `every` steps, and after the last one."""
    return step == last or (isinstance(every, int) and step % every == 0)
