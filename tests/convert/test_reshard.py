"""A checkpoint cut for other ranks has the same values, and each rank's files its own experts."""

import json
import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import magnetar.convert.run_folders
from magnetar.convert.experts import place_of
from magnetar.convert.run_folders import reshard
from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.format import (
    WEIGHT,
    Checkpoint,
    CheckpointWriter,
    complete_checkpoints,
    damaged_files,
)
from magnetar.engine.config.schema import Layout, check_config
from magnetar.engine.optim.adam import MOMENTS
from magnetar.launchers.convert import main
from magnetar.models.weights.load_save import save_weights
from tests.convert.checkpoints import run_config, small_model, write_checkpoint
from tests.convert.conversions import flip_bit
from tests.runs import launch, make_corpus, records, write_config

LAYOUTS = [
    Layout(1, 1, 0),
    Layout(2, 2, 1),
    Layout(4, 2, 3),
    Layout(8, 4, 2),
    Layout(8, 1, 1),
]


def written_in(run_dir: Path) -> Checkpoint:
    (checkpoint,) = complete_checkpoints(run_dir)
    return checkpoint


def require_equal(one: Checkpoint, other: Checkpoint) -> None:
    assert list(one.shapes) == list(other.shapes)
    for name in one.shapes:
        for state in (WEIGHT, *MOMENTS):
            assert torch.equal(one.tensor(name, state), other.tensor(name, state)), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_values_stay_and_each_ranks_file_holds_its_experts_and_its_share(
    layout: Layout, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "run", world_size=2)
    reshard(tmp_path / "run", tmp_path / "out", layout, None)
    written = written_in(tmp_path / "out")
    assert damaged_files(written) == []
    require_equal(source, written)
    assert list(written.manifest["files"]) == [
        f"rank_{rank:05d}.safetensors" for rank in range(layout.world_size)
    ]
    numels = []
    for rank, file in enumerate(written.manifest["files"]):
        with safe_open(written.path / file, framework="pt") as opened:
            numel = 0
            for key in opened.keys():  # noqa: SIM118
                _, name, _ = key.split("/")
                numel += math.prod(opened.get_slice(key).get_shape())
                place = place_of(name)
                if place is not None and place.expert is not None:
                    # Experts lie in blocks: rank r holds block r % ep_size.
                    assert place.expert // (4 // layout.ep_size) == rank % layout.ep_size
        numels.append(numel)
    assert sum(numels) == 3 * 34_401
    assert max(numels) - min(numels) <= 3 * len(source.shapes)  # one element a tensor and state


def test_layers_with_other_numbers_of_experts_are_each_divided(tmp_path: Path) -> None:
    changes = {"magnetar.model.moe.num_experts": [2, 8], "magnetar.model.moe.every": 1}
    source = write_checkpoint(tmp_path / "run", changes=changes)
    reshard(tmp_path / "run", tmp_path / "out", Layout(2, 2, 1), None)
    written = written_in(tmp_path / "out")
    require_equal(source, written)
    for name in source.shapes:
        place = place_of(name)
        if place is not None and place.expert is not None:
            num_local = 1 if place.ffn == "blocks.0.ffn" else 4
            owner = place.expert // num_local
            assert written.files_of(name) == [f"rank_{owner:05d}.safetensors"]
    message = refusal(tmp_path / "run", tmp_path / "other", 4, 4, 1)
    assert "2 or 8 experts cannot be divided into ep_size=4 equal parts" in message
    assert message.endswith("--world-size 4 --ep-size 2 --zero-stage 1")


