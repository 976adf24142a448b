"""Atomic writes and locks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from magnetar.data.atomic import atomic_folder, lock, write_atomically
from tests.ranks import ROOT


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_atomically(tmp_path / "config.json", "old")
    write_atomically(tmp_path / "config.json", "n\u00e9w")
    assert (tmp_path / "config.json").read_bytes() == "n\u00e9w".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_old_content_stays_if_the_write_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "file", b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that are synced and renamed from now on, in their order."""
    calls: list[str] = []
    replace, fsync = os.replace, os.fsync

    def note_fsync(descriptor: int) -> None:
        calls.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_replace(old: Path, new: Path) -> None:
        calls.append(f"rename {Path(old).name} {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    return calls


def test_the_content_is_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = recorded(monkeypatch)
    write_atomically(tmp_path / "file", "text")
    assert calls == ["fsync file.partial", "rename file.partial file", f"fsync {tmp_path.name}"]


def test_a_folder_is_on_the_disk_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = recorded(monkeypatch)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("text")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "inner" / "file").read_text() == "text"
    assert calls == [
        *("fsync file", "fsync inner", "fsync whole"),
        "rename whole out",
        f"fsync {tmp_path.name}",
    ]


def test_an_error_leaves_nothing_of_a_folder(tmp_path: Path) -> None:
    def fill() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_held_by_one_process_until_its_file_is_closed(tmp_path: Path) -> None:
    program = f"from magnetar.data.atomic import lock, Path; lock(Path({str(tmp_path / 'lock')!r}))"

    def other() -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    with lock(tmp_path / "lock"):
        assert "BlockingIOError" in other().stderr
        with pytest.raises(BlockingIOError):
            lock(tmp_path / "lock")
    assert other().returncode == 0
