"""Stopping and starting the same command again changes nothing."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.format import complete_checkpoints
from magnetar.engine.checkpoint.open_run import load_model
from magnetar.engine.config.schema import load_config
from magnetar.engine.prepare_run import prepare_run
from tests.ranks import ROOT
from tests.runs import (
    environment,
    launch,
    launcher_command,
    make_corpus,
    records,
    started,
    wait_for_step,
    write_config,
)

pytestmark = pytest.mark.slow

LONG = {
    "magnetar.training.num_steps": 60,
    "magnetar.training.eval_every": 20,
    "magnetar.training.save_every": 10,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = launch(write_config(folder, corpus, changes=LONG))
    assert done.returncode == 0, done.stdout
    return folder / "run"


def kill_after_step(config: Path, step: int) -> None:
    """Start the command and SIGKILL all of its processes once it has logged a step."""
    with started(config) as launcher:
        wait_for_step(config, step, launcher)


def test_a_killed_run_continues_with_exactly_the_same_metrics(
    uninterrupted: Path, corpus: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, corpus, changes=LONG)
    kill_after_step(config, 25)
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed = launch(config)
    assert resumed.returncode == 0, resumed.stdout
    assert "resuming after step" in resumed.stdout
    assert records(tmp_path / "run") == records(uninterrupted)


def test_a_killed_encoder_continues_with_exactly_the_same_masks_and_metrics(
    corpus: Path, tmp_path: Path
) -> None:
    changes = LONG | {
        "magnetar.model.architecture": "encoder",
        "magnetar.data.masking": {"unit": "span"},
        "magnetar.training.num_steps": 30,
        "magnetar.training.z_loss_weight": 0.1,
        "magnetar.model.moe.router_z_loss_weight": 1e-3,
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    done = launch(write_config(whole, corpus, changes=changes))
    assert done.returncode == 0, done.stdout
    config = write_config(killed, corpus, changes=changes)
    kill_after_step(config, 15)
    resumed = launch(config)
    assert resumed.returncode == 0, resumed.stdout
    assert "resuming after step" in resumed.stdout
    assert records(killed / "run") == records(whole / "run")
    last = [record for record in records(whole / "run") if "loss" in record][-1]
    assert last["z_loss"] > 1  # log^2 of 301 is 32 at the start
    assert last["router_z_loss"] > 0
    # ln 301 = 5.7; 0.1 * 32 more with the z-loss.
    assert records(whole / "run")[0]["valid_loss"] < 6


def test_the_same_command_twice_from_scratch_gives_the_same_digits(
    uninterrupted: Path, corpus: Path, tmp_path: Path
) -> None:
    done = launch(write_config(tmp_path, corpus, changes=LONG))
    assert done.returncode == 0, done.stdout
    assert records(tmp_path / "run") == records(uninterrupted)


def test_a_run_that_never_saves_leaves_its_numbers_and_starts_anew(
    corpus: Path, tmp_path: Path
) -> None:
    steps = {"magnetar.training.num_steps": 6, "magnetar.training.save_every": 3}
    done = launch(write_config(tmp_path, corpus, name="saved", changes=steps))
    assert done.returncode == 0, done.stdout
    config = write_config(
        tmp_path, corpus, changes=steps | {"magnetar.training.save_every": "never"}
    )
    for _ in range(2):
        done = launch(config)
        assert done.returncode == 0, done.stdout
        assert "tokens, saving nothing" in done.stdout
        assert 'none, by magnetar.training.save_every="never"' in done.stdout
        assert "resuming" not in done.stdout
        assert "magnetar generate" not in done.stdout
        assert not (tmp_path / "run" / "checkpoints").exists()
        assert records(tmp_path / "run") == records(tmp_path / "saved")
    saved, unsaved = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("saved", "run")
    )
    assert unsaved["clipped_steps"] == saved["clipped_steps"] > 0
    assert unsaved["tokens_per_second"] > 0


def test_the_loss_falls_and_everything_promised_is_there(uninterrupted: Path) -> None:
    losses = [record["loss"] for record in records(uninterrupted) if "loss" in record]
    assert len(losses) == 60
    assert losses[-1] < losses[0] - 1
    names = {path.name for path in uninterrupted.iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "tensorboard", "checkpoints"} <= names
    kept = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    assert kept == ["step_00000050", "step_00000060"]
    summary = json.loads((uninterrupted / "summary.json").read_text())
    last = next(r for r in reversed(records(uninterrupted)) if "valid_loss" in r)
    assert summary["validation_after"]["loss"] == last["valid_loss"]
    assert summary["tokens"] == 60 * 4 * 32


def test_tensorboard_has_what_metrics_jsonl_has(uninterrupted: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (uninterrupted / "tensorboard").glob("**/events*")
    accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    assert {
        "train/loss",
        "train/perplexity",
        "train/lr",
        "train/grad_norm",
        "train/dense_grad_norm",
        "train/expert_grad_norm",
        "train/clip_coefficient",
        "train/tokens_per_second",
        "train/memory_gib",
        "valid/perplexity",
        "layer_2/routing_entropy",
        "layer_2/load_max",
        "layer_2/load_min",
        "layer_2/dropped",
        "layer_2/temperature",
    } <= tags
    logged = [r["loss"] for r in records(uninterrupted) if "loss" in r]
    shown = [event.value for event in accumulator.Scalars("train/loss")]
    assert shown == pytest.approx(logged, rel=1e-6)  # TensorBoard keeps float32


def test_a_finished_run_started_again_trains_no_step(uninterrupted: Path) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    done = launch(uninterrupted.parent / "run.json")
    assert done.returncode == 0, done.stdout
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before
    assert "Validation" in done.stdout


def test_a_file_that_cannot_be_written_leaves_the_older_checkpoint_usable(
    corpus: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, corpus)
    assert launch(config).returncode == 0
    command = launcher_command(config, "--set", "magnetar.training.num_steps=12")
    # Files may not grow beyond 64 KiB: a disk that is full as soon as weights are written.
    failed = subprocess.run(
        ["bash", "-c", 'ulimit -f 64; exec "$@"', "bash", *command],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    output = failed.stdout + failed.stderr
    assert failed.returncode == 2, output
    assert "could not write the checkpoint" in output
    assert "what was saved before is as it was; free some space" in output
    assert "Traceback" not in output
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000004", "step_00000008"]
    resumed = launch(config, "--set", "magnetar.training.num_steps=12")
    assert resumed.returncode == 0, resumed.stdout
    assert "resuming after step 8" in resumed.stdout


def test_bad_input_ends_every_rank_with_status_2_and_one_message(
    corpus: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, corpus, changes={"magnetar.model.moe.num_experts": 3})
    failed = launch(config)
    assert failed.returncode == 2, failed.stdout
    assert failed.stdout.count("num_experts=3") == 1
    assert "Traceback" not in failed.stdout
    assert not (tmp_path / "run").exists()


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in records(run_dir) if "loss" in record]


@pytest.fixture(scope="module")
def without_dropout(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that still has all of its checkpoints."""
    folder = tmp_path_factory.mktemp("without_dropout")
    changes = {
        "magnetar.model.dropout": 0.0,
        "magnetar.training.num_steps": 24,
        "magnetar.training.keep_checkpoints": 9,
    }
    done = launch(write_config(folder, corpus, changes=changes))
    assert done.returncode == 0, done.stdout
    return folder


