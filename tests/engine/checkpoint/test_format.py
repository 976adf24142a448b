"""Whatever happens to a checkpoint's files is found and named, and nothing of it is loaded."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from magnetar.convert.inspect import inspect
from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.format import (
    MANIFEST,
    checkpoint_folders,
    complete_checkpoints,
    damaged_files,
    manifest_digest,
    newest_checkpoint,
    read_checkpoint,
    remove_old,
    step_of,
)
from magnetar.engine.checkpoint.open_run import load_model
from tests.convert.checkpoints import write_checkpoint
from tests.ranks import run_on_ranks

EXPERTS = "weight/blocks.1.ffn.deepspeed_moe.experts.deepspeed_experts"
NUM_RANKS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two whole checkpoints, steps 3 and 5."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    # Three ranks divide every tensor evenly: their files have the same tensors of the same shapes.
    changes = {
        "train_batch_size": 6,
        "magnetar.model.vocab_size": 96,
        "magnetar.model.d_model": 48,
        "magnetar.model.d_ff": 72,
        "magnetar.model.moe.num_experts": 3,
        "magnetar.model.moe.router": "linear",
    }
    for step in (3, 5):
        write_checkpoint(folder, step=step, world_size=NUM_RANKS, changes=changes, seed=step)
    return folder


def flip(path: Path, position: int, bit: int) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def tensor_bytes(path: Path) -> tuple[int, dict[str, tuple[int, int]]]:
    """Where a .safetensors file's tensors begin, and where each lies from there on."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return 8 + length, {name: tuple(entry["data_offsets"]) for name, entry in header.items()}


# Each takes a checkpoint's folder and draws, and returns the files that it has damaged.
def a_bit_anywhere(folder: Path, draw: random.Random) -> list[Path]:
    path = draw.choice(sorted(folder.iterdir()))
    flip(path, draw.randrange(path.stat().st_size), draw.randrange(8))
    return [path]


def a_bit_of_the_manifest(folder: Path, draw: random.Random) -> list[Path]:
    path = folder / MANIFEST
    flip(path, draw.randrange(path.stat().st_size), draw.randrange(8))
    return [path]


def a_bit_of_a_header(folder: Path, draw: random.Random) -> list[Path]:
    path = draw.choice(sorted(folder.glob("*.safetensors")))
    flip(path, draw.randrange(tensor_bytes(path)[0]), draw.randrange(8))
    return [path]


def a_bit_of_a_tensor(folder: Path, draw: random.Random) -> list[Path]:
    path = draw.choice(sorted(folder.glob("*.safetensors")))
    start, tensors = tensor_bytes(path)
    first, last = draw.choice(sorted(tensors.values()))
    flip(path, start + draw.randrange(first, last), draw.randrange(8))
    return [path]


def zeros(folder: Path, draw: random.Random) -> list[Path]:
    path = draw.choice(sorted(folder.glob("*.safetensors")))
    content = bytearray(path.read_bytes())
    first = draw.randrange(tensor_bytes(path)[0], len(content) - 5_000)
    content[first : first + 4096] = bytes(4096)
    path.write_bytes(content)
    return [path]


def cut(folder: Path, draw: random.Random) -> list[Path]:
    path = draw.choice(sorted(folder.iterdir()))
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size - 1)])
    return [path]


def emptied(folder: Path, draw: random.Random) -> list[Path]:
    path = draw.choice(sorted(folder.iterdir()))
    path.write_bytes(b"")
    return [path]


def grown(folder: Path, draw: random.Random) -> list[Path]:
    path = draw.choice(sorted(folder.iterdir()))
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 100)))
    return [path]


def removed(folder: Path, draw: random.Random) -> list[Path]:
    path = draw.choice(sorted(folder.iterdir()))
    path.unlink()
    return [path]


def two_experts_swapped(folder: Path, draw: random.Random) -> list[Path]:
    path = draw.choice(sorted(folder.glob("*.safetensors")))
    start, tensors = tensor_bytes(path)
    first, second = draw.sample(range(3), 2)
    parameter = draw.choice(("w1", "w2"))
    content = bytearray(path.read_bytes())
    names = [
        next(name for name in tensors if name.startswith(f"{EXPERTS}.{expert}.{parameter}/"))
        for expert in (first, second)
    ]
    (a, b), (c, d) = (tensors[name] for name in names)
    a, b, c, d = start + a, start + b, start + c, start + d
    content[a:b], content[c:d] = content[c:d], content[a:b]
    path.write_bytes(content)
    return [path]


