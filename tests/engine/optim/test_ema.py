"""The average of the weights: its recurrence in every layout, its checkpoints, what reads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.format import WEIGHT, complete_checkpoints, newest_checkpoint
from magnetar.engine.checkpoint.open_run import open_run
from magnetar.engine.optim.ema import EMA, ema_of, keep_ema
from magnetar.launchers import convert, evaluate
from tests.machine import as_param
from tests.ranks import run_on_ranks
from tests.runs import launch, make_corpus, write_config

DECAY = 0.7
KEY = {"magnetar.training.ema_decay": DECAY}
STAGE, EP = "zero_optimization.stage", "magnetar.model.moe.ep_size"
LAYOUTS = [KEY | {STAGE: stage, EP: ep} for stage, ep in ((0, 2), (1, 1), (3, 2), (2, 2), (3, 1))]
ONE_RANK = [KEY | {STAGE: 0, EP: 1}]
BF16 = [KEY | {STAGE: stage, EP: 2, "bf16.enabled": True} for stage in (1, 3, 2)]
OFFLOADED = [
    KEY | {STAGE: stage, "zero_optimization.offload_optimizer": {"device": "cpu"}}
    for stage in (2, 3)
]
EIGHT_BITS = [
    KEY | {STAGE: stage, "optimizer.type": "AdamW8bit", "optimizer.params.min_8bit_size": 512}
    for stage in (0, 1)
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("on_two_ranks", "on_one_rank"),
    [
        as_param(LAYOUTS, ONE_RANK, cases=LAYOUTS, id="fp32, ZeRO 0 to 3"),
        as_param(BF16, [], cases=BF16, id="bf16"),
        as_param(OFFLOADED, [], cases=OFFLOADED, id="offloaded"),
        as_param(EIGHT_BITS, [], cases=EIGHT_BITS, id="8 bits"),
    ],
)
def test_the_average_follows_its_recurrence_from_one_layout_into_another(
    on_two_ranks: list[dict[str, Any]], on_one_rank: list[dict[str, Any]], tmp_path: Path
) -> None:
    program = "tests.engine.programs:saved_at_every_step"
    run_on_ranks(program, 2, on_two_ranks, str(tmp_path), 0)
    if on_one_rank:
        run_on_ranks(program, 1, on_one_rank, str(tmp_path), 3 * len(on_two_ranks))
    first, *later = complete_checkpoints(tmp_path)
    assert len(later) == 3 * len(on_two_ranks + on_one_rank)
    averages: dict[str, Tensor] = {name: first.tensor(name).double() for name in first.shapes}
    for checkpoint in later:
        for name, average in averages.items():
            average.mul_(DECAY).add_(checkpoint.tensor(name).double(), alpha=1 - DECAY)
            # An update rounds twice, by up to 2^-24 of the largest number; what it leaves of
            # earlier errors sums up to 1 / (1 - d) of one.
            bound = 2 / (1 - DECAY) * 2**-24 * max(1e-3, float(average.abs().max()))
            assert float((checkpoint.tensor(name, EMA) - average).abs().max()) <= bound, name
    last = later[-1]
    assert max(float((last.tensor(n, EMA) - last.tensor(n)).abs().max()) for n in averages) > 1e-3


def test_a_step_that_is_left_out_leaves_the_average() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    sgd = torch.optim.SGD([weight], lr=1.0)
    keep_ema(sgd, [weight], 0.75)
    weight.grad = torch.full((3,), 4.0)
    sgd.step()  # 1 - 4
    assert ema_of(sgd, weight)[EMA].tolist() == [0.75 * 1 + 0.25 * -3] * 3
    weight.data.fill_(8.0)
    assert ema_of(sgd, weight)[EMA].tolist() == [0.0] * 3
    assert ema_of(torch.optim.SGD([weight]), weight) == {}


@pytest.mark.slow
def test_commands_read_the_average_of_a_run_that_went_on_in_another_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {**KEY, "magnetar.training.num_steps": 4, "magnetar.training.save_every": 2}
    config = write_config(tmp_path, make_corpus(tmp_path / "corpus"), changes=changes)
    assert launch(config).returncode == 0
    run = tmp_path / "run"
    layout = ("--set", f"{EP}=1", "--set", f"{STAGE}=0", "--set", "magnetar.training.num_steps=6")
    assert launch(config, *layout, ranks=1).returncode == 0
    saved = newest_checkpoint(run)
    assert saved.step == 6
    convert.main(["export", str(run), "--ema", "--out", str(tmp_path / "exported")])
    assert "their average, by magnetar.training.ema_decay" in capsys.readouterr().out
    exported = open_run(tmp_path / "exported").state_dict()
    for name, tensor in exported.items():
        assert torch.equal(tensor, saved.tensor(name, EMA)), name
    losses = []
    for words in ([str(run)], [str(run), "--ema"], [str(tmp_path / "exported")]):
        evaluate.main([*words, "--json"])
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    plain, averaged, of_export = losses
    assert averaged == of_export
    assert abs(averaged - plain) > 1e-3
    with pytest.raises(UserError, match=r"--ema: .*exported is a folder of weights"):
        open_run(tmp_path / "exported", ema=True)
    # An export has no average, so its run begins one with its weights.
    convert.main(["import", str(tmp_path / "exported"), "--out", str(tmp_path / "again")])
    more = ("--set", "magnetar.training.num_steps=7")
    done = launch(tmp_path / "again" / "config.json", *more, ranks=1)
    assert done.returncode == 0, done.stdout
    last = newest_checkpoint(tmp_path / "again")
    for name, tensor in exported.items():
        expected = DECAY * tensor + (1 - DECAY) * last.tensor(name, WEIGHT)
        torch.testing.assert_close(last.tensor(name, EMA), expected, rtol=1e-6, atol=1e-7)


def test_a_run_without_an_average_is_refused(tmp_path: Path) -> None:
    from tests.convert.checkpoints import write_checkpoint

    path = write_checkpoint(tmp_path / "run").path
    with pytest.raises(UserError, match=r"--ema: .*holds no average.*training\.ema_decay"):
        open_run(path, ema=True)
