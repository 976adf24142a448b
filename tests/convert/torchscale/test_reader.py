"""Files of TorchScale models: what is read from them, how ranks are joined, what is refused."""

import argparse
import errno
import fractions
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from magnetar.convert.torchscale.reader import read_checkpoint, read_options
from magnetar.data.errors import UserError

LAYER = "decoder.layers.0.moe_layer"


def save(path: Path, held: Any) -> Path:
    torch.save(held, path)
    return path


def tensor(*numbers: float) -> Tensor:
    return torch.tensor(numbers)


def write_ranks(folder: Path, experts_of: dict[int, list[float]], num_experts: int) -> Path:
    """A shared file and a file for each rank, whose experts hold one number each."""
    shared = {f"{LAYER}.gate.wg.weight": tensor(7.0)}
    args = argparse.Namespace(moe_expert_count=num_experts)
    for rank, numbers in experts_of.items():
        experts = {f"{LAYER}.experts.{i}.fc1.bias": tensor(n) for i, n in enumerate(numbers)}
        save(folder / f"c_last-rank-{rank}.pt", {"model": experts, "args": args, "cfg": None})
    return save(folder / "c_last-shared.pt", {"model": shared, "args": args, "cfg": None})


def experts_in(tensors: dict[str, Tensor]) -> dict[int, float]:
    return {
        int(name.split(".")[5]): value.item()
        for name, value in tensors.items()
        if ".experts." in name
    }


def test_every_kind_of_file_is_told_apart(tmp_path: Path) -> None:
    state, args = {"layers.0.x": tensor(1.0)}, argparse.Namespace(decoder_layers=3)
    model = argparse.Namespace(decoder_layers=3, dropout="${common.dropout}")
    cfg = {"model": model, "task": {"tokens_per_sample": 64, "data": "x"}}
    for held, kind, options in [
        (state, "tensors", None),
        ({"model": state, "epoch": 3}, "tensors", None),
        ({"module": state, "global_steps": 3}, "tensors", None),
        ({"state_dict": state, "config": {"decoder_layers": 3}}, "options", {"decoder_layers": 3}),
        ({"model": state, "config": args}, "namespace", {"decoder_layers": 3}),
        ({"model": state, "args": args}, "namespace", {"decoder_layers": 3}),
        ({"model": state, "args": args, "extra_state": {}}, "fairseq", {"decoder_layers": 3}),
        (
            {"model": state, "args": None, "cfg": cfg},
            "fairseq",
            {"decoder_layers": 3, "tokens_per_sample": 64},
        ),
    ]:
        checkpoint = read_checkpoint([save(tmp_path / "m.pt", held)])
        assert (checkpoint.kind, checkpoint.options) == (kind, options)
        assert checkpoint.tensors.keys() == state.keys()


WRAPPERS = [
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
]


@pytest.mark.parametrize("seed", range(8))
def test_what_wrappers_add_to_names_is_taken_off(seed: int, tmp_path: Path) -> None:
    """In any order and depth, in each of the files of a model."""
    draw = random.Random(seed)
    shared = write_ranks(tmp_path, {0: [0.0, 1.0], 1: [2.0, 3.0]}, 4)
    expected = read_checkpoint([shared]).tensors
    for path in tmp_path.iterdir():
        held = torch.load(path, weights_only=False)
        wrapped = {}
        for name, value in held["model"].items():
            parts = name.split(".")
            for wrapper in draw.choices(WRAPPERS, k=draw.randrange(5)):
                parts.insert(draw.randrange(len(parts)), wrapper)
            wrapped[".".join(parts)] = value
        save(path, held | {"model": wrapped})
    assert read_checkpoint([shared]).tensors == expected


def test_the_names_are_those_of_the_wrappers_themselves(tmp_path: Path) -> None:
    model = AveragedModel(nn.Sequential(nn.Linear(2, 3), checkpoint_wrapper(nn.Linear(3, 2))))
    model.module[0] = torch.compile(model.module[0])
    state = torch.compile(model).state_dict()
    assert any("_orig_mod.module.0._orig_mod.weight" in name for name in state)
    names = read_checkpoint([save(tmp_path / "m.pt", state)]).tensors.keys()
    assert names == {"0.weight", "0.bias", "1.weight", "1.bias", "n_averaged"}


