"""A whole training step: ours, the dense model of equal useful FLOPs, the public peers.

    python -m benchmarks.train_step --out benchmarks/results/train_step.json
    python -m benchmarks.train_step --only dense_compiled,ours --experts 32 --batch 512
    python -m benchmarks.train_step --profile ours --experts 32 --batch 128
    python -m benchmarks.train_step --draw benchmarks/results/train_step.json

Every contender trains in a process of its own, on one device. Processes take turns: in every round
each is started, warmed up, timed over several steps and ended; on a CPU (or with --together) all
are started first and stay. A step is everything between two updates of the weights: data, forward
and backward of every micro-batch, clipping and update. Tokens are random, or real text with --data.
What runs out of memory is tried again with half the micro-batch.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.chart import draw_step, step_table, summarised
from benchmarks.layer_profile import profile_table
from benchmarks.measurement import (
    argument_parser,
    chosen_names,
    counts,
    draw_beside,
    fill_in,
    git_commit,
    hardware,
    positive,
    read_results,
    require_json,
    versions,
    write_json,
)
from benchmarks.step_contenders import CONTENDERS, sparse_config
from benchmarks.step_worker import OUT_OF_MEMORY, Job, Runner
from magnetar.data.errors import UserError
from magnetar.data.text.token_files import open_prepared
from magnetar.engine.config.schema import RunConfig, load_config
from magnetar.engine.prepare_run import fitting_vocab_size
from magnetar.launchers.terminal.user_errors import user_errors

RANDOM_VOCAB_SIZE = 2000  # where the config leaves it to the data, and there is none
# What a GPU is asked to do: the paper's model. A CPU: that of `make train`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "config": Path("ds_configs/lm_xmoe.json"),
        "experts": [32],
        "micro_batch": 256,
        "rounds": 3,
        "steps": 3,
    },
    "cpu": {
        "config": Path("ds_configs/quickstart.json"),
        "experts": [8],
        "micro_batch": None,
        "rounds": 15,  # many and short: other processes on the same cores then disturb all alike
        "steps": 2,
    },
}
ZERO_STAGE = "zero_optimization.stage"  # 1: the 2 of lm_xmoe.json is for several cards


class Stopped(Exception):
    """A contender's process is over; its words say why."""


