"""Runs that meet what the guards are for, and what they do about it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from magnetar.engine.checkpoint.format import complete_checkpoints
from tests.machine import as_param, is_runnable
from tests.ranks import ROOT, rank_variables
from tests.runs import (
    environment,
    launch,
    make_corpus,
    records,
    started,
    wait_for_step,
    write_config,
)

pytestmark = pytest.mark.slow

# Trains as magnetar train does, config after config, but for faults: `gradient` is what the loss
# is multiplied by before a backward pass, `loss` what it seems to be multiplied by,
# `batch` what is trained on in a batch's place, `does` a statement after its step.
FAULTY = """
import json, os, sys
from pathlib import Path
import magnetar.engine.trainer as trainer
from magnetar.data.loader import TrainingBatches as Batches
from magnetar.engine.config.schema import load_config
from magnetar.engine.prepare_run import prepare_run
from magnetar.launchers.terminal.user_errors import user_errors
from tests.machine import imitate

imitate()
train_step, of_step, fault = trainer.train_step, Batches.of_step, {}

def value(name, **names):
    numbers = {"nan": float("nan"), "inf": float("inf"), "rank": int(os.environ["RANK"])}
    return eval(fault[name], numbers | names)

def faulty_of_step(batches, batch):
    return of_step(batches, value("batch", batch=batch))

def faulty(engine, micro_batches, weights, seed, batch, max_rows, before_update):
    batch, backward = value("batch", batch=batch), type(engine).backward
    engine.backward = lambda loss: backward(engine, loss * value("gradient", batch=batch))
    def before(loss):
        before_update(loss * value("loss", batch=batch))
    result = train_step(engine, micro_batches, weights, seed, batch, max_rows, before)
    exec(fault["does"], globals() | {"engine": engine, "batch": batch})
    return result

