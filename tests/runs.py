"""Small real runs: a corpus, a config, the deepspeed launcher."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.engine.programs import with_keys
from tests.ranks import ROOT, free_port, rank_variables, run_processes

TINY: dict[str, Any] = {
    "train_batch_size": 4,
    "gradient_clipping": 0.5,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
    "zero_optimization": {"stage": 1},
    "tensorboard": {"enabled": True},
    "magnetar": {
        "model": {
            "num_layers": 2,
            "d_model": 32,
            "d_ff": 64,
            "num_heads": 2,
            "max_seq_len": 32,
            "dropout": 0.1,
            "moe": {"num_experts": 4, "every": 2, "top_k": 2, "ep_size": 2},
        },
        "data": {"path": "set by write_config", "seq_len": 32},
        "training": {
            "run_dir": "set by write_config",
            "num_steps": 8,
            "lr_schedule": {"type": "polynomial", "warmup_steps": 2, "total_steps": 100},
            "log_every": 1,
            "eval_every": 4,
            "save_every": 4,
            "sample_tokens": 8,
        },
    },
}


def make_corpus(folder: Path, vocab_size: int = 300) -> Path:
    """A prepared folder of a few thousand words that a small model can learn from."""
    from magnetar.data.text.prepare import PrepareConfig, prepare

    words = random.Random(0)
    subjects, verbs = ("the senate", "a citizen", "our nation"), ("builds", "guards", "wants")
    objects = ("peace", "a railroad", "honest money", "the frontier")
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(40):
        sentences = (
            f"{words.choice(subjects)} {words.choice(verbs)} {words.choice(objects)}."
            for _ in range(40)
        )
        (folder / f"speech_{index:02d}.txt").write_text(" ".join(sentences))
    out = folder / "prepared"
    prepare(
        PrepareConfig(
            out=out,
            train=(str(folder / "speech_[0-2]*.txt"),),
            valid=(str(folder / "speech_3*.txt"),),
            vocab_size=vocab_size,
        )
    )
    return out


def write_config(
    folder: Path, corpus: Path, name: str = "run", changes: dict[str, Any] | None = None
) -> Path:
    """TINY with dotted keys set, as a file; its run_dir is folder/name."""
    own = {"magnetar.data.path": str(corpus), "magnetar.training.run_dir": str(folder / name)}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(with_keys(TINY, own | (changes or {}))))
    return path


def launcher_command(config: Path, *arguments: str, ranks: int = 2) -> list[str]:
    """The deepspeed launcher, as a user calls it."""
    return [
        str(Path(sys.executable).parent / "deepspeed"),
        *("--num_gpus", str(ranks), "--master_port", str(free_port())),
        *("--module", "magnetar.launchers.train", "--deepspeed_config", str(config)),
        *arguments,
    ]


def environment() -> dict[str, str]:
    """What the launcher's processes need to find the interpreter's programs and stay quiet."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "DS_ACCELERATOR": "cpu"}


def launch(
    config: Path, *arguments: str, ranks: int = 2, by_deepspeed: bool = False
) -> subprocess.CompletedProcess:
    """Train to the end of the command; output holds stdout and stderr of all ranks.

    Without `by_deepspeed` the ranks are started here, in the launcher's environment: the launcher's
    two processes would take as long to import DeepSpeed as a small run trains.
    """
    if by_deepspeed:
        command = launcher_command(config, *arguments, ranks=ranks)
        return subprocess.run(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
    command = ["--deepspeed_config", str(config), *arguments]
    environments = [environment() | own for own in rank_variables(ranks)]
    found = run_processes("magnetar.launchers.train", command, environments)
    status = next((status for status, _ in found if status), 0)
    return subprocess.CompletedProcess(command, status, "".join(output for _, output in found))


@contextmanager
def started(config: Path) -> Iterator[subprocess.Popen]:
    """The launcher, training on two ranks; in the end all of its processes get SIGKILL."""
    launcher = subprocess.Popen(
        launcher_command(config),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield launcher
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()


def wait_for_step(config: Path, step: int, launcher: subprocess.Popen) -> None:
    """Return when a run that its launcher trains has logged a step."""
    metrics = config.parent / "run" / "metrics.jsonl"
    for _ in range(12_000):
        if metrics.is_file() and f'"step": {step},' in metrics.read_text():
            return
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.01)
    pytest.fail(f"step {step} was not reached in two minutes")


def rewrite_manifest(file: Path, old: str, new: str) -> None:
    """Replace text in a manifest.json, and sign it again."""
    from magnetar.engine.checkpoint.format import manifest_digest

    manifest = json.loads(file.read_text().replace(old, new))
    file.write_text(json.dumps(manifest | {"sha256": manifest_digest(manifest)}))


def records(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock or the machine."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    timed = {"tokens_per_second", "memory_gib", "mfu"}
    return [
        {name: value for name, value in json.loads(line).items() if name not in timed}
        for line in lines
    ]
