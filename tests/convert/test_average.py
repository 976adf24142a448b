"""The mean of several checkpoints is the mean of their weights, in a folder that loads."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from magnetar.convert.average import average, mean_of
from magnetar.data.errors import UserError
from magnetar.data.text.token_files import read_manifest
from magnetar.engine.checkpoint.open_run import open_run
from magnetar.launchers.convert import main
from magnetar.models.weights.files import in_memory
from magnetar.models.weights.load_save import load_model, load_weights, open_weights, save_weights
from tests.convert.checkpoints import run_config, small_model, write_checkpoint
from tests.convert.conversions import flip_bit
from tests.runs import make_corpus


def three_steps(run_dir: Path, **keys: Any) -> list[dict[str, torch.Tensor]]:
    """A run of three checkpoints; their weights."""
    for seed in (1, 2, 3):
        write_checkpoint(run_dir, step=seed * 10, seed=seed, **keys)
    config = run_config(run_dir, changes=keys.get("changes"))
    return [small_model(config, seed) for seed in (1, 2, 3)]


def means(models: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([m[name].double() for m in models]).mean(0) for name in models[0]}


def require_mean(out: Path, models: list[dict[str, torch.Tensor]]) -> None:
    _, tensors = load_weights(out)
    expected = means(models)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        # Exact: a float64 holds the sum of a few float32 numbers of like size, whatever its order,
        # and the mean is rounded once.
        assert torch.equal(tensor, expected[name].float()), name


def test_the_newest_checkpoints_of_a_run(tmp_path: Path) -> None:
    models = three_steps(tmp_path / "run")
    lines = average([tmp_path / "run"], tmp_path / "out", 2, None)
    require_mean(tmp_path / "out", models[1:])
    assert lines[0].endswith("step_00000020")
    assert lines[1].endswith("step_00000030")
    model = load_model(tmp_path / "out")
    assert model(torch.arange(8).view(1, 8)).logits.shape == (1, 8, 97)


def test_named_checkpoints_in_any_layout(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    models = [small_model(config, seed) for seed in (1, 2)]
    other = {"magnetar.model.moe.ep_size": 4, "zero_optimization.stage": 2}
    first = write_checkpoint(tmp_path / "a", seed=1)
    write_checkpoint(tmp_path / "b", seed=2, world_size=4, changes=other)
    average([first.path, tmp_path / "b"], tmp_path / "out", None, None)
    require_mean(tmp_path / "out", models)


def test_folders_of_weights_and_a_checkpoint(tmp_path: Path) -> None:
    models = three_steps(tmp_path / "run")
    config = run_config(tmp_path).model
    save_weights(tmp_path / "weights", config, models[0])
    average([tmp_path / "weights", tmp_path / "run"], tmp_path / "out", None, 100_000)
    require_mean(tmp_path / "out", [models[0], models[2]])
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_the_type_is_the_sources(tmp_path: Path) -> None:
    models = three_steps(tmp_path / "run")
    config = run_config(tmp_path).model
    for index, model in enumerate(models):
        halves = {name: tensor.bfloat16() for name, tensor in model.items()}
        save_weights(tmp_path / f"half_{index}", config, halves)
    halves = [open_run(tmp_path / f"half_{index}") for index in range(3)]
    name = "blocks.0.ffn.w1.weight"
    expected = means([{name: m[name].bfloat16()} for m in models])[name]
    assert torch.equal(mean_of(halves).read(name), expected.bfloat16())  # exact as above
    mixed = mean_of([halves[0], open_run(tmp_path / "run")])
    assert {spec.dtype for spec in mixed.specs.values()} == {torch.float32}
    both = [{name: models[0][name].bfloat16()}, {name: models[2][name]}]
    assert torch.equal(mixed.read(name), means(both)[name].float())


def test_sums_do_not_lose_small_differences() -> None:
    """2^24 + 1 is no float32, so a sum in float32 would lose the ones."""
    values = [torch.tensor([2.0**24]), torch.ones(1), torch.ones(1), torch.ones(1)]
    sources: list[Any] = [SimpleNamespace(tensors=in_memory({"x": v})) for v in values]
    assert float(mean_of(sources).read("x")) == (2**24 + 3 + 1) / 4  # to the nearest float32


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    fingerprint = read_manifest(corpus).tokenizer_fingerprint
    for step in (1, 2):
        write_checkpoint(
            tmp_path / "run",
            step=step,
            changes={"magnetar.data.path": str(corpus)},
            entries={"tokenizer_fingerprint": fingerprint},
        )
    lines = average([tmp_path / "run"], tmp_path / "out", 2, None)
    assert lines[2] == f"wrote     {tmp_path / 'out'}"
    name = read_manifest(corpus).tokenizer_file
    assert (tmp_path / "out" / name).read_bytes() == (corpus / name).read_bytes()


def refusal(paths: list[Path], out: Path, last: int | None = None) -> str:
    with pytest.raises(UserError) as refused:
        average(paths, out, last, None)
    assert not out.exists() or list(out.iterdir())
    return str(refused.value)


def test_another_model_is_refused_by_its_first_key(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = write_checkpoint(tmp_path / "a")
    changes = {"magnetar.model.d_ff": 96, "magnetar.model.norm": "pre"}
    other = write_checkpoint(tmp_path / "b", changes=changes)
    message = refusal([tmp_path / "a", tmp_path / "b"], out)
    assert f"{other.path} has another model than {first.path}" in message
    assert "magnetar.model.d_ff is 96, not 64: average checkpoints of one model" in message
    assert "norm" not in message


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a")
    write_checkpoint(tmp_path / "b", entries={"tokenizer_fingerprint": "c" * 64})
    message = refusal([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert "step_00000005 was trained with another vocabulary (sha256 " in message


def test_too_few_or_too_many_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = (write_checkpoint(tmp_path / "run", step=step) for step in (1, 2))
    run = tmp_path / "run"
    assert f"{run} alone has no mean" in refusal([run], out)
    for last in (-1, 0, 1, 3):
        assert f"--last {last}: {run} has 2 checkpoints" in refusal([run], out, last)
    assert "not of 2 folders: name one run" in refusal([first.path, second.path], out, 2)
    assert "step_00000001, which is no run" in refusal([first.path], out, 2)
    for twice in ([first.path, second.path, first.path], [run, second.path]):
        assert f"{twice[-1]} is named twice: name each checkpoint once" in refusal(twice, out)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_checkpoint(tmp_path / "run", step=1)
    second = write_checkpoint(tmp_path / "run", step=2)
    file = second.path / "rank_00000.safetensors"
    flip_bit(file)
    assert f"{file} is not what was saved" in refusal([tmp_path / "run"], out, 2)
    (second.path / "manifest.json").unlink()
    assert f"{second.path}: holds no complete checkpoint" in refusal([tmp_path / "run"], out, 2)


def test_the_command_averages(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    models = three_steps(tmp_path / "run")
    main(["average", str(tmp_path / "run"), "--last", "3", "--out", str(tmp_path / "out")])
    wrote = f"wrote     {tmp_path / 'out'}, without a tokenizer, which is not where the run read it"
    assert wrote in capsys.readouterr().out
    require_mean(tmp_path / "out", models)
    config, _, _ = open_weights(tmp_path / "out")
    assert config.moe is not None
    assert config.moe.ep_size == 1