trainer.train_step, Batches.of_step = faulty, faulty_of_step
with user_errors():
    for path, given in json.loads(sys.argv[1]):
        fault = {"gradient": "1", "loss": "1", "batch": "batch", "does": "pass"} | given
        ranks = int(os.environ["WORLD_SIZE"])
        trainer.train(*prepare_run(load_config(Path(path), (), ranks), ranks))
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def train_with(*cases: tuple[Path, dict[str, str]], ranks: int = 1) -> subprocess.CompletedProcess:
    """Train under faults, on ranks of our own; the output of all, the status of the first."""
    arguments = json.dumps([(str(config), fault) for config, fault in cases])
    processes = [
        subprocess.Popen(
            ["python", "-c", FAULTY, arguments],
            env=environment() | of_rank,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for of_rank in rank_variables(ranks)
    ]
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    return subprocess.CompletedProcess(arguments, processes[0].returncode, "\n".join(outputs))


def losses(run_dir: Path) -> list[float | None]:
    return [record["loss"] for record in records(run_dir) if "loss" in record]


def one_rank(folder: Path, corpus: Path, name: str = "run", **changes: Any) -> Path:
    keys = {
        "magnetar.model.moe.ep_size": 1,
        "magnetar.training.num_steps": 12,
        "magnetar.training.eval_sequences": 4,
        "magnetar.training.sample_tokens": 0,
        "tensorboard.enabled": False,
    }
    return write_config(folder, corpus, name, keys | changes)


MODES = {
    "ZeRO 0": {"zero_optimization.stage": 0},
    "ZeRO 1": {"zero_optimization.stage": 1},
    "ZeRO 1, bf16": {"zero_optimization.stage": 1, "bf16.enabled": True},
    "bf16, fp32 accumulation": {
        "zero_optimization.stage": 1,
        "bf16.enabled": True,
        "data_types.grad_accum_dtype": "fp32",
    },
    "ZeRO 3": {"zero_optimization.stage": 3},
}


@pytest.fixture(scope="module")
def guarded(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each of MODES that this machine can run, with two runs."""
    folder = tmp_path_factory.mktemp("guarded")
    modes = {mode: keys for mode, keys in MODES.items() if is_runnable(keys)}
    steps = {"magnetar.guards.max_bad_steps": 3, "magnetar.training.eval_every": None}
    # The third batch alone is bad, and those from the sixth on until the run has gone back. The
    # other run has never heard of the batches that are left out.
    faults = {
        "run": {"gradient": "nan if batch in (3, 6, 7, 8) else 1"},
        "other": {
            "gradient": "nan if batch == 3 else 1",
            "batch": "batch if batch < 5 else batch + 4",
        },
    }
    cases = []
    for mode, changes in modes.items():
        (folder / mode).mkdir()
        for name, fault in faults.items():
            config = one_rank(folder / mode, corpus, name, **(changes | steps))
            cases.append((config, fault))
    done = train_with(*cases)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("step 3 is left out: gradient norm nan") == 2 * len(modes)
    assert done.stdout.count("back from step 8 (gradient norm nan) to step 4") == len(modes)
    return folder


@pytest.mark.parametrize(
    "mode", [as_param(mode, cases=[keys], id=mode) for mode, keys in MODES.items()]
)
def test_bad_gradients_change_nothing_and_many_lead_around_their_batches(
    guarded: Path, mode: str
) -> None:
    run_dir = guarded / mode / "run"
    rows = [record for record in records(run_dir) if "loss" in record]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1] + [4] * 8
    logbook = (run_dir / "logbook.md").read_text()
    events = [line.split("**")[1] for line in logbook.splitlines() if line.startswith("- ")]
    assert events == ["start", "going", "skip", "skip", "skip", "skip", "rollback", "end"]
    (newest,) = complete_checkpoints(run_dir)[-1:]
    assert newest.manifest["trainer"]["batch_offset"] == 4
    assert len(set(losses(run_dir))) == 12
    # Both runs train the same batches in one process, on the same threads: no rounding parts them.
    assert losses(run_dir) == losses(guarded / mode / "other")


def test_a_fault_of_one_rank_is_left_out_by_all(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus)
    done = train_with((config, {"gradient": "inf if batch == 3 and rank == 1 else 1"}), ranks=2)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("step 3 is left out: gradient norm") == 1


def test_a_spike_of_the_loss_is_left_out_where_that_is_asked_for(
    corpus: Path, tmp_path: Path
) -> None:
    spikes = {"magnetar.guards.spike_deviations": 6.0, "magnetar.guards.spike_window": 5}
    short = {"magnetar.training.lr_schedule.total_steps": 11}
    config = one_rank(tmp_path, corpus, **spikes, **short)
    done = train_with((config, {"loss": "3 if batch in (4, 11) else 1"}))
    assert done.returncode == 0, done.stdout
    assert "step 4" not in done.stdout.replace("step 4: validation", "")  # five are not yet done
    assert "step 11 is left out: loss " in done.stdout
    assert "more than 6 standard deviations" in done.stdout
    assert "**schedule** " in (tmp_path / "run" / "logbook.md").read_text()
    assert "total_steps=11 is less than num_steps=12: the steps after 11" in done.stdout


def test_what_going_back_does_not_help_ends_as_diverged(corpus: Path, tmp_path: Path) -> None:
    guards = {"magnetar.guards.max_bad_steps": 2, "magnetar.guards.max_rollbacks": 1}
    config = one_rank(tmp_path, corpus, **guards)
    done = train_with((config, {"gradient": "nan if batch > 5 else 1"}))
    assert done.returncode == 2, done.stdout
    assert "the run diverged: gradient norm nan at step 6, and going back to step 4 1 times" in (
        done.stdout.replace("\n", " ")
    )
    assert "Traceback" not in done.stdout
    assert "**divergence** step 6" in (tmp_path / "run" / "logbook.md").read_text()


def ranks_of(launcher: int) -> list[int]:
    """The processes that train, in the order of their ranks."""
    import psutil

    found = [
        child
        for child in psutil.Process(launcher).children(recursive=True)
        if any(part.startswith("--local_rank") for part in child.cmdline())
        and "magnetar.launchers.train" in child.cmdline()
        and "deepspeed.launcher.launch" not in child.cmdline()
    ]
    return [child.pid for child in sorted(found, key=lambda child: child.environ()["RANK"])]


LONG = {
    "magnetar.training.num_steps": 4000,
    "magnetar.training.lr_schedule.total_steps": 4000,
    "magnetar.training.save_every": 2000,
    "magnetar.training.eval_every": None,
    "magnetar.training.eval_sequences": 4,
}


@contextmanager
def long_run(
    corpus: Path, folder: Path, **changes: Any
) -> Iterator[tuple[Path, subprocess.Popen, list[int]]]:
    """The config, the launcher and the two ranks of a run that has logged five steps."""
    config = write_config(folder, corpus, changes=LONG | changes)
    with started(config) as launcher:
        wait_for_step(config, 5, launcher)
        yield config, launcher, ranks_of(launcher.pid)


def has_ended(pid: int) -> bool:
    """Whether a process ends within half a minute or so."""
    for _ in range(600):
        if not os.path.exists(f"/proc/{pid}"):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_any_rank_saves_and_ends_them_all_well(
    number: signal.Signals, corpus: Path, tmp_path: Path
) -> None:
    with long_run(corpus, tmp_path) as (config, launcher, (_, second)):
        os.kill(second, signal.SIGUSR1)
        wait_for_step(config, 20, launcher)
        os.kill(second, number)
        output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, output
    saved = [checkpoint.step for checkpoint in complete_checkpoints(tmp_path / "run")]
    assert len(saved) == 2
    assert saved[0] < 20 <= saved[1] < 4000
    assert f"after step {saved[1]}, saved; the same command goes on" in output
    logbook = (tmp_path / "run" / "logbook.md").read_text()
    assert f"SIGUSR1 asks for a checkpoint after step {saved[0]}" in logbook
    assert not (tmp_path / "run" / "summary.json").exists()
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe{\n")
    shorter = launch(config, "--set", f"magnetar.training.num_steps={saved[1] + 2}")
    assert shorter.returncode == 0, shorter.stdout
    logbook = (tmp_path / "run" / "logbook.md").read_text()
    for words in ("**resume** ", "num_steps: 4000 -> ", "is no record and is left out (b'"):
        assert words in logbook
    assert "and kept in metrics.left_out" in shorter.stdout
    steps = [record["step"] for record in records(tmp_path / "run") if "loss" in record]
    assert steps == list(range(1, saved[1] + 3))


def test_a_launcher_that_is_ended_leaves_no_ranks_behind_and_loses_no_step(
    corpus: Path, tmp_path: Path
) -> None:
    with long_run(corpus, tmp_path) as (_, launcher, ranks):
        os.kill(launcher.pid, signal.SIGTERM)  # which DeepSpeed's hands on to nobody
        output, _ = launcher.communicate(timeout=60)
        assert all(map(has_ended, ranks)), "the ranks train on"
    (saved,) = complete_checkpoints(tmp_path / "run")
    assert f"stopped by the end of its launcher after step {saved.step}, saved" in output.replace(
        "a signal to another rank", "the end of its launcher"
    )


def test_ctrl_c_twice_ends_a_run_at_once_even_one_that_waits_for_another_rank(
    corpus: Path, tmp_path: Path
) -> None:
    with long_run(corpus, tmp_path) as (_, launcher, (first, second)):
        os.kill(second, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(first, signal.SIGINT)
        time.sleep(0.5)
        assert launcher.poll() is None
        os.kill(first, signal.SIGINT)
        time.sleep(3)  # the launcher looks once a second, and passes on the first status it sees
        os.kill(second, signal.SIGKILL)
        output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 130, output
    assert not complete_checkpoints(tmp_path / "run")


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_is_found_and_named(
    stopped: int, corpus: Path, tmp_path: Path
) -> None:
    timeout = {"magnetar.guards.hang_timeout_seconds": 10}
    with long_run(corpus, tmp_path, **timeout) as (_, launcher, ranks):
        os.kill(ranks[stopped], signal.SIGSTOP)
        if stopped == 1:  # an alarm that turns out to be none
            time.sleep(13)
            os.kill(ranks[stopped], signal.SIGCONT)
            time.sleep(3)
            os.kill(ranks[stopped], signal.SIGSTOP)
        assert has_ended(ranks[1 - stopped])
        os.kill(ranks[stopped], signal.SIGKILL)  # for which the launcher would wait half a minute
        output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 3, output
    assert f"nothing has happened for 10 seconds: rank {stopped} does not answer" in output
    logbook = (tmp_path / "run" / "logbook.md").read_text()
    assert "hang** nothing has happened for 10 seconds" in logbook
    if stopped == 1:
        assert "rank 0 is in step" in output
        assert "all_reduce, called by engine/" in output or "called by models/" in output


def test_weights_that_drift_apart_are_named(corpus: Path, tmp_path: Path) -> None:
    # ZeRO 1 and 2 hand out the weights anew in every step: there a difference does not last.
    changes = {"magnetar.guards.replica_check_every": 2, "zero_optimization.stage": 0}
    config = write_config(tmp_path, corpus, changes=changes)
    flip = (
        "if batch == 5 and os.environ['RANK'] == '1': "
        "next(p for n, p in engine.module.named_parameters() if 'norm' in n).data[0] += 1e-6"
    )
    done = train_with((config, {"does": flip}), ranks=2)
    assert done.returncode == 3, done.stdout
    assert "of rank 1 are no longer those of rank 0, found at step 6" in done.stdout
    assert "Traceback" not in done.stdout
