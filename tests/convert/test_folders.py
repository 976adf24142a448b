"""Where --out may not be, for every command that writes a folder."""

from pathlib import Path

import pytest

from magnetar.convert.folders import require_new
from magnetar.data.errors import UserError
from tests.convert.checkpoints import write_checkpoint
from tests.convert.conversions import Refusal, contents, save_random

OPTIONS: dict[str, tuple[object, ...]] = {
    "reshard": ("--world-size", 2),
    "average": ("--last", 2),
    "export": (),
    "import": (),
    "upcycle": ("--num-experts", 4),
    "densify": ("--mean",),
    "shrink": ("--layers", "0,1"),
    "import-torchscale": (),
    "from-hf": (),
    "fold-admin": (),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (3, 5):
        write_checkpoint(tmp_path / "run", step)
    return tmp_path / "run"


@pytest.mark.parametrize("command", OPTIONS)
@pytest.mark.parametrize(
    ("place", "folder", "what"),
    [
        ("checkpoints/mine", "checkpoints", "where a run keeps its checkpoints and removes old"),
        ("checkpoints/step_00000004", "checkpoints", "where a run keeps its checkpoints"),
        ("checkpoints/step_00000005/mine", "checkpoints/step_00000005", "a checkpoint"),
    ],
)
def test_nothing_is_written_among_checkpoints(
    command: str, place: str, folder: str, what: str, run: Path, tmp_path: Path, refused: Refusal
) -> None:
    out = run / place
    said = refused(command, tmp_path / "other", "--out", out, *OPTIONS[command])
    assert f"{out}: {run / folder} is {what}" in said
    assert "name a folder outside it with --out" in said
    assert not out.exists()


@pytest.mark.parametrize("command", [name for name in OPTIONS if name != "import-torchscale"])
def test_nothing_is_written_into_what_is_converted(
    command: str, tmp_path: Path, refused: Refusal
) -> None:
    source = tmp_path / "source"
    save_random(source)
    before = contents(source)
    (tmp_path / "link").symlink_to(source)
    for out in (source / "deep" / "mine", tmp_path / "link" / "mine"):
        said = refused(command, source, "--out", out, *OPTIONS[command])
        assert f"{out}: {source} is what is converted: name a folder outside it" in said
    assert contents(source) == before


def test_the_checkpoints_of_a_run_that_has_none_yet_are_no_place(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is where a run keeps its checkpoints"):
        require_new(tmp_path / "checkpoints")


def test_a_moved_checkpoint_is_no_place(run: Path, tmp_path: Path) -> None:
    best = (run / "checkpoints" / "step_00000005").rename(tmp_path / "best")
    with pytest.raises(UserError, match="best is a checkpoint: name a folder outside it"):
        require_new(best / "mine")


@pytest.mark.parametrize("command", OPTIONS)
def test_a_place_where_nothing_can_be_is_named_and_left_alone(
    command: str, tmp_path: Path, refused: Refusal
) -> None:
    file, full = tmp_path / "thesis.txt", tmp_path / "full"
    full.mkdir()
    for path in (file, full / "mine"):
        path.write_text("years of work")
    links = {tmp_path / "to_a_folder": full, tmp_path / "to_nothing": tmp_path / "nowhere"}
    for link, target in links.items():
        link.symlink_to(target)
    for out, message in (
        ("", "--out is empty, or the folder that the command was started in: name a folder to"),
        (file / "q", f"{file / 'q'}: {file} is a file: name a folder outside it with --out"),
        (file / "q" / "r", f"{file} is a file: name a folder outside it with --out"),
        ("/proc/q", "/proc/q: no folder can be made in /proc (No such file or directory): name"),
        ("/proc/q/r", "no folder can be made in /proc (No such file or directory): name a place"),
        (tmp_path / ("n" * 300), "File name too long: choose a shorter name"),
        (full, f"{full} exists and is not an empty folder: name another one with --out"),
        (file, f"{file} exists and is not an empty folder: name another one with --out"),
        *((a, f"{a} is a link to {b}: name that, or another one") for a, b in links.items()),
    ):
        said = refused(command, tmp_path / "other", "--out", out, *OPTIONS[command])
        assert message in said
    assert sorted(tmp_path.iterdir()) == sorted([file, full, *links])
    assert file.read_text() == (full / "mine").read_text() == "years of work"
    assert all(link.is_symlink() for link in links)


@pytest.mark.parametrize("name", ["mine", "not/yet/there", "checkpoints/mine", "a/../mine"])
def test_elsewhere_a_folder_may_be_made_and_nothing_is_left_by_asking(
    name: str, tmp_path: Path, run: Path
) -> None:
    place = tmp_path / "elsewhere"
    place.mkdir()
    require_new(place / name, run)
    assert list(place.iterdir()) == []
