"""export -> import -> export: the same bytes; and what reads an exported folder."""

import json
import math
import os
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from magnetar.data.text.token_files import read_manifest
from magnetar.engine.checkpoint.format import WEIGHT, Checkpoint
from magnetar.engine.checkpoint.open_run import load_model as load_checkpoint_model
from magnetar.engine.config.schema import check_config
from magnetar.launchers import evaluate, generate
from magnetar.models.weights.load_save import load_model, load_weights
from tests.convert.checkpoints import write_checkpoint
from tests.convert.conversions import Refusal, contents, convert, flip_bit, save_random
from tests.ranks import ROOT
from tests.runs import environment, make_corpus

ENCODER_DECODER = {"magnetar.model.architecture": "encoder_decoder"}
CASES: dict[str, dict[str, Any]] = {
    "moe": {},
    "expert parallel": {"magnetar.model.moe.ep_size": 2, "zero_optimization.stage": 2},
    "dense": {"magnetar.model.moe": None},
    "untied": {"magnetar.model.tie_embeddings": False},
    "two stacks": ENCODER_DECODER,
    "shared": ENCODER_DECODER | {"magnetar.model.share_embeddings": True},
    "bf16": {"bf16.enabled": True, "zero_optimization.stage": 1},
    "fp16": {"fp16.enabled": True, "zero_optimization.stage": 1},
    "gated, linear": {"magnetar.model.activation": "swiglu", "magnetar.model.moe.router": "linear"},
    "monitors": {"csv_monitor": {"enabled": True, "output_path": "runs/x", "job_name": "csv"}},
}


class Made(NamedTuple):
    """A run that was written rather than trained, and its data."""

    folder: Path
    checkpoint: Checkpoint
    corpus: Path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def make_run(
    folder: Path, corpus: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any
) -> Made:
    """A run in a folder of its own, with the corpus's vocabulary and two checkpoints."""
    keys = {
        "magnetar.data.path": str(corpus),
        "magnetar.model.vocab_size": 301,
        "magnetar.model.max_seq_len": 16,
    }
    entries = {
        "tokenizer_fingerprint": read_manifest(corpus).tokenizer_fingerprint,
        "trainer": {
            "seconds": 0.1,
            "num_clipped": 3,
            "before": {"loss": 1 / 3, "perplexity": math.inf, "num_tokens": 7},
            "after": {},
        },
        "optimizer": {
            "step": 9,
            "schedule_step": 8,
            "skipped_steps": 1,
            "loss_scaler": {"cur_scale": 4096.0, "cur_iter": 9, "dynamic": True},
        },
    }
    write_checkpoint(folder / "run", 4, changes=keys | changes, seed=4, entries=entries)
    last = write_checkpoint(
        folder / "run", 9, changes=keys | changes, seed=9, entries=entries, tensors=tensors
    )
    return Made(folder / "run", last, corpus)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Made:
    return make_run(tmp_path_factory.mktemp("made"), corpus)


@pytest.fixture
def exported(tmp_path: Path, made: Made) -> Path:
    convert("export", made.folder, "--out", tmp_path / "exported")
    return tmp_path / "exported"


@pytest.mark.parametrize(
    "options", [(), ("--shard-size", "20KB"), ("--dtype", "bfloat16")], ids=str
)
@pytest.mark.parametrize("case", CASES)
def test_export_import_export_gives_the_same_bytes(
    tmp_path: Path, corpus: Path, case: str, options: tuple
) -> None:
    run = make_run(tmp_path, corpus, **CASES[case])
    one, two = tmp_path / "one", tmp_path / "two"
    convert("export", run.folder, "--out", one, *options)
    convert("import", one, "--out", tmp_path / "imported")
    convert("export", tmp_path / "imported", "--out", two, *options)
    assert contents(one) == contents(two)
    is_sharded = "--shard-size" in options
    assert (one / "model.safetensors").is_file() != is_sharded
    assert len(list(one.glob("model-*-of-*.safetensors"))) > 3 or not is_sharded