def test_the_run_is_the_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"tensorboard": {"enabled": True, "output_path": str(tmp_path / "run")}}
    source = write_checkpoint(tmp_path / "run", world_size=2, changes=changes)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text("no record\n" + metrics.read_text())
    lines = reshard(source.path, tmp_path / "new" / "out", Layout(4, 2, 2), None)
    assert f"{metrics}: line 1 is no record and is left out" in capsys.readouterr().err
    out = tmp_path / "new" / "out"
    manifest = written_in(out).manifest
    assert manifest["layout"] == {"world_size": 4, "ep_size": 2, "zero_stage": 2}
    kept = ("step", "trainer", "optimizer", "tokenizer_fingerprint", "data_fingerprint")
    assert {key: manifest[key] for key in kept} == {key: source.manifest[key] for key in kept}
    config = json.loads((out / "config.json").read_text())
    assert config == manifest["config"]
    assert config["zero_optimization"]["stage"] == 2
    assert config["magnetar"]["model"]["moe"]["ep_size"] == 2
    assert config["train_batch_size"] == 8
    assert config["gradient_accumulation_steps"] == 1
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["magnetar"]["training"]["run_dir"] == str(out)
    assert config["tensorboard"]["output_path"] == str(out)
    assert check_config(config, 4)[1] == []
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4, 5]  # two more were logged after the checkpoint
    text = "\n".join(lines)
    assert f"read      {source.path}, 2 ranks, ep_size 1, ZeRO 0" in text
    assert "step_00000005, 4 ranks, ep_size 2, ZeRO 2, 4 files, read back and compared" in text
    assert f"train on  magnetar train {out / 'config.json'} --num_gpus 4" in text


def test_a_checkpoint_that_was_moved_has_the_name_of_its_step_and_no_curve(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "run")
    shutil.copytree(source.path, tmp_path / "copied" / "my ckpt")
    lines = reshard(tmp_path / "copied" / "my ckpt", tmp_path / "an out", LAYOUTS[1], None)
    out = tmp_path / "an out"
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "config.json"]
    assert written_in(out).path.name == "step_00000005"
    assert shlex.split(lines[-1])[-3:] == [str(out / "config.json"), "--num_gpus", "2"]


def test_there_and_back_is_the_same(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "run")
    reshard(tmp_path / "run", tmp_path / "a", Layout(4, 4, 1), None)
    reshard(tmp_path / "a", tmp_path / "b", Layout(8, 2, 0), None)
    reshard(tmp_path / "b", tmp_path / "c", Layout(4, 4, 1), None)
    require_equal(source, written_in(tmp_path / "c"))
    files = [written_in(tmp_path / name).manifest["files"] for name in "ac"]
    assert files[0] == files[1]  # bit for bit


def test_a_part_beyond_the_limit_is_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "run")
    monkeypatch.setattr(magnetar.convert.run_folders, "PART_BYTES", 8_000)
    reshard(tmp_path / "run", tmp_path / "out", Layout(2, 2, 1), None)
    written = written_in(tmp_path / "out")
    require_equal(source, written)
    files = written.manifest["files"]
    assert {"rank_00000.safetensors", "rank_00000_00001.safetensors"} <= set(files)
    assert len(files) > 50
    for name in files:
        with safe_open(written.path / name, framework="pt") as opened:
            sizes = [4 * opened.get_tensor(key).numel() for key in opened.keys()]  # noqa: SIM118
            assert sum(sizes) <= 8_000
    # A tensor larger than the limit is cut as well: an expert's w1 has 24,576 bytes.
    assert max(len(t["pieces"]) for t in written.manifest["tensors"].values()) > 2


def refusal(source: Path, out: Path, *layout: int, gpu_memory: float | None = None) -> str:
    existed = out.exists()
    with pytest.raises(UserError) as refused:
        reshard(source, out, Layout(*layout), gpu_memory)
    assert out.exists() == existed
    assert not list(out.parent.glob(f".{out.name}.*"))
    return str(refused.value)


