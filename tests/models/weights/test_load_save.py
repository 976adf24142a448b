"""A folder of weights holds the model bit by bit, and nothing else is taken for one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from magnetar.models.config import ModelConfig
from magnetar.models.transformer import EncoderDecoder, Transformer, build_model, empty_model
from magnetar.models.weights.files import INDEX_FILE, WEIGHTS_FILE, in_memory
from magnetar.models.weights.load_save import (
    CONFIG_FILE,
    check_tensors,
    load_model,
    load_weights,
    open_weights,
    save_weights,
    tensor_shapes,
    write_weights,
)
from tests.models import brute_force

MOE = {"num_experts": 4, "every": 2}
CASES: dict[str, dict] = {
    "dense": {},
    "untied": {"tie_embeddings": False, "norm": "admin"},
    "moe": {"moe": MOE},
    "gated experts": {"moe": MOE | {"router": "linear"}, "activation": "swiglu", "norm": "pre"},
    "two stacks": {"architecture": "encoder_decoder", "attention_positions": "xpos_relative"},
    "shared": {"architecture": "encoder_decoder", "share_embeddings": True, "moe": MOE},
    "shared, untied": {
        "architecture": "encoder_decoder",
        "share_embeddings": True,
        "tie_embeddings": False,
    },
    "multiway": {"architecture": "encoder", "multiway": True, "norm": "normformer"},
    "features": {
        "architecture": "encoder",
        "output_projection": False,
        "tie_embeddings": False,
        "positions": "sinusoidal",
        "norm_eps": 1.2345678e-7,
    },
}


def config(**keys: object) -> ModelConfig:
    base = {
        "vocab_size": 23,
        "num_layers": 2,
        "d_model": 16,
        "d_ff": 24,
        "num_heads": 4,
        "max_seq_len": 12,
    }
    return ModelConfig.model_validate(base | keys)


def random_model(**keys: object) -> Transformer | EncoderDecoder:
    model = empty_model(config(**keys))
    brute_force.randomize(model)
    return model.eval()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the second names of tied tensors."""
    named = dict(model.named_parameters(remove_duplicate=False))
    seconds = set(named) - set(dict(model.named_parameters()))
    return {name: t for name, t in model.state_dict().items() if name not in seconds}


def logits(model: nn.Module) -> Tensor:
    tokens = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        return model(*(tokens,) * (2 if isinstance(model, EncoderDecoder) else 1)).logits


def saved(folder: Path, **keys: object) -> Path:
    model = random_model(**keys)
    save_weights(folder, model.config, tensors_of(model))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_a_model_survives_the_disk_bit_by_bit(
    tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    model = random_model(**CASES[case]).to(dtype)
    folder = tmp_path / "deep" / "folder"
    save_weights(folder, model.config, tensors_of(model))
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert [path.name for path in folder.parent.iterdir()] == ["folder"], "nothing is left beside"
    loaded_config, tensors = load_weights(folder)
    assert loaded_config == model.config
    assert tensors.keys() == tensors_of(model).keys()
    for name, tensor in tensors_of(model).items():
        assert tensors[name].dtype == dtype
        assert torch.equal(tensors[name], tensor), name
    loaded = load_model(folder)
    assert not any(module.training for module in loaded.modules())
    for name, parameter in loaded.named_parameters(remove_duplicate=False):
        assert parameter.dtype == dtype
        assert torch.equal(parameter, model.get_parameter(name)), name
    if not (dtype == torch.float64 and "moe" in CASES[case]):
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("case", CASES)
def test_what_is_tied_stays_tied_and_is_written_once(tmp_path: Path, case: str) -> None:
    folder = saved(tmp_path / "weights", **CASES[case])
    model, names = load_model(folder), set(load_file(folder / WEIGHTS_FILE))
    decoder = getattr(model, "decoder", model)
    prefix = "decoder." if decoder is not model else ""
    if model.config.output_projection:
        is_tied = decoder.output.weight is decoder.embedding.weight
        assert is_tied == model.config.tie_embeddings
        assert (f"{prefix}output.weight" in names) != is_tied
    if prefix:
        is_shared = model.encoder.embedding.weight is decoder.embedding.weight
        assert is_shared == model.config.share_embeddings
        assert ("encoder.embedding.weight" in names) != is_shared
    assert f"{prefix}embedding.weight" in names
    assert not any("sinusoid" in name or "rotary" in name for name in names)


def test_experts_are_written_one_by_one(tmp_path: Path) -> None:
    folder = saved(tmp_path / "weights", moe=MOE)
    written = load_file(folder / WEIGHTS_FILE)
    prefix = "blocks.1.ffn.deepspeed_moe.experts."
    names = {name.removeprefix(prefix) for name in written if name.startswith(prefix)}
    assert names == {
        f"deepspeed_experts.{expert}.{name}"
        for expert in range(4)
        for name in ("w1", "b1", "w2", "b2", "norm_weight", "norm_bias")
    }
    assert written[f"{prefix}deepspeed_experts.3.w1"].shape == (16, 24)


def test_a_model_trained_with_expert_parallelism_loads_on_one_rank(tmp_path: Path) -> None:
    whole = random_model(moe=MOE)
    spread = config(moe=MOE | {"ep_size": 2})
    assert tensor_shapes(spread) == tensor_shapes(whole.config)
    save_weights(tmp_path / "weights", spread, tensors_of(whole))
    assert torch.equal(logits(load_model(tmp_path / "weights")), logits(whole))


def test_tensors_of_several_types_make_a_float32_model(tmp_path: Path) -> None:
    model = random_model()
    tensors = tensors_of(model)
    tensors["embedding.weight"] = tensors["embedding.weight"].bfloat16()
    save_weights(tmp_path / "weights", model.config, tensors)
    loaded = load_model(tmp_path / "weights")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.embedding.weight, tensors["embedding.weight"].float())