class Worker:
    """A contender's process."""

    def __init__(self, job: Job) -> None:
        """Start it."""
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.step_worker", job.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ if torch.cuda.is_available() else os.environ | {"DS_ACCELERATOR": "cpu"},
        )

    def report(self) -> dict[str, Any]:
        """Its next report; Stopped if that is its last."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            lines = [line.strip() for line in self.log if line.strip()]
            code = self.process.wait()
            raise Stopped(f"failed: exit status {code}: {lines[-1] if lines else ''}"[:300])
        found: dict[str, Any] = json.loads(line)
        if "status" in found:
            raise Stopped(found["status"])
        return found

    def measure(self) -> dict[str, Any]:
        """Have it train some steps."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # its report says why
            print("measure", file=self.process.stdin, flush=True)
        return self.report()

    def end(self) -> None:
        """Have it stop, and wait for that."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


class Contest:
    """The records of the contenders at one number of experts, as they become known."""

    def __init__(self, options: argparse.Namespace, names: list[str], config: RunConfig) -> None:
        """Start without measurements."""
        self.options, self.config = options, config
        sizes = config.deepspeed
        moe = config.model.moe
        assert moe is not None
        self.experts = moe.expert_counts[0]
        self.micro_batches = dict.fromkeys(names, sizes["train_micro_batch_size_per_gpu"])
        self.records: dict[str, dict[str, Any]] = {
            name: {"name": name, "experts": self.experts, "status": "measured", "rounds": []}
            for name in names
        }

    def run(self) -> Iterator[None]:
        """Measure in turn; after each turn the records hold what is known."""
        names = list(self.records)
        with ExitStack() as stack:
            kept = {}
            if self.options.together:
                for name in names:
                    kept[name] = stack.enter_context(self.worker(name))
            for number in range(self.options.rounds):
                shift = number % len(names)
                for name in names[shift:] + names[:shift]:
                    self.turn(name, kept.get(name))
                    yield

    def turn(self, name: str, kept: "Worker | None") -> None:
        """One round of one contender."""
        record = self.records[name]
        if record["status"] != "measured":
            return
        if not self.options.together:
            with self.worker(name) as worker:
                self.measure(record, worker)
        elif kept is not None:
            self.measure(record, kept)

    def measure(self, record: dict[str, Any], worker: "Worker | None") -> None:
        """Add a round to a record, or what ended it."""
        if worker is None:
            return
        try:
            record["rounds"].append(worker.measure())
        except Stopped as stopped:
            record["status"] = str(stopped)
        say(f"  {record['name']}: {record['status']}")

    @contextmanager
    def worker(self, name: str) -> Iterator["Worker | None"]:
        """A process that is ready, with as large a micro-batch as it bears; None if none is."""
        record = self.records[name]
        while True:
            micro_batch = self.micro_batches[name]
            values = self.config.to_dict()
            values["train_micro_batch_size_per_gpu"] = micro_batch
            values["gradient_accumulation_steps"] = values["train_batch_size"] // micro_batch
            job = Job(
                name,
                values,
                self.options.data is not None,
                self.options.steps,
                self.options.clip_steps,
            )
            worker = Worker(job)
            try:
                record |= worker.report()
                record["micro_batch"] = micro_batch
                yield worker
                return
            except Stopped as stopped:
                record["status"] = str(stopped)
            finally:
                worker.end()
            if record["status"] != OUT_OF_MEMORY or micro_batch % 2:
                say(f"  {name}: {record['status']}")
                yield None
                return
            self.micro_batches[name] = micro_batch // 2
            record["status"] = "measured"
            say(f"  {name}: out of memory, goes on with a micro-batch of {micro_batch // 2}")


def show_profile(job: Job) -> None:
    """Print where the time of a contender's step goes."""
    runner = Runner(job)
    runner.warm_up()

    def step() -> None:
        runner.step()

    print(f"## {CONTENDERS[job.name].label}\n\n{profile_table(step, runner.device)}")


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def measure(
    options: argparse.Namespace, names: list[str], configs: list[RunConfig]
) -> dict[str, Any]:
    """Everything that the results file holds, which is written after every turn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = configs[0].deepspeed
    model = configs[0].model
    found: dict[str, Any] = {
        "benchmark": "train_step",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "command": f"python -m benchmarks.train_step {' '.join(sys.argv[1:])}".strip(),
        "hardware": hardware(device),
        "versions": versions(),
        "device": device.type,
        "dtype": configs[0].dtype,
        "config": str(options.config),
        "model": {
            key: getattr(model, key)
            for key in ("num_layers", "d_model", "d_ff", "num_heads", "vocab_size", "dropout")
        },
        "experts": [config.model.moe.expert_counts[0] for config in configs if config.model.moe],
        "batch": sizes["train_batch_size"],
        "seq_len": configs[0].data.seq_len,
        "data": str(options.data) if options.data else "random tokens",
        "rounds": options.rounds,
        "steps_a_round": options.steps,
        "together": options.together,
        "contenders": {
            name: {key: getattr(CONTENDERS[name], key) for key in ("label", "is_dense", "is_ours")}
            for name in names
        },
        "results": [],
    }
    finished: list[dict[str, Any]] = []
    for config in configs:
        contest = Contest(options, names, config)
        say(f"{contest.experts} experts: {', '.join(names)}")
        for _ in contest.run():
            for record in contest.records.values():
                found["hardware"] |= record.pop("hardware", {})
            found["results"] = summarised(found, finished + list(contest.records.values()))
            if options.out is not None:
                write_json(options.out, found)
        finished += contest.records.values()
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with the defaults of this machine."""
    parser = argument_parser("benchmarks.train_step", __doc__)
    parser.add_argument("--config", type=Path, help="lm_xmoe.json; on a CPU quickstart.json")
    parser.add_argument("--experts", type=counts, help="a layer: 32; on a CPU 8")
    parser.add_argument("--batch", type=positive, help="sequences of a step: the config's")
    parser.add_argument(
        "--micro-batch", type=positive, help="sequences at once: 256; on a CPU the config's"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the config"
    )
    parser.add_argument("--data", type=Path, help="prepared text in the place of random tokens")
    parser.add_argument("--rounds", type=positive, help="3; on a CPU 15")
    parser.add_argument("--steps", type=positive, help="timed steps a round: 3; on a CPU 2")
    parser.add_argument(
        "--clip-steps", type=int, default=1, help="steps a round with DeepSpeed's clipping: 1"
    )
    parser.add_argument(
        "--together", action="store_true", help="all contenders in memory at once, as on a CPU"
    )
    parser.add_argument("--only", help=f"names with commas, of: {', '.join(CONTENDERS)}")
    parser.add_argument("--out", type=Path, help="results, a .json file; the picture beside it")
    parser.add_argument("--draw", type=Path, help="draw the picture of such a file, and stop")
    parser.add_argument("--profile", metavar="NAME", help="show where one contender's step goes")
    options = parser.parse_args(arguments)
    options.kind = "cuda" if torch.cuda.is_available() else "cpu"
    defaults = dict(DEFAULTS[options.kind])
    if options.batch is not None and defaults["micro_batch"] is not None:
        defaults["micro_batch"] = min(defaults["micro_batch"], options.batch)
    fill_in(options, defaults)
    options.together |= options.kind == "cpu"
    return options