def two_files_swapped(folder: Path, draw: random.Random) -> list[Path]:
    first, second = draw.sample(sorted(folder.glob("*.safetensors")), 2)
    kept = first.read_bytes()
    shutil.copyfile(second, first)
    second.write_bytes(kept)
    return [first, second]


DAMAGES: list[Callable[[Path, random.Random], list[Path]]] = [
    *[a_bit_anywhere] * 20,
    *[a_bit_of_the_manifest] * 12,
    *[a_bit_of_a_header] * 10,
    *[a_bit_of_a_tensor] * 14,
    *[zeros] * 6,
    *[cut] * 10,
    *[emptied] * 3,
    *[grown] * 5,
    *[removed] * 5,
    *[two_experts_swapped] * 9,
    *[two_files_swapped] * 6,
]


def damaged_copy(run: Path, folder: Path, number: int) -> tuple[Path, list[Path]]:
    """A copy of the run whose newest checkpoint is damaged; its folder and the damaged files."""
    shutil.copytree(run, folder)
    newest = folder / "checkpoints" / "step_00000005"
    before = {path: path.read_bytes() for path in newest.iterdir()}
    damaged = DAMAGES[number](newest, random.Random(number))
    after = {path: path.read_bytes() for path in newest.iterdir()}
    changed = [path for path in before if after.get(path) != before[path]]
    assert sorted(changed) == sorted(damaged)
    return newest, damaged


def test_there_are_a_hundred() -> None:
    assert len(DAMAGES) == 100


def test_whole_checkpoints_are_loaded(run: Path) -> None:
    for checkpoint in complete_checkpoints(run):
        assert damaged_files(checkpoint) == []
        assert inspect(checkpoint.path).damaged == []
        load_model(checkpoint)


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_every_damage_is_found_and_named_and_nothing_loaded(
    number: int, run: Path, tmp_path: Path
) -> None:
    newest, damaged = damaged_copy(run, tmp_path / "run", number)
    for action in (_inspected, _loaded):
        message = action(newest)
        for path in damaged:
            assert str(path) in message
    if (newest / MANIFEST) not in damaged:
        lines = damaged_files(read_checkpoint(newest))
        assert [line.partition(" ")[0] for line in lines] == [str(path) for path in sorted(damaged)]
        even, odd = (damaged_files(read_checkpoint(newest), part, 2) for part in range(2))
        assert sorted(even + odd) == sorted(lines)  # as two ranks share the work


def _inspected(folder: Path) -> str:
    """What `inspect` says of a damaged checkpoint, of whose tensors it shows nothing."""
    try:
        contents = inspect(folder)
    except UserError as error:
        return str(error)
    assert contents.damaged
    assert contents.groups == contents.layers == contents.tensors == []
    return "\n".join(contents.damaged)


def _loaded(folder: Path) -> str:
    """How a damaged checkpoint is refused."""
    with pytest.raises(UserError) as refused:
        load_model(read_checkpoint(folder))
    return str(refused.value)


@pytest.mark.slow
def test_training_takes_the_one_before_and_says_what_was_wrong(run: Path, tmp_path: Path) -> None:
    every = [damaged_copy(run, tmp_path / f"{number}", number) for number in range(len(DAMAGES))]
    runs = [newest.parent.parent for newest, _ in every]
    answers = run_on_ranks("tests.engine.programs:newest_whole_checkpoints", 2, runs)
    for (newest, damaged), *of_ranks in zip(every, *answers, strict=True):
        assert [step for step, _ in of_ranks] == [3, 3], of_ranks
        warned = of_ranks[0][1]
        for path in damaged:
            # Without reading everything it is only known that a file is missing or truncated.
            assert str(path) in warned or f"{newest}: a file is missing" in warned