def test_two_tensors_with_one_name_without_wrappers_are_refused(tmp_path: Path) -> None:
    state = {"layers.0.x": tensor(1.0), "_orig_mod.layers.0.x": tensor(1.0)}
    assert read_checkpoint([save(tmp_path / "m.pt", state)]).tensors.keys() == {"layers.0.x"}
    state["module.layers.0.x"] = tensor(2.0)
    with pytest.raises(UserError, match=r"m.pt: module.layers.0.x and another tensor are both lay"):
        read_checkpoint([save(tmp_path / "m.pt", state)])


def test_tensors_that_safetensors_wrote_once_have_all_their_names(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    metadata = {"output_projection.weight": "embed_tokens.weight", "format": "pt"}
    save_file({"embed_tokens.weight": tensor(1.0)}, path, metadata)
    tensors = read_checkpoint([path]).tensors
    assert torch.equal(tensors["output_projection.weight"], tensors["embed_tokens.weight"])


@pytest.mark.parametrize("given", ["shared", "a rank", "all"])
def test_experts_are_numbered_through_over_the_ranks(given: str, tmp_path: Path) -> None:
    shared = write_ranks(tmp_path, {0: [0.0, 1.0], 1: [2.0, 3.0], 2: [4.0, 5.0]}, 6)
    ranks = [tmp_path / f"c_last-rank-{rank}.pt" for rank in range(3)]
    paths = {"shared": [shared], "a rank": [ranks[1]], "all": [*ranks, shared]}[given]
    tensors = read_checkpoint(paths).tensors
    assert experts_in(tensors) == {number: float(number) for number in range(6)}
    assert tensors[f"{LAYER}.gate.wg.weight"].item() == 7.0


def test_more_ranks_than_experts_hold_equal_copies(tmp_path: Path) -> None:
    numbers = {rank: [float(rank % 3)] for rank in range(6)}
    tensors = read_checkpoint([write_ranks(tmp_path, numbers, 3)]).tensors
    assert experts_in(tensors) == {0: 0.0, 1: 1.0, 2: 2.0}
    # A copy stands in for the file of another rank.
    (tmp_path / "c_last-rank-1.pt").unlink()
    tensors = read_checkpoint([tmp_path / "c_last-shared.pt"]).tensors
    assert experts_in(tensors) == {0: 0.0, 1: 1.0, 2: 2.0}


def test_copies_of_an_expert_that_differ_are_refused(tmp_path: Path) -> None:
    shared = write_ranks(tmp_path, {0: [0.0], 1: [1.0], 2: [0.0], 3: [1.5]}, 2)
    with pytest.raises(
        UserError, match=r"rank-3.pt: its copy of expert 1 differs .* c_last-rank-1"
    ):
        read_checkpoint([shared])


@pytest.mark.parametrize(("missing", "num_experts"), [(1, 6), (2, 6), (0, 6)])
def test_a_missing_rank_file_is_named(missing: int, num_experts: int, tmp_path: Path) -> None:
    shared = write_ranks(tmp_path, {0: [0.0, 1.0], 1: [2.0, 3.0], 2: [4.0, 5.0]}, num_experts)
    (tmp_path / f"c_last-rank-{missing}.pt").unlink()
    expected = (
        f"c_last-rank-{missing}.pt: no such file, and no other one holds expert {2 * missing}"
    )
    with pytest.raises(UserError, match=expected):
        read_checkpoint([shared])


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    shared = write_ranks(tmp_path, {0: [0.0, 1.0], 1: [2.0]}, 4)
    with pytest.raises(UserError, match=r"rank-1.pt: holds the experts \[0\] of its rank, .* 2"):
        read_checkpoint([shared])
    write_ranks(tmp_path, {0: [0.0], 1: [1.0]}, 2)
    held = {"model": {f"{LAYER}.gate.wg.weight": tensor(8.0)}, "args": None}
    save(tmp_path / "c_last-rank-1.pt", held)
    with pytest.raises(
        UserError, match=r"rank-1.pt: .*gate.wg.weight differs from the one in c_la"
    ):
        read_checkpoint([shared])


def test_parts_are_given_together_and_once(tmp_path: Path) -> None:
    whole, rank = save(tmp_path / "m.pt", {"x": tensor(1.0)}), tmp_path / "c_last-rank-0.pt"
    save(rank, {"model": {f"{LAYER}.experts.0.fc1.bias": tensor(1.0)}})
    (tmp_path / "other").mkdir()
    again = save(tmp_path / "other" / "c_last-rank-0.pt", {"model": {"x": tensor(1.0)}})
    shard = save(tmp_path / "c_last-rank-0-shard1.pt", {"x": tensor(1.0)})
    for paths, message in [
        ([tmp_path / "none.pt"], "none.pt: no such file: give the checkpoint's path"),
        ([whole, whole], "m.pt: 2 files are given that are not the parts of one model"),
        ([rank], "c_last-shared.pt: no such file: c_last-rank-0.pt holds one rank's experts"),
        ([rank, again], "c_last-rank-0.pt: rank 0 is given twice"),
        ([shard], "c_last-rank-0-shard1.pt: one of the shards that fairseq's FSDP writes"),
    ]:
        with pytest.raises(UserError, match=message):
            read_checkpoint(paths)
    shared = write_ranks(tmp_path, {}, 4)
    rank.unlink()
    with pytest.raises(UserError, match=r"c_last-shared.pt: c_last-rank-0.pt and the files of the"):
        read_checkpoint([shared])


def test_objects_that_could_run_code_need_trust(tmp_path: Path) -> None:
    state = {"layers.0.x": tensor(1.0)}
    path = save(tmp_path / "m.pt", {"model": state, "when": fractions.Fraction(1, 2)})
    with pytest.raises(UserError, match=r"m.pt: holds a fractions.Fraction, .* add --trust"):
        read_checkpoint([path])
    assert read_checkpoint([path], trust=True).tensors.keys() == state.keys()


class Gone:
    """A class that is not there any more when its object is read."""


def test_an_object_whose_class_is_gone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "m.pt", {"model": {"x": tensor(1.0)}, "config": Gone()})
    monkeypatch.delattr(f"{__name__}.Gone")
    with pytest.raises(UserError, match=r"m.pt: holds an object whose class is not here .*Gone"):
        read_checkpoint([path], trust=True)