def test_a_layout_that_cannot_hold_the_model_gets_the_nearest_that_can(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    write_checkpoint(run)
    message = refusal(run, out, 6, 3, 1)
    assert "--world-size 6 --ep-size 3 --zero-stage 1 cannot hold the model of" in message
    assert "4 experts cannot be divided into ep_size=3 equal parts" in message
    assert "cannot be divided among 6 ranks: it must be a multiple of 6" in message
    assert message.endswith(
        "the nearest layout that can: --world-size 8 --ep-size 4 --zero-stage 1"
    )
    message = refusal(run, out, 2, 4, 1)
    assert "ep_size=4 must divide the 2 ranks" in message
    assert message.endswith("--world-size 2 --ep-size 2 --zero-stage 1")
    message = refusal(run, out, 2, 1, 9)
    assert "zero_optimization.stage=9 must be one of 0, 1, 2, 3" in message
    message = refusal(run, out, 2, 1, 0, gpu_memory=0.0004)
    assert "a rank needs 0.000513 GiB (weights 0.000128" in message
    assert message.endswith("--world-size 2 --ep-size 1 --zero-stage 1")
    message = refusal(run, out, 2, 1, 0, gpu_memory=1e-6)
    assert "no layout that divides its batch can: use GPUs with more memory" in message


def test_bf16_without_zero_is_refused(tmp_path: Path) -> None:
    changes = {"bf16.enabled": True, "zero_optimization.stage": 1}
    write_checkpoint(tmp_path / "run", changes=changes)
    message = refusal(tmp_path / "run", tmp_path / "out", 2, 1, 0)
    assert "zero_optimization.stage=0 does not go with bf16.enabled=true" in message
    assert message.endswith("--world-size 2 --ep-size 1 --zero-stage 1")


def test_a_damaged_source_is_named(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "run")
    file = source.path / "rank_00001.safetensors"
    flip_bit(file)
    message = refusal(tmp_path / "run", tmp_path / "out", 4, 2, 1)
    assert f"{file} is not what was saved" in message


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    save_weights(tmp_path / "weights", config.model, small_model(config, seed=1))
    message = refusal(tmp_path / "weights", tmp_path / "out", 2, 2, 1)
    assert "is a folder of weights, which are of no step and no layout" in message
    assert "does not exist" in refusal(tmp_path / "nowhere", tmp_path / "out", 2, 2, 1)


@pytest.mark.parametrize("is_hashed_after", [True, False])
def test_what_was_written_is_read_back(
    is_hashed_after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "run")
    write = CheckpointWriter.write_part

    def failing(self: CheckpointWriter, name: str, pieces: Any) -> None:
        if is_hashed_after:  # the values are wrong before they are written
            pieces[3].values[WEIGHT][0] += 1
        write(self, name, pieces)
        if not is_hashed_after:
            with (self.partial / name).open("r+b") as file:
                file.seek(-4, 2)
                file.write(b"1234")

    monkeypatch.setattr(CheckpointWriter, "write_part", failing)
    message = refusal(tmp_path / "run", tmp_path / "out", 4, 2, 1)
    assert "is not what was" in message


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--world-size", "0", "--world-size 0 must be more than 0"),
        ("--ep-size", "-1", "--ep-size -1 must be more than 0"),
        ("--gpu-memory", "nan", "--gpu-memory nan must be more than 0"),
        ("--gpu-memory", "inf", "--gpu-memory inf holds everything"),
    ],
)
def test_numbers_that_are_none_are_refused(
    option: str, value: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = {"--world-size": "2", "--out": str(tmp_path / "out")} | {option: value}
    words = [word for pair in options.items() for word in pair]
    with pytest.raises(SystemExit) as ended:
        main(["reshard", str(tmp_path / "run"), *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_command_reshards(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_checkpoint(tmp_path / "run")
    out = str(tmp_path / "out")
    main(["reshard", str(tmp_path / "run"), "--out", out, "--world-size", "1"])
    line = "step_00000005, 1 rank, ep_size 1, ZeRO 0, 1 file, read back and compared"
    assert f"wrote     {out}/checkpoints/{line}" in capsys.readouterr().out


@pytest.mark.slow
def test_training_goes_on_in_the_new_layout_with_the_same_losses(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    changes = {
        "magnetar.model.dropout": 0.0,
        "magnetar.training.num_steps": 12,
        "magnetar.training.save_every": 6,
        "magnetar.training.keep_checkpoints": 3,
    }
    config = write_config(tmp_path, corpus, changes=changes)
    done = launch(config)
    assert done.returncode == 0, done.stdout
    half = tmp_path / "run" / "checkpoints" / "step_00000006"
    # From 2 ranks that divide the experts with ZeRO 1, to 2 that each hold all with ZeRO 2.
    reshard(half, tmp_path / "other", Layout(2, 1, 2), None)
    done = launch(tmp_path / "other" / "config.json")
    assert done.returncode == 0, done.stdout
    assert "resuming after step 6" in done.stdout
    assert "2 ranks, ep_size 1, ZeRO 2" in done.stdout
    whole, continued = (
        [record["loss"] for record in records(tmp_path / name) if "loss" in record]
        for name in ("run", "other")
    )
    assert len(whole) == len(continued) == 12
    assert continued[:6] == whole[:6]  # copied
    # Another layout sums in another order: some 300 float32 roundings of 2^-24 on the way to a loss
    # and 500 on the way back. A step on wrong gradients moves the loss by 1e-2.
    assert continued[6:] == pytest.approx(whole[6:], rel=0, abs=800 * 2**-24)