@pytest.mark.parametrize("name", ["rank_00001.safetensors", MANIFEST])
def test_a_file_of_another_step_is_found(name: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_00000005"
    shutil.copyfile(newest.parent / "step_00000003" / name, newest / name)
    assert str(newest / name) in _inspected(newest)
    assert str(newest / name) in _loaded(newest)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"format": 2', '"format": 3'), ('"format"', '"formau"'), ('"sha256": "', '"sha257": "')],
)
def test_an_altered_manifest_is_damage_and_no_other_version(
    old: str, new: str, run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest = copy / "checkpoints" / "step_00000005" / MANIFEST
    before, last, after = newest.read_text().rpartition(old)
    newest.write_text(before + last.replace(old, new) + after)
    with pytest.raises(UserError, match="is not what was saved"):
        read_checkpoint(newest.parent)
    assert [checkpoint.step for checkpoint in complete_checkpoints(copy)] == [3]


@pytest.mark.parametrize("manifest", [{"step": 5, "files": {}}, {"format": 7}])
def test_another_versions_checkpoint_is_refused_as_such(
    manifest: dict, run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    if "format" in manifest:
        manifest |= {"sha256": manifest_digest(manifest)}
    (copy / "checkpoints" / "step_00000005" / MANIFEST).write_text(json.dumps(manifest))
    version = manifest.get("format", 1)
    with pytest.raises(UserError, match=f"checkpoint format {version}, where this version reads 2"):
        complete_checkpoints(copy)


def test_the_same_step_is_saved_again_over_a_damaged_one(tmp_path: Path) -> None:
    for content in (MANIFEST, "rank_00000.safetensors"):
        path = write_checkpoint(tmp_path, 5).path
        (path / content).write_bytes(b"cut")
    written = write_checkpoint(tmp_path, 5)
    assert damaged_files(written) == []
    assert [path.name for path in path.parent.iterdir()] == ["step_00000005"]


def test_a_kill_while_a_step_is_replaced_leaves_the_new_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path, 5).path
    (path / "rank_00000.safetensors").write_bytes(b"the old one")

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("magnetar.engine.checkpoint.format.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(tmp_path, 5)
    assert damaged_files(newest_checkpoint(tmp_path)) == []
    assert sorted(folder.name for folder in path.parent.iterdir()) == [
        "partial_replaced_step_00000005",
        "step_00000005",
    ]


def test_what_is_no_checkpoints_is_moved_aside_when_its_step_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of others, a file and a link with a checkpoint's name are kept."""
    folder = tmp_path / "checkpoints"
    final = folder / "step_00000005"
    (final / "notes").mkdir(parents=True)
    (final / "notes" / "thesis.txt").write_text("years of work")
    write_checkpoint(tmp_path, 5)
    said = capsys.readouterr().err
    assert f"warning: {final} holds what no checkpoint does: it is other_1_step_00000005" in said
    (final / "config.json").write_text("{}")  # beside a whole checkpoint
    write_checkpoint(tmp_path, 5)
    shutil.rmtree(final)
    final.write_text("a file")
    write_checkpoint(tmp_path, 5)
    shutil.rmtree(final)
    final.symlink_to(tmp_path)
    written = write_checkpoint(tmp_path, 5)
    assert damaged_files(written) == []
    assert (folder / "other_1_step_00000005/notes/thesis.txt").read_text() == "years of work"
    assert (folder / "other_2_step_00000005/config.json").is_file()
    assert (folder / "other_3_step_00000005").read_text() == "a file"
    assert (folder / "other_4_step_00000005").is_symlink()
    assert checkpoint_folders(tmp_path) == [final]


def test_a_folder_of_another_steps_name_is_named(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest = copy / "checkpoints" / "step_00000005"
    moved = newest.rename(newest.with_name("step_00000007"))
    with pytest.raises(UserError, match=r"manifest\.json is of step 5, not of the folder's 7"):
        newest_checkpoint(copy)
    assert [checkpoint.step for checkpoint in complete_checkpoints(copy)] == [3]
    assert read_checkpoint(moved.rename(copy / "the best")).step == 5


@pytest.mark.parametrize(
    ("keep", "whole", "remain"),
    [
        (2, {1, 2, 3, 4}, [3, 4]),
        (1, {4}, [4]),
        (1, {2, 4}, [4]),
        (2, {1, 4}, [1, 4]),  # 2 and 3 may be altered: nobody has read them
        (2, {4}, [3, 4]),
        (3, {4}, [2, 3, 4]),
        (9, {4}, [1, 2, 3, 4]),
    ],
)
def test_those_known_to_be_whole_remain_before_the_others(
    keep: int, whole: set[int], remain: list[int], tmp_path: Path
) -> None:
    for step in (1, 2, 3, 4, 6):
        write_checkpoint(tmp_path, step, world_size=1)
    remove_old(tmp_path, 4, keep, whole)
    assert [step_of(path) for path in checkpoint_folders(tmp_path)] == [*remain, 6]
    assert not list((tmp_path / "checkpoints").glob("partial_*"))


def test_truncated_checkpoints_do_not_remain(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, world_size=1)
    (tmp_path / "checkpoints" / "step_00000002" / "rank_00000.safetensors").write_bytes(b"cut")
    remove_old(tmp_path, 3, 2, {3})
    assert [step_of(path) for path in checkpoint_folders(tmp_path)] == [1, 3]