def chosen_configs(options: argparse.Namespace) -> list[RunConfig]:
    """The sparse runs to measure, one for each number of experts.

    Raises:
        UserError: if they cannot be.
    """
    overrides = list(options.set)
    if not any(override.startswith(f"{ZERO_STAGE}=") for override in overrides):
        overrides.append(f"{ZERO_STAGE}=1")
    if options.batch is not None:
        overrides.append(f"train_batch_size={options.batch}")
    if options.micro_batch is not None:
        # The config's accumulation steps would contradict it.
        overrides.append(f"train_micro_batch_size_per_gpu={options.micro_batch}")
    if options.data is not None:
        overrides.append(f"magnetar.data.path={json.dumps(str(options.data))}")
    config = load_config(options.config, overrides)
    if config.model.architecture != "decoder":
        raise UserError(
            f"{options.config} describes a model of architecture {config.model.architecture!r}: "
            "name a config of a decoder, which all contenders have"
        )
    vocab_size = config.model.vocab_size or RANDOM_VOCAB_SIZE
    if options.data is not None:
        data = open_prepared(options.data)
        of_data = data.manifest.vocab_size
        vocab_size = fitting_vocab_size(config.model.vocab_size, of_data, False, data.path)
    return [sparse_config(config, count, vocab_size=vocab_size) for count in options.experts]


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; write the results and the picture where they are asked for."""
    options = parse(arguments)
    if options.draw is not None:
        draw_beside(options.draw, read_results(options.draw, "train_step"), draw_step)
        return
    require_json(options.out)
    default = [name for name, one in CONTENDERS.items() if options.kind in one.default]
    names, configs = chosen_names(options, CONTENDERS, default), chosen_configs(options)
    if options.profile:
        show_profile(Job(names[0], configs[0].to_dict(), options.data is not None, 1, 0))
        return
    found = measure(options, names, configs)
    print(step_table(found))
    if options.out is not None:
        draw_beside(options.out, found, draw_step)


if __name__ == "__main__":
    sys.exit(main())