@pytest.mark.parametrize("case", CASES)
def test_float32_is_what_was_saved_to_the_last_bit(tmp_path: Path, corpus: Path, case: str) -> None:
    run = make_run(tmp_path, corpus, **CASES[case])
    convert("export", run.folder, "--out", tmp_path / "exported", "--shard-size", "30 KiB")
    config, tensors = load_weights(tmp_path / "exported")
    assert list(tensors) == list(run.checkpoint.shapes)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, run.checkpoint.tensor(name)), name
    assert config.moe is None or config.moe.ep_size == 1
    expected = load_checkpoint_model(run.checkpoint).state_dict()
    loaded = load_model(tmp_path / "exported").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_type_is_the_weights_rounded_once(tmp_path: Path, made: Made, dtype: str) -> None:
    convert("export", made.folder, "--out", tmp_path / "exported", "--dtype", dtype)
    for name, tensor in load_weights(tmp_path / "exported")[1].items():
        assert torch.equal(tensor, made.checkpoint.tensor(name).to(getattr(torch, dtype))), name


def test_numbers_that_are_none_are_converted_and_named(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    widths = {"attention.out_proj.bias": 32, "ffn.w1.bias": 64, "ffn.w2.bias": 32}
    tensors = {f"blocks.0.{name}": torch.full((n,), math.nan) for name, n in widths.items()}
    tensors |= {
        name: torch.full((32,), math.inf) for name in ("final_norm.weight", "final_norm.bias")
    }
    run, exported = make_run(tmp_path, corpus, tensors), tmp_path / "exported"
    for command in (
        ("export", run.folder, "--out", exported),
        ("import", exported, "--out", tmp_path / "imported"),
        ("densify", exported, "--mean", "--out", tmp_path / "dense"),
    ):
        convert(*command)
        lines = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
        assert all(line.startswith("warning ") for line in lines)
        assert len(lines) == 4, "three are named and the others counted"
        assert lines[1].endswith(" blocks.0.ffn.w1.bias: 64 of 64 values are not finite")
        assert lines[3].endswith(" 2 more tensors have values that are not finite")


def test_what_is_imported_is_the_run_without_moments(tmp_path: Path, made: Made) -> None:
    convert("export", made.folder, "--out", tmp_path / "exported")
    convert("import", tmp_path / "exported", "--out", tmp_path / "runs" / "again")
    folder = tmp_path / "runs" / "again"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.json"]
    (path,) = (folder / "checkpoints").iterdir()
    assert path.name == "step_00000009"
    manifest = json.loads((path / "manifest.json").read_text())
    there = made.checkpoint.manifest
    for key in ("step", "config", "tokenizer_fingerprint", "data_fingerprint", "trainer"):
        assert manifest[key] == there[key], key
    assert manifest["optimizer"] == there["optimizer"] | {"step": 0}
    assert {tuple(t["states"]) for t in manifest["tensors"].values()} == {(WEIGHT,)}
    config = json.loads((folder / "config.json").read_text())
    assert config["magnetar"]["training"].pop("run_dir") == str(folder)
    expected = json.loads(json.dumps(there["config"]))
    assert expected["magnetar"]["training"].pop("run_dir") == str(made.folder)
    assert config == expected


def test_the_command_for_training_fits_the_config(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, corpus, **CASES["expert parallel"])
    convert("export", run.folder, "--out", tmp_path / "exported")
    capsys.readouterr()
    convert("import", tmp_path / "exported", "--out", tmp_path / "a run")
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    config = tmp_path / "a run" / "config.json"
    assert words[2:] == ["magnetar", "train", str(config), "--num_gpus", "2"]
    assert check_config(json.loads(config.read_text()), 2)[1] == []
    # Sizes that are left open fit any number of ranks that holds the experts.
    file = tmp_path / "exported" / "config.json"
    text = json.loads(file.read_text())
    del text["run"]["config"]["train_micro_batch_size_per_gpu"]
    del text["sha256"]["config.json"]
    file.write_text(json.dumps(text))
    convert("import", tmp_path / "exported", "--out", tmp_path / "open")
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    config = tmp_path / "open" / "config.json"
    assert words[2:] == ["magnetar", "train", str(config), "--num_gpus", "2"]
    assert check_config(json.loads(config.read_text()), 2)[1] == []


def test_a_vocabulary_that_is_not_the_runs_is_not_imported(
    tmp_path: Path, exported: Path, refused: Refusal
) -> None:
    file = exported / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:-1])
    for command in (("import", exported, "--out", tmp_path / "again"), ("inspect", exported)):
        said = refused(*command)
        assert f"{file} is another vocabulary (sha256 " in said
        assert "than the run was trained with" in said
    assert not (tmp_path / "again").exists()
    file.unlink()  # the run reads its vocabulary from its data
    convert("import", exported, "--out", tmp_path / "again")


