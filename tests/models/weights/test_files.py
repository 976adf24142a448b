"""Tensors in files: the bytes that safetensors writes, whole and in shards."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from magnetar.models.weights.files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    LazyTensors,
    Spec,
    as_type,
    grouped,
    has_weights,
    in_memory,
    open_files,
    write_files,
)


def some_tensors() -> dict[str, Tensor]:
    """Of all types and of odd shapes, in an order that is not the alphabet's."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"z": (3, 5), "b.10": (7,), "b.9": (1, 2, 3), "scalar": (), "none": (0, 4), "ä": (2,)}
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return {
        f"{name}.{dtype}": torch.randn(shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
        for dtype in dtypes
    }


def test_the_bytes_are_those_of_safetensors_itself(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_files(tmp_path, in_memory(tensors))
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("shard_bytes", [1, 40, 100, 10**6])
def test_shards_hold_every_tensor_once(tmp_path: Path, shard_bytes: int) -> None:
    tensors = some_tensors()
    write_files(tmp_path, in_memory(tensors), shard_bytes)
    assert has_weights(tmp_path)
    found = open_files(tmp_path)
    assert set(found.specs) == set(tensors)
    for name, tensor in tensors.items():
        assert found.specs[name] == Spec(tensor.dtype, tuple(tensor.shape))
        assert torch.equal(found.read(name), tensor)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if shard_bytes == 10**6:
        assert files == [WEIGHTS_FILE]
        return
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    count = len(files)
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    held = {name: file for file in files for name in load_file(tmp_path / file)}
    assert index["weight_map"] == held
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    for file in files:
        shard = load_file(tmp_path / file)
        assert sum(t.nbytes for t in shard.values()) <= shard_bytes or len(shard) == 1


def test_groups_keep_the_order_and_only_one_large_tensor_exceeds_the_limit() -> None:
    sizes = {"a": 3, "b": 4, "c": 20, "d": 1, "e": 9, "f": 1}
    assert grouped(sizes, 10) == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    assert grouped(sizes, None) == [list(sizes)]
    assert grouped({}, 10) == [[]]


def test_each_tensor_is_made_once_and_read_back_once(tmp_path: Path) -> None:
    tensors = some_tensors()
    made, seen = [], []

    def read(name: str) -> Tensor:
        made.append(name)
        return tensors[name]

    def watch(doing: str, names: list[str]) -> list[str]:
        seen.append((doing, sorted(names)))
        return names

    write_files(tmp_path, LazyTensors(in_memory(tensors).specs, read), 100, watch)
    assert sorted(made) == sorted(tensors)
    assert seen == [("writing", sorted(tensors)), ("checking", sorted(tensors))]


def test_numbers_that_were_not_finite_stay_so_in_another_type() -> None:
    tensor = torch.tensor([torch.nan, -torch.inf, 1.0])
    converted = as_type(in_memory({"a": tensor}), torch.float16).read("a")
    assert converted[0].isnan()
    assert converted.dtype == torch.float16
    assert converted[1:].tolist() == [-torch.inf, 1.0]
    with pytest.raises(ValueError, match=r"a reaches 1e\+06, and float16 ends at 65504: use"):
        as_type(in_memory({"a": torch.full((2,), 1e6)}), torch.float16).read("a")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_files(tmp_path, in_memory({"a": torch.ones(3), "b": torch.ones(4)}), 1)
    return tmp_path


def test_a_shard_that_is_missing_or_cut_is_named(shards: Path) -> None:
    second = shards / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    for content in (b"", whole[:-1]):
        second.write_bytes(content)
        with pytest.raises(ValueError, match=r"00002-of-00002.safetensors cannot be read \("):
            open_files(shards)
    second.unlink()
    with pytest.raises(
        ValueError,
        match=r"00002.safetensors cannot be read \(No such file or directory\): make it",
    ):
        open_files(shards)


def test_an_index_that_does_not_fit_the_shards_is_refused(shards: Path) -> None:
    save_file({"b": torch.ones(4), "c": torch.ones(1)}, shards / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"00002.safetensors holds c, and .* says otherwise"):
        open_files(shards)
    save_file({"c": torch.ones(1)}, shards / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"00002.safetensors does not hold b, and"):
        open_files(shards)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", r"cannot be read \(.*\)"),
        (b"\xff", r"cannot be read \(.*\)"),
        (b"[" * 100_000, r"cannot be read \(.*nested more than 50 deep"),
        (b"[]", r"cannot be read \(it holds no object"),
        (b"{}", "has no object weight_map"),
        (b'{"weight_map": 3}', "has no object weight_map"),
        (b'{"weight_map": {"a": 3}}', "has no object weight_map"),
        (b'{"weight_map": {"a": "../a"}}', "has no object weight_map of .* files beside it"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_damaged_index_is_named(shards: Path, text: bytes, problem: str) -> None:
    (shards / INDEX_FILE).write_bytes(text)
    with pytest.raises(ValueError, match=rf"index.json {problem}.*: copy it again, or"):
        open_files(shards)


def test_shards_without_their_index_are_weights_that_lack_it(shards: Path) -> None:
    (shards / INDEX_FILE).unlink()
    assert has_weights(shards)
    with pytest.raises(ValueError, match=r"index.json is missing, which says .*: copy it again"):
        open_files(shards)


def test_a_type_that_no_model_has_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3, dtype=torch.int8)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"a is of type I8, where a model has F64, F32, BF16, F16"):
        open_files(tmp_path)
