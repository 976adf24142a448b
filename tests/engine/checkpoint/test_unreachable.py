"""Checkpoints that stand in a run's folder and cannot be read are named, and nothing starts over.

A link leads to a disk that is not mounted or to itself, or a file has a folder's place."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from magnetar.convert.export import export
from magnetar.convert.inspect import inspect, require_undamaged
from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.format import (
    MANIFEST,
    checkpoint_folders,
    complete_checkpoints,
    newest_checkpoint,
    remove,
    remove_old,
)
from magnetar.engine.checkpoint.open_run import open_run
from magnetar.engine.checkpoint.starting_weights import starts_from_weights
from tests.convert.checkpoints import run_config, write_checkpoint
from tests.ranks import run_on_ranks
from tests.runs import launch, make_corpus, records, write_config


def as_dangling_link(path: Path) -> str:
    path.symlink_to("/mnt/a disk/that is not mounted")
    return "not mounted, which is not there"


def as_loop(path: Path) -> str:
    path.symlink_to(path.name)
    return "Too many levels of symbolic links"


def as_file(path: Path) -> str:
    path.write_text("a note")
    return "Not a directory"


def as_empty_folder(path: Path) -> str:
    path.mkdir()
    return f"{MANIFEST} is missing"


PUT_IN_PLACE = pytest.mark.parametrize("put", [as_dangling_link, as_loop, as_file, as_empty_folder])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints, steps 3 and 5."""
    for step in (3, 5):
        write_checkpoint(tmp_path / "run", step)
    return tmp_path / "run"


@pytest.mark.parametrize("put", [as_dangling_link, as_loop, as_file])
def test_a_folder_of_checkpoints_that_cannot_be_read_holds_nobody_knows_what(
    put: Callable[[Path], str], run: Path
) -> None:
    folder = run / "checkpoints"
    elsewhere = folder.rename(run / "elsewhere")
    put(folder)
    config = run_config(run, changes={"magnetar.training.init_from": "weights"})
    for look in (
        complete_checkpoints,
        newest_checkpoint,
        open_run,
        inspect,
        lambda _: starts_from_weights(config),
    ):
        with pytest.raises(UserError, match=f"^{folder} cannot be read") as refused:
            look(run)
        assert "mount its disk" in str(refused.value)
    folder.unlink()
    elsewhere.rename(folder)  # as the message says
    assert open_run(run).step == 5


def test_a_run_folder_that_may_not_be_searched_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", refuse)  # root may search everything
    with pytest.raises(
        UserError, match=rf"^{run.parent} cannot be read \(Permission denied\): make"
    ):
        open_run(run.parent)


def test_a_run_without_the_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint_folders(tmp_path) == checkpoint_folders(tmp_path / "none") == []


@PUT_IN_PLACE
def test_a_checkpoint_that_cannot_be_reached_is_named(
    put: Callable[[Path], str], run: Path
) -> None:
    newest = run / "checkpoints" / "step_00000005"
    elsewhere = newest.rename(run / "elsewhere")
    reason = put(newest)
    assert [checkpoint.step for checkpoint in complete_checkpoints(run)] == [3]
    for name in (None, newest.name):
        with pytest.raises(UserError) as refused:
            open_run(run, name)
        assert str(newest) in str(refused.value)
        assert reason in str(refused.value)
        assert "step_00000003" in str(refused.value)
    assert open_run(run, "step_00000003").step == 3  # as the message says
    shutil.rmtree(run / "checkpoints" / "step_00000003")
    with pytest.raises(
        UserError, match=r"bring it back, readable and as it was saved, or use another checkpoint$"
    ):
        newest_checkpoint(run)
    shutil.rmtree(newest) if newest.is_dir() else newest.unlink()
    newest.symlink_to(elsewhere)
    assert open_run(run).step == 5