def test_the_checkpoint_that_is_named_is_exported(tmp_path: Path, made: Made) -> None:
    for name, out in (("step_00000004", "a"), ("step_00000009", "b")):
        convert("export", made.folder, "--checkpoint", name, "--out", tmp_path / out)
    convert("export", made.folder, "--out", tmp_path / "newest")
    convert("export", made.folder / "checkpoints" / "step_00000004", "--out", tmp_path / "by_path")
    assert contents(tmp_path / "a") != contents(tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "newest")
    assert contents(tmp_path / "a") == contents(tmp_path / "by_path")


def test_a_folder_of_weights_is_cut_anew(tmp_path: Path, made: Made, exported: Path) -> None:
    convert("export", exported, "--out", tmp_path / "shards", "--shard-size", "25KB")
    convert("export", tmp_path / "shards", "--out", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(exported)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        4 * t.numel() for t in load_weights(exported)[1].values()
    )


def test_the_same_text_from_the_run_and_from_the_folder(
    made: Made, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def text(folder: Path, seed: int = 3) -> str:
        options = ["--prompt", "the senate", "--tokens", "12", "--seed", str(seed)]
        generate.main([str(folder), *options])
        return capsys.readouterr().out

    convert("import", exported, "--out", tmp_path / "imported")
    convert("export", made.folder, "--out", tmp_path / "shards", "--shard-size", "20KB")
    capsys.readouterr()
    expected = text(made.folder)
    for folder in (exported, tmp_path / "imported", tmp_path / "shards"):
        assert text(folder) == expected
    assert text(exported, seed=4) != expected


def test_the_same_text_from_a_bf16_run(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, corpus, **CASES["bf16"])
    for dtype in ("float32", "bfloat16"):
        convert("export", run.folder, "--out", tmp_path / dtype, "--dtype", dtype)
    capsys.readouterr()
    texts = []
    for folder in (run.folder, tmp_path / "float32", tmp_path / "bfloat16"):
        generate.main([str(folder), "--prompt", "the senate", "--tokens", "12"])
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1


def test_the_same_loss_from_the_run_and_from_the_folder(
    made: Made, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    capsys.readouterr()
    for folder in (made.folder, exported):
        evaluate.main([str(folder), "--sequences", "8", "--json"])
        answers.append(json.loads(capsys.readouterr().out))
    assert [answer.pop("checkpoint") for answer in answers] == ["step_00000009", "exported"]
    assert [answer.pop("run") for answer in answers] == [str(made.folder), str(exported)]
    # Exact: the same operations on the same numbers, in one process.
    assert answers[0] == answers[1]


def test_the_script_in_the_folder_needs_no_deepspeed(
    tmp_path: Path, made: Made, exported: Path
) -> None:
    script = exported / "load.py"
    assert len(script.read_text().splitlines()) <= 10
    program = (
        "import runpy, sys, torch\n"
        "sys.modules['deepspeed'] = None  # importing it fails\n"
        f"sys.argv = ['load.py', '5', '17', '3']\n"
        f"found = runpy.run_path({str(script)!r})\n"
        f"torch.save(found['model'](found['tokens']).logits, {str(tmp_path / 'logits')!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        # As many threads as this process has (tests/conftest.py): the logits are equal in each bit.
        env=environment()
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tensor([[[")
    model = load_checkpoint_model(made.checkpoint).eval()
    with torch.no_grad():
        expected = model(torch.tensor([[5, 17, 3]])).logits
    assert torch.equal(torch.load(tmp_path / "logits"), expected)


def test_the_script_of_an_encoder_decoder_gives_it_both_inputs(
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(tmp_path, corpus, **CASES["shared"])
    convert("export", run.folder, "--out", tmp_path / "exported")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["load.py", "5", "17"])
    runpy.run_path(str(tmp_path / "exported" / "load.py"))
    tokens = torch.tensor([[5, 17]])
    expected = load_checkpoint_model(run.checkpoint).eval()(tokens, tokens).logits
    assert capsys.readouterr().out == f"{expected}\n"
    assert "  # the source, and the same tokens" in (tmp_path / "exported/load.py").read_text()


def test_the_tokenizer_is_found_elsewhere(tmp_path: Path, corpus: Path, refused: Refusal) -> None:
    moved = tmp_path / "moved"
    run = make_run(tmp_path, corpus, **{"magnetar.data.path": str(tmp_path / "gone")})
    said = refused("export", run.folder, "--out", tmp_path / "out")
    assert f"the vocabulary of {run.folder} is not there" in said
    assert f"{tmp_path / 'gone' / 'tokenizer.model'}" in said
    assert "start the command where training was started" in said
    assert "with --tokenizer" in said
    assert not (tmp_path / "out").exists()
    convert("export", run.folder, "--out", moved, "--tokenizer", corpus)
    assert (moved / "tokenizer.model").read_bytes() == (corpus / "tokenizer.model").read_bytes()
    convert("export", run.folder, "--out", tmp_path / "b", "--tokenizer", moved)
    assert contents(tmp_path / "b") == contents(moved)
    other = make_corpus(tmp_path / "other", vocab_size=310)
    said = refused("export", run.folder, "--out", tmp_path / "c", "--tokenizer", other)
    assert f"{other} is another vocabulary" in said
    assert "give the one that it was trained with, with --tokenizer" in said


@pytest.mark.parametrize("command", ["export", "import", "reshard"])
def test_a_file_that_is_too_large_leaves_nothing(
    command: str, tmp_path: Path, made: Made, exported: Path, refused: Refusal
) -> None:
    """A limit on the size of files stands for a full disk: both tell it while they write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        source = (made.folder, "--world-size", 2) if command == "reshard" else (exported,)
        said = refused(command, *source, "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path / 'out'}: File too large: raise the limit" in said
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_an_end_from_outside_leaves_nothing(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: object) -> None:
        assert len(list(tmp_path.glob(".out.*"))) == 1
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("magnetar.convert.run_folders.require_whole", ended)
    try:
        with pytest.raises(SystemExit) as stopped:
            convert("import", exported, "--out", tmp_path / "out")
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert stopped.value.code == 143
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


@pytest.mark.parametrize("command", ["export", "densify"])
def test_a_damaged_checkpoint_is_not_converted(
    command: str, tmp_path: Path, corpus: Path, refused: Refusal
) -> None:
    run = make_run(tmp_path, corpus)
    file = run.checkpoint.path / "rank_00001.safetensors"
    flip_bit(file, -5)
    options = ("--mean",) if command == "densify" else ()
    said = refused(command, run.folder, "--out", tmp_path / "out", *options)
    assert f"{file} is not what was saved" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("command", ["import", "inspect", "densify", "export", "generate"])
def test_an_altered_tensor_of_an_exported_folder_is_named(
    command: str,
    tmp_path: Path,
    exported: Path,
    capsys: pytest.CaptureFixture[str],
    refused: Refusal,
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    file = folder / "model.safetensors"
    flip_bit(file)
    options: tuple[object, ...] = () if command == "inspect" else ("--out", tmp_path / "out")
    if command == "generate":
        with pytest.raises(SystemExit) as ended:
            generate.main([str(folder), "--prompt", "the senate"])
        assert ended.value.code == 2
        said = capsys.readouterr().err
    else:
        said = refused(command, folder, *options, *(["--mean"] * (command == "densify")))
    assert f"{folder}: " in said
    assert "is not what was written (its sha256 differs)" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "exported"]


@pytest.mark.parametrize("keys", [{}, {"sha256": "none"}])
def test_hashes_may_be_missing_and_must_be_hashes(
    keys: dict, tmp_path: Path, exported: Path, refused: Refusal
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["sha256"]
    (folder / "config.json").write_text(json.dumps(config | keys))
    if keys:
        said = refused("import", folder, "--out", tmp_path / "out")
        assert f"{folder / 'config.json'}: sha256 is no object" in said
    else:
        convert("import", folder, "--out", tmp_path / "out")


def test_a_folder_of_weights_has_no_checkpoints(
    tmp_path: Path, exported: Path, refused: Refusal
) -> None:
    options = ("--checkpoint", "step_00000001")
    said = refused("export", exported, "--out", tmp_path / "out", *options)
    assert f"--checkpoint step_00000001: {exported} is a folder of weights" in said


def test_weights_of_no_run_cannot_be_imported(tmp_path: Path, refused: Refusal) -> None:
    save_random(tmp_path / "weights")
    said = refused("import", tmp_path / "weights", "--out", tmp_path / "run")
    assert "has no 'run', so it does not say which training" in said
    assert f"--set magnetar.training.init_from={tmp_path / 'weights'}" in said
    said = refused("import", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert f"run folder {tmp_path / 'nowhere'} does not exist" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run.step": -3}, "run.step=-3: it should be greater than or equal to 0: export it"),
        ({"run.step": "nine"}, 'run.step="nine": it should be a valid integer: export it again'),
        ({"run.config": None}, "run.config=null: it should be an object"),
        ({"run.config.magnetar.model.norm": "none"}, "magnetar.model.norm"),
        ({"model.dropout": 0.25}, "model.dropout is 0.25, and 0.0 in run.config"),
        ({"model.num_heads": 4}, "model.num_heads is 4, and 2 in run.config"),
        ({"run": 3}, "run=3: it should be an object: export it again"),
        ({"run": None}, "run=null: it should be an object: export it again"),
        ({"run.optimizer": {}}, "run.optimizer.schedule_step is missing: export it again"),
        ({"run.optimizer.skipped_steps": None}, "run.optimizer.skipped_steps=null: it should be"),
        ({"run.optimizer.loss_scaler": 3}, "run.optimizer.loss_scaler=3: it should be an object"),
        ({"run.trainer.num_clipped": "x"}, 'run.trainer.num_clipped="x": it should be'),
        ({"run.config.magnetar.data": None}, "run.config: it has no magnetar.data.path"),
        ({"run.trainer.epoch": 1}, "run.trainer.epoch is not a key that this version knows"),
    ],
    ids=str,
)
def test_a_run_that_is_described_wrongly_is_refused(
    tmp_path: Path, exported: Path, change: dict, message: str, capsys: Any, refused: Refusal
) -> None:
    from tests.engine.programs import with_keys

    file = exported / "config.json"
    text = json.loads(file.read_text())
    del text["sha256"]["config.json"]  # as before it had one
    file.write_text(json.dumps(with_keys(text, change)))
    for command in ("import", "inspect", "generate"):
        if command == "generate":
            with pytest.raises(SystemExit) as ended:
                generate.main([str(exported), "--prompt", "the senate"])
            assert ended.value.code == 2
            said = capsys.readouterr().err
        else:
            out = ("--out", tmp_path / "again") if command == "import" else ()
            said = refused(command, exported, *out)
        assert str(file) in said
        assert message in said
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("command", ["export", "import"])
def test_what_is_not_what_was_written_is_noticed(
    command: str,
    tmp_path: Path,
    made: Made,
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Refusal,
) -> None:
    """A bit flips between the writing and the reading."""
    from magnetar.engine.checkpoint import format as checkpoint_files
    from magnetar.models.weights import files as weight_files

    if command == "export":
        opened = weight_files.open_files

        def open_flipped(folder: Path) -> Any:
            flip_bit(folder / "model.safetensors", -3)
            return opened(folder)

        monkeypatch.setattr(weight_files, "open_files", open_flipped)
    else:
        flush = checkpoint_files.sync

        def flush_flipped(path: Path) -> None:
            if path.suffix == ".safetensors":
                flip_bit(path, -3)
            flush(path)

        monkeypatch.setattr(checkpoint_files, "sync", flush_flipped)
    source = made.folder if command == "export" else exported
    before = sorted(path.name for path in tmp_path.iterdir())
    said = refused(command, source, "--out", tmp_path / "out")
    assert "is not what was written: use another disk" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "nothing is left behind"


def test_generate_says_what_a_folder_lacks(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            generate.main([*map(str, arguments), "--prompt", "the"])
        assert ended.value.code == 2
        return capsys.readouterr().err

    save_random(tmp_path / "weights")
    message = said(tmp_path / "weights")
    assert f"{tmp_path / 'weights' / 'tokenizer.json'}): name the prepared folder" in message
    message = said(tmp_path / "weights", "--data", corpus)
    assert f"the vocabulary of {corpus} has 300 entries, and the model of" in message
    save_random(tmp_path / "large", vocab_size=300)
    generate.main([str(tmp_path / "large"), "--data", str(corpus), "--prompt", "the senate"])
    assert capsys.readouterr().out.startswith("the senate")
    (tmp_path / "large" / "model.safetensors").write_bytes(b"")
    assert "model.safetensors cannot be read" in said(tmp_path / "large", "--data", corpus)
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "weights")])
    assert "holds weights that no run has trained as they are" in capsys.readouterr().err
