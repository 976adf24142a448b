"""A trained run, exported and imported again, for every command that reads runs."""

import json
from pathlib import Path

import pytest

from magnetar.engine.checkpoint.format import WEIGHT, newest_checkpoint
from magnetar.engine.optim.adam import MOMENTS
from magnetar.launchers import convert, evaluate, generate
from tests.runs import launch, records, write_config


@pytest.mark.slow
def test_a_run_writes_the_same_text_and_trains_on_after_export_and_import(
    trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported, imported = tmp_path / "exported", tmp_path / "imported"
    convert.main(["export", str(trained.folder), "--out", str(exported), "--shard-size", "40KB"])
    convert.main(["import", str(exported), "--out", str(imported)])
    capsys.readouterr()
    texts, losses = [], []
    for folder in (trained.folder, exported, imported):
        generate.main([str(folder), "--prompt", "the senate guards", "--tokens", "20"])
        texts.append(capsys.readouterr().out)
        evaluate.main([str(folder), "--json"])
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    # Exact: the same operations on the same float32 weights, one after the other in this process.
    assert len(set(texts)) == 1, texts
    assert len(set(losses)) == 1, losses

    config = write_config(tmp_path, trained.corpus, "imported", {"magnetar.training.num_steps": 12})
    done = launch(config)
    assert done.returncode == 0, done.stdout
    assert "resuming after step 8" in done.stdout
    steps = [record for record in records(imported) if "loss" in record]
    assert [record["step"] for record in steps] == [9, 10, 11, 12]
    # The schedule goes on where it was: a learning rate of 0 to 100 steps, 2 of them warm-up.
    assert steps[0]["lr"] == pytest.approx(3e-3 * (1 - (8 + 1 - 2) / 98), rel=1e-6)
    assert all(record["loss"] < 1.05 * losses[0] for record in steps), "it goes on, not anew"
    last = newest_checkpoint(imported)
    assert last.step == 12
    optimizer = last.manifest["optimizer"]
    assert (optimizer["step"], optimizer["schedule_step"]) == (4, 12), "Adam has started anew"
    assert set(last.states("embedding.weight")) == {WEIGHT, *MOMENTS}
