"""Training across two hosts: DeepSpeed's hostfile and pdsh, between namespaces of this machine."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.hosts import TwoHosts, two_hosts
from tests.ranks import ROOT
from tests.runs import launch, make_corpus, records, write_config

pytestmark = [pytest.mark.slow, pytest.mark.needs("two hosts")]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as found:
        yield found


def finished(two: TwoHosts, command: list[str]) -> str:
    """What a command on the first host and its ranks on both print until they end well."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=two.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=180)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output


def train(two: TwoHosts, config: Path, *arguments: str) -> str:
    """Train on both hosts by DeepSpeed's command; what they print."""
    words = ("--module", "magnetar.launchers.train", "--deepspeed_config", str(config))
    return finished(two, two.launcher_command(*words, *arguments))


def test_values_of_any_characters_reach_both_hosts_as_given(two: TwoHosts, tmp_path: Path) -> None:
    run_dir = tmp_path / "cost$3 (a)&;*%n'\"{b}"
    config = write_config(tmp_path, make_corpus(tmp_path / "corpus"), "a config;$1")
    settings = [
        f"magnetar.training.run_dir={run_dir}",
        'magnetar.training.lr_schedule={"type": "constant", "warmup_steps": 1}',
        "magnetar.training.num_steps=2",
    ]
    command = [sys.executable, "-m", "magnetar.launchers.supervise", "--max-restarts", "0"]
    command += ["--hostfile", str(two.hostfile), "--deepspeed_config", str(config)]
    command += [word for text in settings for word in ("--set", text)]
    output = finished(two, two.hosts[0].command(command))
    assert "supervise: exit: finished; the newest checkpoint is of step 2" in output
    assert [row["step"] for row in records(run_dir) if "loss" in row] == [1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", config.name, run_dir.name}


def test_experts_on_two_hosts_train_like_one_rank(two: TwoHosts, tmp_path: Path) -> None:
    # The same run goes on with its experts on twice as many ranks: with ep_size 2 only gradients
    # cross the cable, with ep_size 4 the tokens do, too.
    corpus = make_corpus(tmp_path / "corpus")
    changes = {"magnetar.model.dropout": 0.0, "magnetar.training.num_steps": 8}
    config = write_config(tmp_path, corpus, changes=changes)
    output = train(two, config, "--set", "magnetar.training.num_steps=4")
    assert "layout   4 ranks, ep_size 2" in output
    assert {line.split(":")[0] for line in output.splitlines() if "process" in line} >= {
        host.address for host in two.hosts
    }
    assert len(list((tmp_path / "run/checkpoints").glob("step_*"))) == 1
    output = train(two, config, "--set", "magnetar.model.moe.ep_size=4")
    assert "layout   4 ranks, ep_size 4" in output

    alone = write_config(tmp_path, corpus, "alone", changes | {"magnetar.model.moe.ep_size": 1})
    done = launch(alone, ranks=1)
    assert done.returncode == 0, done.stdout
    reference, curve = records(tmp_path / "alone"), records(tmp_path / "run")
    assert [row["step"] for row in curve] == [row["step"] for row in reference]
    losses = [[row[name] for name in row if "loss" in name] for row in curve]
    assert sum(len(row) for row in losses) >= 8 + 3  # of eight steps and three evaluations
    for row, found, expected in zip(curve, losses, reference, strict=True):
        # float32 sums in another order, and Adam.
        wanted = [value for name, value in expected.items() if "loss" in name]
        assert found == pytest.approx(wanted, rel=0, abs=5e-5), row