def test_a_rank_file_that_cannot_be_read_is_named_with_another_checkpoint(
    run: Path, tmp_path: Path
) -> None:
    file = run / "checkpoints" / "step_00000005" / "rank_00001.safetensors"
    file.unlink()
    as_loop(file)
    for use in (
        lambda path: open_run(path).state_dict(),
        lambda path: export(path, tmp_path / "out"),
        lambda path: require_undamaged(inspect(path)),
    ):
        for path in (run, file.parent):
            with pytest.raises(UserError) as refused:
                use(path)
            assert f"{file} cannot be read (Too many levels of symbolic links)" in str(
                refused.value
            )
            assert f"the newest complete one is {file.parent.parent / 'step_00000003'}" in str(
                refused.value
            )
    assert open_run(run, "step_00000003").state_dict()
    assert not (tmp_path / "out").exists()


def test_old_checkpoints_behind_links_are_removed_as_links_and_unreachable_ones_stay(
    run: Path, tmp_path: Path
) -> None:
    folder, disk = run / "checkpoints", tmp_path / "disk"
    disk.mkdir()
    for name in ("step_00000001", "step_00000003"):
        write_checkpoint(run, int(name[5:]))
        (folder / name).rename(disk / name)
        (folder / name).symlink_to(disk / name)
    (folder / "step_00000002").symlink_to("/mnt/gone")
    (folder / "step_00000004").write_text("a note")
    remove_old(run, 5, 1, {5})
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_00000002",
        "step_00000004",
        "step_00000005",
    ]
    for name in ("step_00000001", "step_00000003"):
        assert (disk / name / MANIFEST).is_file()


def test_an_old_checkpoint_that_cannot_be_removed_is_named_and_stays(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leftover = run / "checkpoints" / "partial_step_00000003"
    leftover.mkdir()
    (leftover / "rank_00000.safetensors").write_bytes(b"half")
    remove_old(run, 5, 1, {5})
    old = leftover.with_name("step_00000003")
    assert f"warning: {old} cannot be removed (Directory not empty)" in capsys.readouterr().err
    remove(leftover)  # as the next start does
    remove_old(run, 5, 1, {5})
    assert [path.name for path in old.parent.iterdir()] == ["step_00000005"]


@pytest.mark.slow
def test_every_rank_falls_back_and_names_or_refuses(run: Path, tmp_path: Path) -> None:
    runs = []
    for put in (as_dangling_link, as_loop, as_file, as_empty_folder):
        copy = shutil.copytree(run, tmp_path / put.__name__, symlinks=True)
        shutil.rmtree(copy / "checkpoints" / "step_00000005")
        put(copy / "checkpoints" / "step_00000005")
        runs.append(copy)
    answers = run_on_ranks("tests.engine.programs:newest_whole_checkpoints", 2, runs)
    for path, *of_ranks in zip(runs, *answers, strict=True):
        assert [step for step, _ in of_ranks] == [3, 3]
        warned = of_ranks[0][1]
        assert warned.startswith(f"warning: {path / 'checkpoints' / 'step_00000005'}")
        assert "going on from an older one" in warned


@pytest.mark.slow
def test_a_run_does_not_start_over_beside_checkpoints_that_it_cannot_reach(tmp_path: Path) -> None:
    one_rank = {"magnetar.model.moe.ep_size": 1}
    config = write_config(tmp_path, make_corpus(tmp_path), changes=one_rank)
    assert launch(config, ranks=1).returncode == 0
    run, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    before = records(run)
    disk = folder.rename(tmp_path / "disk")

    def refused(words: str) -> None:
        done = launch(config, ranks=1)
        assert done.returncode == 2, done.stdout
        assert words in done.stdout
        assert "Traceback" not in done.stdout
        assert records(run) == before

    as_dangling_link(folder)
    refused(f"{folder} cannot be read (No such file or directory)")
    folder.unlink()
    folder.mkdir()
    for step in disk.iterdir():
        as_dangling_link(folder / step.name)
    refused(f"{folder}: no checkpoint is whole")
    for step in disk.iterdir():  # mounted, with leftovers of a killed run
        (folder / step.name).unlink()
        (folder / step.name).symlink_to(step)
        (folder / f"partial_{step.name}").symlink_to(step)
    (folder / "partial_step_00000099").write_text("a file")
    done = launch(config, "--set", "magnetar.training.num_steps=12", ranks=1)
    assert done.returncode == 0, done.stdout
    assert "resuming after step 8" in done.stdout
    assert not list(folder.glob("partial_*"))
    assert all((step / MANIFEST).is_file() for step in disk.iterdir())
