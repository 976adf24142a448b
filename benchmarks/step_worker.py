"""One contender of the step benchmark in a process of its own, which obeys the benchmark.

    python -m benchmarks.step_worker JOB

JOB is the JSON of a Job. It reports in lines of JSON: once when it is ready, then once for each
line that it reads; a report with "status" is its last.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.layers import NotInstalled
from benchmarks.measurement import NO_RUN, failure
from benchmarks.step_contenders import CONTENDERS, Trainee, checked
from magnetar.data.loader import open_data
from magnetar.engine.build import start_distributed
from magnetar.engine.config.schema import RunConfig
from magnetar.engine.prepare_run import data_options
from magnetar.engine.train_step import MicroBatch, training_batches

WARM_UP = 2  # steps: the first ones compile, allocate and make the optimizer's states
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Job:
    """The task of a process.

    Attributes:
        name: name of a contender.
        values: the sparse run's config, as RunConfig.to_dict returns it.
        uses_data: whether the config's data is read; tokens are random otherwise.
        num_steps: number of steps that are timed together at each call.
        num_clip_steps: number of further steps with DeepSpeed's own clipping instead of SparseClip.
    """

    name: str
    values: dict[str, Any]
    uses_data: bool
    num_steps: int
    num_clip_steps: int

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


def random_batch(config: RunConfig, number: int, device: torch.device) -> Iterator[MicroBatch]:
    """The micro-batches of a step: every token as likely as any other."""
    sizes = config.deepspeed
    generator = torch.Generator(device).manual_seed(number)
    shape = (sizes["train_micro_batch_size_per_gpu"], config.data.seq_len + 1)
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    for _ in range(sizes["gradient_accumulation_steps"]):
        tokens = torch.randint(vocab_size, shape, generator=generator, device=device)
        yield (tokens[:, :-1],), tokens[:, 1:]


def read_batches(
    config: RunConfig, uses_data: bool, device: torch.device
) -> Callable[[int], list[MicroBatch]]:
    """The micro-batches of a step (from 1)."""
    if not uses_data:
        return lambda number: list(random_batch(config, number, device))
    data = open_data(Path(config.data.path), data_options(config))
    return training_batches(data, config.deepspeed["gradient_accumulation_steps"], device).of_step


class Runner:
    """A contender that trains, step after step."""

    def __init__(self, job: Job) -> None:
        """Build it; NotInstalled where a package is not there."""
        # The run's own folder may hold a checkpoint, which the engine would start from.
        job.values["magnetar"]["training"]["run_dir"] = NO_RUN
        config = checked(job.values)
        self.device = start_distributed()
        torch.manual_seed(config.training.seed)
        self.trainee: Trainee = CONTENDERS[job.name].build(config, self.device)
        self.batch = read_batches(config, job.uses_data, self.device)
        self.number = 0
        self.job = job
        if self.trainee.clip is not None:
            self.trainee.clip.use(sparse_clip=True)

    def step(self) -> torch.Tensor:
        """The next step, its data included -> its loss, which may not be there yet."""
        self.number += 1
        return self.trainee.step(self.batch(self.number), self.number)

    def finish(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def warm_up(self) -> dict[str, Any]:
        """The first steps, and what is known by then.

        Raises:
            RuntimeError: if the loss is no number.
        """
        losses = [float(self.step()) for _ in range(WARM_UP)]
        if not torch.tensor(losses).isfinite().all():
            raise RuntimeError(f"the loss is {losses[-1]}")
        self._clip_milliseconds()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return {
            "num_parameters": self.trainee.num_parameters,
            "flops_per_token": self.trainee.flops_per_token,
            "note": self.trainee.note,
            "hardware": {"cpu_threads": torch.get_num_threads()},
        }

    def measure(self) -> dict[str, Any]:
        """Milliseconds of a step, of this process's cores and of clipping; bytes at the peak."""
        cpu_seconds = time.process_time()
        found = {"step_ms": self._timed(self.job.num_steps), "peak_bytes": self._peak_bytes()}
        found["cpu_ms"] = 1000 * (time.process_time() - cpu_seconds) / self.job.num_steps
        clip = self.trainee.clip
        if clip is not None:
            found["clip_ms"] = self._clip_milliseconds() / self.job.num_steps
            if self.job.num_clip_steps:
                clip.use(sparse_clip=False)
                self._timed(self.job.num_clip_steps)
                own = self._clip_milliseconds() / self.job.num_clip_steps
                found["deepspeed_clip_ms"] = own
                clip.use(sparse_clip=True)
        return found

    def _timed(self, num_steps: int) -> float:
        self.finish()
        start = time.perf_counter()
        for _ in range(num_steps):
            self.step()
        self.finish()
        return 1000 * (time.perf_counter() - start) / num_steps

    def _clip_milliseconds(self) -> float:
        if self.trainee.clip is None:
            return 0.0
        self.finish()
        return self.trainee.clip.take_milliseconds()

    def _peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def status_of(stage: str, error: Exception) -> str:
    """The error and its stage, for a table."""
    if isinstance(error, NotInstalled):
        return "not installed"
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    return failure(stage, error)


def obey(job: Job, report: Callable[[dict[str, Any]], None]) -> None:
    """Build, and measure once for each line of the standard input."""
    stage = "build"
    try:
        runner = Runner(job)
        stage = "first steps"
        report(runner.warm_up())
        for round_number, _ in enumerate(sys.stdin, start=1):
            stage = f"round {round_number}"
            report(runner.measure())
    except Exception as error:  # whatever a peer does must not stop the others
        report({"status": status_of(stage, error)})


def main() -> None:
    """Obey, with nothing but reports on the standard output."""
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print

    def report(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=reports, flush=True)

    obey(Job(**json.loads(sys.argv[1])), report)
    reports.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without destructors: an open process group would print warnings


if __name__ == "__main__":
    main()
