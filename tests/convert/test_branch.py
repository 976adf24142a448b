"""A run that branches off another and decays equals one that was planned so, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from magnetar.convert import run_folders
from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.format import WEIGHT, newest_checkpoint
from magnetar.engine.config.schema import check_config
from magnetar.engine.optim.adam import MOMENTS
from magnetar.launchers.convert import branch
from tests.convert.checkpoints import write_checkpoint
from tests.runs import launch, make_corpus, records, write_config

SCHEDULE = "magnetar.training.lr_schedule"
STEPS = "magnetar.training.num_steps"
CONSTANT = {"type": "constant", "warmup_steps": 2, "warmup_start_lr": 1e-4}
WSD = {"type": "wsd", "warmup_steps": 2, "decay_steps": 4, "end_lr": 1e-4, "decay": "1-sqrt"}


def train(folder: Path, corpus: Path, name: str, schedule: dict, steps: int, ranks: int) -> Path:
    changes: dict[str, Any] = {SCHEDULE: schedule, STEPS: steps}
    if ranks == 1:
        changes |= {"magnetar.model.moe.ep_size": 1, "zero_optimization.stage": 0}
    done = launch(write_config(folder, corpus, name, changes), ranks=ranks)
    assert done.returncode == 0, done.stdout
    return folder / name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "schedule", "planned"),
    [
        (2, CONSTANT, CONSTANT | {"type": "wsd", "decay_steps": 3}),
        (1, WSD, WSD | {"decay_steps": 3}),
    ],
    ids=["constant, 2 ranks", "wsd, 1 rank"],
)
def test_a_branch_equals_a_run_that_was_planned_so(
    ranks: int, schedule: dict, planned: dict, tmp_path: Path
) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    trunk = train(tmp_path, corpus, "trunk", schedule, 8, ranks)
    whole = train(tmp_path, corpus, "planned", planned, 7, ranks)
    out = tmp_path / "branch"
    branch([str(trunk), "--at", "4", "--decay", "3", "--out", str(out)])
    done = launch(out / "config.json", ranks=ranks)
    assert done.returncode == 0, done.stdout
    assert "resuming after step 4" in done.stdout
    assert records(out) == records(whole)
    assert records(out) != records(trunk)[: len(records(out))]
    one, other = newest_checkpoint(out), newest_checkpoint(whole)
    assert one.step == other.step == 7
    for name in one.shapes:
        for state in (WEIGHT, *MOMENTS):
            assert torch.equal(one.tensor(name, state), other.tensor(name, state)), name
    assert one.manifest["optimizer"] == other.manifest["optimizer"]


def test_a_branch_is_a_run_of_its_own_whose_decay_ends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    source = write_checkpoint(run, changes={SCHEDULE: WSD, STEPS: 9}, world_size=2)
    branch([str(run), "--at", "5", "--decay", "7", "--out", str(out)])
    config = json.loads((out / "config.json").read_text())
    training = config["magnetar"]["training"]
    assert training["lr_schedule"] == WSD | {
        "warmup_start_lr": 0.0,
        "total_steps": 12,
        "decay_steps": 7,
    }
    assert training["num_steps"] == 12
    assert training["run_dir"] == str(out)
    assert check_config(config, 2)[1] == []
    assert newest_checkpoint(out).manifest["layout"] == source.manifest["layout"]
    printed = capsys.readouterr().out
    assert "decays    from step 6 to step 12, the last one" in printed
    assert f"train on  magnetar train {out / 'config.json'} --num_gpus 2" in printed


@pytest.mark.parametrize(
    ("schedule", "at", "part"),
    [
        (CONSTANT, 4, "--at 4: {run} has no complete checkpoint of that step: use 3 or 5"),
        (
            {"type": "cosine", "warmup_steps": 1},
            5,
            '{run} has magnetar.training.lr_schedule.type="cosine", which changes the rate',
        ),
        (WSD, 5, "--at 5: {run} has its full learning rate from step 2 to 4: use such a step"),
        (
            {"type": "constant", "warmup_steps": 6},
            5,
            "--at 5: {run} has its full learning rate from step 6 on: use such a step",
        ),
    ],
)
def test_a_step_from_which_no_planned_run_could_decay_is_refused(
    schedule: dict, at: int, part: str, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    for step in (3, 5):
        write_checkpoint(run, step, changes={SCHEDULE: schedule, STEPS: 8})
    with pytest.raises(UserError) as refused:
        run_folders.branch(run, out, at, 2)
    assert part.format(run=run) in str(refused.value)
    assert not out.exists()


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has none: name another run"):
        run_folders.branch(tmp_path / "run", tmp_path / "out", 5, 2)