def test_files_that_hold_no_tensors_by_name_are_refused(tmp_path: Path) -> None:
    for held, message in [
        (tensor(1.0), "holds a Tensor, not tensors by name"),
        ({}, "holds no tensors"),
        ({"epoch": 3}, "'epoch' is of type int, not a tensor"),
        ({"model": {"x": tensor(1.0), "y": 2}}, "'y' is of type int, not a tensor"),
    ]:
        with pytest.raises(UserError, match=message):
            read_checkpoint([save(tmp_path / "m.pt", held)])
    with pytest.raises(UserError, match=r"holds a torch.nn.modules.linear.Linear"):
        read_checkpoint([save(tmp_path / "m.pt", nn.Linear(1, 1))])


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.pt", {"x": torch.zeros(1000)}).read_bytes()
    cuts = (1, 10, 22, 200, len(whole) // 2, len(whole) - 3)
    broken = [whole[:-cut] for cut in cuts] + [whole[:500] + whole[700:]]
    for content in (b"", b"version https://git-lfs.github.com/spec/v1", *broken):
        (tmp_path / "m.pt").write_bytes(content)
        for trust in (False, True):
            with pytest.raises(UserError, match=r"m.pt: is not a whole file that torch.save wrote"):
                read_checkpoint([tmp_path / "m.pt"], trust=trust)
    (tmp_path / "m.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(UserError, match=r"m.safetensors: cannot be read as safetensors"):
        read_checkpoint([tmp_path / "m.safetensors"])


@pytest.mark.filterwarnings("ignore")
def test_wrong_bytes_end_in_a_message_and_in_nothing_else(tmp_path: Path) -> None:
    path, draw = tmp_path / "m.pt", random.Random(0)
    refused = 0
    for zipped in (True, False):
        held = {"x": torch.zeros(9, 9), "y": torch.ones(5)}
        torch.save(held, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for _ in range(400):
            content = bytearray(whole)
            for _ in range(draw.choice([1, 3, 20])):
                content[draw.randrange(len(whole))] = draw.randrange(256)
            path.write_bytes(content)
            try:
                for read in read_checkpoint([path]).tensors.values():
                    read.sum()
            except UserError:
                refused += 1
    assert refused > 200


@pytest.mark.parametrize("error", [AssertionError, MemoryError, OSError, struct.error])
def test_whatever_damage_raises_says_that_the_file_is_damaged(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "m.pt", {"x": tensor(1.0)})
    monkeypatch.setattr(torch, "load", raising(error("wrong")))
    with pytest.raises(UserError, match=r"m.pt: is not a whole file that torch.save wrote"):
        read_checkpoint([path])


def test_a_file_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "m.pt", {"x": tensor(1.0)})
    monkeypatch.setattr(torch, "load", raising(PermissionError(errno.EACCES, "Not yours")))
    with pytest.raises(UserError, match=r"m.pt: cannot be read \(Not yours\): ask its owner"):
        read_checkpoint([path])


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("strange", "kind"),
    [
        (torch.eye(3).to_sparse(), "a sparse_coo tensor"),
        (torch.zeros(3, device="meta"), "a meta tensor, a shape without numbers"),
        (torch.zeros(3, dtype=torch.complex64), "of type complex64"),
        (torch.zeros(3, dtype=torch.int64), "of type int64"),
        (torch.zeros(3, dtype=torch.bool), "of type bool"),
        (torch.zeros(3).to(torch.float8_e4m3fn), "of type float8_e4m3fn"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(
    strange: Tensor, kind: str, tmp_path: Path
) -> None:
    state = {"a": tensor(1.0), "b": strange, "c": strange}
    expected = f"m.pt: b is {kind}, and every tensor of a model must be a dense one of a floating"
    with pytest.raises(UserError, match=expected):
        read_checkpoint([save(tmp_path / "m.pt", state)])
    # Not even where two files' copies would be compared.
    shared = save(tmp_path / "c_last-shared.pt", {"model": {"b": strange}})
    save(tmp_path / "c_last-rank-0.pt", {"model": {"b": strange}})
    with pytest.raises(UserError, match=f"c_last-shared.pt: b is {kind}"):
        read_checkpoint([shared])
    # What is no weight may be of any type.
    state = {"a": tensor(1.0), "decoder.version": strange}
    assert read_checkpoint([save(tmp_path / "m.pt", state)]).tensors.keys() == state.keys()


def test_options_are_read_from_json(tmp_path: Path) -> None:
    path = tmp_path / "o.json"
    for start in (b"", b"\xef\xbb\xbf"):  # a byte order mark, as Windows' editors save it
        path.write_bytes(start + b'{"decoder_layers": 3}')
        assert read_options(path) == {"decoder_layers": 3}
    with pytest.raises(UserError, match=r"none.json: no such file"):
        read_options(tmp_path / "none.json")
    with pytest.raises(UserError, match=f"{tmp_path.name}: is a folder: give the JSON"):
        read_options(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "Expecting property name"),
        (b"[1]", "it holds no object"),
        (b'{"activation_fn": "g\xe9lu"}', "it is not UTF-8 text .byte 20."),
        ('{"decoder_layers": 3}'.encode("utf-16"), "it is not UTF-8 text"),
        (b"[" * 100_000 + b"]" * 100_000, "nested more than"),
        (b'{"decoder_layers": ' + b"9" * 5000 + b"}", "thousands of digits"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_options_that_are_no_json_are_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "o.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"o.json: is no JSON of .*{problem}.*: write them by nam"):
        read_options(tmp_path / "o.json")