@pytest.mark.parametrize(("ranks", "ep_size", "stage"), [(1, 1, 0), (2, 1, 3)])
def test_a_run_goes_on_in_another_layout(
    ranks: int, ep_size: int, stage: int, without_dropout: Path, tmp_path: Path
) -> None:
    """Saved by 2 ranks with ep_size 2 and ZeRO 1; `python -m tests.faults.resume` runs 25 pairs."""
    whole, run_dir = without_dropout / "run", tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for folder in (run_dir / "checkpoints").iterdir():
        if folder.name > "step_00000004":
            shutil.rmtree(folder)
    layout = {
        "zero_optimization.stage": stage,
        "magnetar.model.moe.ep_size": ep_size,
        "magnetar.training.run_dir": run_dir,
    }
    settings = [part for key, value in layout.items() for part in ("--set", f"{key}={value}")]
    done = launch(without_dropout / "run.json", *settings, ranks=ranks)
    assert done.returncode == 0, done.stdout
    assert "resuming after step 4" in done.stdout
    # Another layout sums in another order: some 300 float32 roundings of 2^-24 on the way to a loss
    # and 500 on the way back.
    assert losses(run_dir) == pytest.approx(losses(whole), rel=0, abs=800 * 2**-24)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    corpus: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, corpus)
    assert launch(config).returncode == 0
    before = records(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    altered = folder / "step_00000008" / "rank_00001.safetensors"
    content = bytearray(altered.read_bytes())
    content[len(content) // 2] ^= 1
    altered.write_bytes(content)
    done = launch(config)
    assert done.returncode == 0, done.stdout
    assert f"warning: {altered} is not what was saved (its sha256 differs)" in done.stdout
    assert "going on from an older one" in done.stdout
    assert "resuming after step 4" in done.stdout
    assert records(tmp_path / "run") == before

    for step in (4, 8):
        (folder / f"step_{step:08d}" / "rank_00000.safetensors").unlink()
    failed = launch(config)
    assert failed.returncode == 2, failed.stdout
    assert f"{folder}: no checkpoint is whole" in failed.stdout
    for step in (4, 8):
        missing = folder / f"step_{step:08d}" / "rank_00000.safetensors"
        assert f"{missing} is missing; it holds embedding.weight and" in failed.stdout
    assert "train anew in another training.run_dir" in failed.stdout
    assert "Traceback" not in failed.stdout
    assert records(tmp_path / "run") == before


def test_the_events_of_a_resumed_run_count_once(corpus: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = write_config(tmp_path, corpus, changes=LONG)
    kill_after_step(config, 25)
    assert launch(config).returncode == 0
    (folder,) = {path.parent for path in (tmp_path / "run" / "tensorboard").glob("**/events*")}
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("train/loss")] == list(range(1, 61))


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_trains(
    corpus: Path, tmp_path: Path
) -> None:
    from magnetar.engine.checkpoint.run_folder import claim_run_folder

    config = write_config(tmp_path, corpus)
    with claim_run_folder(tmp_path / "run"):
        failed = launch(config)
    assert failed.returncode == 2, failed.stdout
    assert "is in use by another run" in failed.stdout
    assert "--set magnetar.training.run_dir=" in failed.stdout
    assert "Traceback" not in failed.stdout
    assert launch(config).returncode == 0


def test_fewer_steps_than_are_done_are_refused(uninterrupted: Path) -> None:
    config = uninterrupted.parent / "run.json"
    before = (uninterrupted / "config.json").read_bytes()
    failed = launch(config, "--set", "magnetar.training.num_steps=30")
    assert failed.returncode == 2, failed.stdout
    assert "num_steps=30 is less than the 60 steps" in failed.stdout
    assert (uninterrupted / "config.json").read_bytes() == before


def test_a_run_that_diverges_keeps_no_checkpoint_of_its_ruin(corpus: Path, tmp_path: Path) -> None:
    changes = {"optimizer.params.lr": 1e30, "magnetar.training.log_every": 50}
    config = write_config(
        tmp_path,
        corpus,
        changes=LONG | changes | {"magnetar.training.save_every": 1, "gradient_clipping": 1e30},
    )
    failed = launch(config)
    assert failed.returncode == 2, failed.stdout
    assert failed.stdout.count("the run diverged") == 1
    assert "lower optimizer.params.lr" in failed.stdout
    assert "Traceback" not in failed.stdout
    for checkpoint in complete_checkpoints(tmp_path / "run"):
        weights = load_model(checkpoint).state_dict()
        assert all(tensor.isfinite().all() for tensor in weights.values()), checkpoint.path


def test_a_run_folder_that_cannot_be_made_is_named(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus)
    below_a_file = config / "run"
    failed = launch(config, "--set", f"magnetar.training.run_dir={below_a_file}")
    assert failed.returncode == 2, failed.stdout
    assert str(config) in failed.stdout
    assert "Traceback" not in failed.stdout


def test_a_model_with_fewer_words_than_its_data_is_refused(corpus: Path, tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, corpus), ["magnetar.model.vocab_size=299"], 2)
    with pytest.raises(
        UserError, match=r"vocab_size=299 is smaller than the vocabulary.*at least 300"
    ):
        prepare_run(config, 2)
    assert not (tmp_path / "run").exists()


def test_a_masked_model_needs_and_gets_a_row_for_the_mask_token(
    corpus: Path, tmp_path: Path
) -> None:
    encoder = {"magnetar.model.architecture": "encoder"}
    path = write_config(tmp_path, corpus, changes=encoder)
    with pytest.raises(
        UserError, match=r"vocab_size=300 is smaller than.* and a mask token, 301: .*at least 301"
    ):
        prepare_run(load_config(path, ["magnetar.model.vocab_size=300"], 2), 2)
    assert prepare_run(load_config(path, (), 2), 2)[0].model.vocab_size == 301
    padded = load_config(path, ["magnetar.model.vocab_size=320"], 2)
    assert prepare_run(padded, 2)[0].model.vocab_size == 320