def test_a_transposed_tensor_is_written_as_it_reads(tmp_path: Path) -> None:
    model = random_model()
    tensors = tensors_of(model)
    turned = torch.randn(24, 16).t().contiguous().t()
    tensors["blocks.0.ffn.w1.weight"] = turned
    save_weights(tmp_path / "weights", model.config, tensors)
    assert torch.equal(load_model(tmp_path / "weights").blocks[0].ffn.w1.weight, turned)


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    model = random_model()
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "thesis.txt").write_text("years of work")
    file.write_text("years of work")
    for path in (full, file):
        with pytest.raises(ValueError, match="exists and is not an empty folder") as caught:
            save_weights(path, model.config, tensors_of(model))
        assert str(path) in str(caught.value)
        assert "name another one" in str(caught.value)
    assert (full / "thesis.txt").read_text() == file.read_text() == "years of work"
    assert len(list(full.iterdir())) == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    save_weights(empty, model.config, tensors_of(model))
    load_model(empty)
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        save_weights(empty, model.config, tensors_of(model))


def test_tensors_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    model = random_model()
    for name, tensor in (("final_norm.weight", None), ("extra", torch.zeros(1))):
        tensors = tensors_of(model)
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
        with pytest.raises(ValueError, match="the tensors do not fit the model"):
            save_weights(tmp_path / "weights", model.config, tensors)
        assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_given: object, **_keys: object) -> None:
        raise OSError("disk full")

    model = random_model()
    monkeypatch.setattr(json, "dumps", fail)  # after the tensors are written
    with pytest.raises(OSError, match="disk full"):
        save_weights(tmp_path / "weights", model.config, tensors_of(model))
    assert list(tmp_path.iterdir()) == []


def test_every_kind_of_misfit_is_named_with_its_total() -> None:
    expected = {"a": (1, 2), "b": (3,), "c": (4,), "d": (5, 6), "e": ()}
    check_tensors(expected, dict(reversed(expected.items())))
    with pytest.raises(ValueError, match="the tensors do not fit the model: ") as caught:
        check_tensors(expected, {"a": (2, 1), "d": (6, 5), "e": (), "x": (), "y": (), "z": ()})
    assert str(caught.value) == (
        "the tensors do not fit the model: 2 missing, the first is b; 3 unexpected, the first is "
        "x; 2 of another shape, the first is a, (2, 1) where the model has (1, 2)"
    )
    for found, message in (
        ({"a": (1,)}, "1 of another shape, the first is a, (1,) where the model has (2,)"),
        ({}, "1 missing, the first is a"),
        ({"a": (2,), "b": (2,)}, "1 unexpected, the first is b"),
    ):
        with pytest.raises(ValueError, match="do not fit") as caught:
            check_tensors({"a": (2,)}, found)
        assert str(caught.value) == f"the tensors do not fit the model: {message}"


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "weights")
    (folder / name).unlink()
    with pytest.raises(ValueError, match="is missing, so") as caught:
        load_weights(folder)
    assert str(folder / name) in str(caught.value)
    assert "name one that magnetar convert has written" in str(caught.value)
    with pytest.raises(ValueError, match="is not a folder of weights"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'"model"',
        b"null",
        b"{}",
        b'{"model": null}',
        b'{"model": {"num_layers": 2}}',
        b"\xff\xfe\x00",
        "unknown",
        "no vocabulary",
    ],
    ids=str,
)
def test_a_damaged_config_is_named(tmp_path: Path, text: bytes | str) -> None:
    folder = saved(tmp_path / "weights")
    section = json.loads((folder / CONFIG_FILE).read_text())["model"]
    if text == "unknown":
        text = json.dumps({"model": section | {"depth": 3}}).encode()
    elif text == "no vocabulary":
        text = json.dumps({"model": section | {"vocab_size": None}}).encode()
    assert isinstance(text, bytes)
    (folder / CONFIG_FILE).write_bytes(text)
    with pytest.raises(ValueError, match="does not describe a model") as caught:
        load_weights(folder)
    assert str(folder / CONFIG_FILE) in str(caught.value)
    assert "convert it again" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "it holds no object, { ... }"),
        ("{}", "it has no key model with an object"),
        ({"num_layers": 0}, "model.num_layers=0: it should be greater than or equal to 1"),
        ({"num_layers": "two"}, 'model.num_layers="two": it should be a valid integer'),
        ({"moe": [1] * 90}, "1,...: it should be an object"),
        ({"depth": 3}, "model.depth is not a key that this version knows"),
        ({"vocab_size": None}, "model.vocab_size is null, and must be a number"),
        ({"num_heads": 3}, "must be a multiple of num_heads=3"),
        ('{"model": {}}', "model.num_layers is missing"),
        ('{"model": ' + "9" * 5000 + "}", "a number in it has thousands of digits"),
        ("[" * 100_000, "nested more than 50 deep"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_damaged_config_is_described_by_its_key_and_rule(
    tmp_path: Path, text: str | dict, words: str
) -> None:
    file = saved(tmp_path / "weights") / CONFIG_FILE
    section = json.loads(file.read_text())["model"]
    file.write_text(text if isinstance(text, str) else json.dumps({"model": section | text}))
    with pytest.raises(ValueError, match="does not describe a model") as caught:
        load_model(file.parent)
    message = str(caught.value)
    assert message.startswith(f"{file} does not describe a model (")
    assert message.endswith("): convert it again")
    assert words in message
    assert "\n" not in message
    assert not any(inner in message for inner in ("input_value", "https:", "'str' object"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_heads", 1), ("activation", "relu"), ("norm_eps", 1e-3), ("dropout", 0.5), ("about", 1)],
)
def test_a_config_that_is_not_what_was_written_is_refused(
    key: str, value: object, tmp_path: Path
) -> None:
    file = saved(tmp_path / "weights") / CONFIG_FILE
    keys = json.loads(file.read_text())
    (keys if key == "about" else keys["model"])[key] = value
    file.write_text(json.dumps(keys))
    with pytest.raises(ValueError, match=rf"{file} is not what was written \(its own sha256") as no:
        load_model(file.parent)
    assert 'remove the entry "config.json" of its key sha256' in str(no.value)
    del keys["sha256"][CONFIG_FILE]  # as the message says, and as older versions wrote it
    file.write_text(json.dumps(keys))
    load_model(file.parent)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "header"])
