"""What every benchmark needs: options, ranks to run on, and the provenance of its numbers."""

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from magnetar.data.errors import UserError

ROOT = Path(__file__).parents[1]
LAYOUTS = Path(__file__).with_name("layouts.json")
NO_RUN = "/nonexistent/run"  # a folder without checkpoints, for what only trains a few steps
PACKAGES = (
    *("torch", "triton", "deepspeed", "torchscale", "transformers", "megatron-core"),
    "transformer-engine",
)


def argument_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of `python -m MODULE`, whose help is the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive(text: str) -> int:
    """A count, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def counts(text: str) -> list[int]:
    """Counts with commas between them, for argparse."""
    return [positive(part) for part in text.split(",")]


def fill_in(options: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Set the options that were not given."""
    for key, value in defaults.items():
        if getattr(options, key) is None:
            setattr(options, key, value)


def chosen_names(
    options: argparse.Namespace, contenders: Collection[str], default: Sequence[str]
) -> list[str]:
    """The names that --profile or --only asks for, in the order of the contenders.

    Raises:
        UserError: if a name is unknown.
    """
    asked = options.profile or options.only
    names = [name.strip() for name in asked.split(",")] if asked else default
    if any(name not in contenders for name in names) or (options.profile and len(names) > 1):
        option = "--profile" if options.profile else "--only"
        rule = "takes one name" if options.profile else "takes names with commas between them"
        raise UserError(f"{option} {asked} {rule}, of: {', '.join(contenders)}")
    return [name for name in contenders if name in names]


def require_json(out: Path | None) -> None:
    """Refuse an --out that is no .json file.

    Raises:
        UserError: if it has another suffix.
    """
    if out is not None and out.suffix != ".json":
        raise UserError(f"--out {out} must end in .json: such as --out {out.with_suffix('.json')}")


def read_results(
    file: Path, benchmark: str = "moe_layer", needed: tuple[str, ...] = ("results", "contenders")
) -> dict[str, Any]:
    """The results of a benchmark, in which the `needed` parts may not be missing or empty.

    Raises:
        UserError: if the file is missing, or is not a result of this benchmark.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist: name a file that --out has written")
    try:
        found = json.loads(file.read_text())
    except ValueError:
        found = None
    is_whole = isinstance(found, dict) and all(found.get(part) for part in needed)
    if not is_whole or found.get("benchmark") != benchmark:
        raise UserError(
            f"{file} is no result of this benchmark: name a file that --out has written"
        )
    return found


def write_json(out: Path, found: dict[str, Any]) -> None:
    """Write results, in a folder that need not exist."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")


def draw_beside(
    out: Path, found: dict[str, Any], draw: Callable[[dict[str, Any], Path], None]
) -> None:
    """Draw results as a .png beside their file, and say so."""
    picture = out.with_suffix(".png")
    try:
        draw(found, picture)
        print(f"wrote {out} and {picture}")
    except ModuleNotFoundError as error:  # a machine that only computes
        print(f"wrote {out}; a picture needs {error.name}: --draw it where that is")


def failure(stage: str, error: BaseException) -> str:
    """The error and its stage, for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"failed: {stage}: {type(error).__name__}: {lines[0] if lines else ''}"[:300]


def launch(
    module: str,
    num_ranks: int,
    arguments: Sequence[str | Path],
    quietly: bool = False,
    seconds: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a module on so many ranks of this machine with the `deepspeed` launcher.

    Args:
        module: dotted name of the module.
        num_ranks: number of GPUs, or of processes on the CPU.
        arguments: arguments of the module.
        quietly: whether to keep the output of the ranks for the caller.
        seconds: time limit after which all ranks are killed; None: no limit.

    Raises:
        TimeoutExpired: if they were killed.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "deepspeed.launcher.runner", "-q"),
            *("--num_gpus", str(num_ranks), "--master_port", str(port), "--module", module),
            *map(str, arguments),
        ],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE if quietly else None,
        stderr=subprocess.STDOUT if quietly else None,
        text=True,
        start_new_session=seconds is not None,  # one group of processes, ranks included
    ) as launcher:
        try:
            output, _ = launcher.communicate(timeout=seconds)
        except BaseException:
            if seconds is None:
                launcher.kill()
            else:
                os.killpg(launcher.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, output)


def setting_words(changes: dict[str, Any], given: Sequence[str] = ()) -> list[str]:
    """Arguments --set of keys and values; `given` KEY=VALUE pairs come first and have priority."""
    keys = {text.partition("=")[0] for text in given}
    own = [f"{key}={json.dumps(value)}" for key, value in changes.items() if key not in keys]
    return [word for text in [*given, *own] for word in ("--set", text)]


class Training:
    """The engine of benchmarks/layouts.json with some settings on this rank, and its steps."""

    def __init__(self, settings: Sequence[str], device: torch.device) -> None:
        """Build it; the ranks must have joined."""
        import deepspeed.comm as dist

        from magnetar.engine.build import build_engine
        from magnetar.engine.config.schema import load_config
        from magnetar.engine.prepare_run import resolve_run
        from magnetar.engine.train_step import loss_weights, training_batches

        self.ranks, self.device = dist.get_world_size(), device
        config = load_config(LAYOUTS, settings, self.ranks)
        self.config, self.prepared = resolve_run(config, self.ranks)
        accumulation = self.config.deepspeed["gradient_accumulation_steps"]
        self.batches = training_batches(self.prepared, accumulation, device)
        self.weights = loss_weights(self.config.model.moe, self.config.training)
        self.engine, self.clip = build_engine(self.config, device)

    def step(self, number: int) -> float:
        """Train a step (from 1), and wait for its update; the loss of the global batch."""
        import deepspeed.comm as dist

        from magnetar.engine.train_step import train_step

        batch, seed = self.batches.of_step(number), self.config.training.seed
        loss = train_step(self.engine, batch, self.weights, seed, number).loss.double()
        dist.all_reduce(loss)
        return float(loss) / self.ranks


def hardware(device: torch.device) -> dict[str, Any]:
    """The hardware of the measurement."""
    found: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "cpu_threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
        found["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str | None]:
    """Versions of Python and of every package that takes part; None if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def nccl_settings() -> dict[str, str]:
    """NCCL's settings in the environment."""
    return {
        key: value for key, value in os.environ.items() if key.startswith(("NCCL_", "TORCH_NCCL"))
    }


def git_commit() -> str | None:
    """The commit of the sources, with "+" if a tracked file differs; None without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