def test_a_damaged_file_of_tensors_is_named(tmp_path: Path, damage: str) -> None:
    folder = saved(tmp_path / "weights")
    path = folder / WEIGHTS_FILE
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": whole[: len(whole) // 2],
            "text": b"not a file of tensors, but long enough",
            "header": b"\xff" * 8 + whole[8:],
        }[damage]
    )
    with pytest.raises(ValueError, match=r"cannot be read \(") as caught:
        load_model(folder)
    assert str(path) in str(caught.value)
    assert "copy it again, or convert it again" in str(caught.value)
    path.write_bytes(whole)
    load_model(folder)


def test_weights_of_another_model_are_refused_by_the_files_name(tmp_path: Path) -> None:
    folder = saved(tmp_path / "weights")
    path = folder / WEIGHTS_FILE
    tensors = load_file(path)
    for change, message in (
        ({"final_norm.bias": None}, "1 missing, the first is final_norm.bias"),
        ({"more": torch.zeros(2)}, "1 unexpected, the first is more"),
        (
            {"final_norm.bias": torch.zeros(3)},
            r"1 of another shape, the first is final_norm.bias, \(3,\) where the model has \(16,\)",
        ),
    ):
        changed = {name: t for name, t in (tensors | change).items() if t is not None}
        save_file(changed, path)
        with pytest.raises(ValueError, match=message) as caught:
            load_model(folder)
        assert str(caught.value).startswith(f"{path}: the tensors do not fit the model")


@pytest.mark.parametrize("case", CASES)
def test_the_shapes_are_those_of_a_built_model(case: str) -> None:
    cfg = config(**CASES[case])
    expected = {name: t.shape for name, t in tensors_of(build_model(cfg, seed=0)).items()}
    assert tensor_shapes(cfg) == expected


@pytest.mark.parametrize("case", CASES)
def test_shards_hold_the_same_model(tmp_path: Path, case: str) -> None:
    model = random_model(**CASES[case])
    names = tensor_shapes(model.config)
    state = model.state_dict()
    tensors = in_memory({name: state[name] for name in reversed(names)})
    about = {"from": "elsewhere"}
    folder = tmp_path / "weights"
    write_weights(
        folder, model.config, tensors, shard_bytes=2000, about=about, other_files={"a": b"b"}
    )
    assert not (folder / WEIGHTS_FILE).exists()
    assert (folder / INDEX_FILE).is_file()
    assert (folder / "a").read_bytes() == b"b"
    found_config, found, found_about = open_weights(folder)
    assert (found_config, found_about) == (model.config, about)
    assert list(found.specs) == list(names), "in the model's order"
    assert torch.equal(logits(load_model(folder)), logits(model))


def test_what_is_written_does_not_depend_on_the_order_or_the_day(tmp_path: Path) -> None:
    model = random_model(moe=MOE)
    state = {name: model.state_dict()[name] for name in tensor_shapes(model.config)}
    for name, tensors in (("one", state), ("two", dict(reversed(state.items())))):
        write_weights(tmp_path / name, model.config, in_memory(tensors), shard_bytes=3000)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two
