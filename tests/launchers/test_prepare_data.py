import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from magnetar.data.errors import UserError
from magnetar.data.text.prepare import DEFAULT_VALID_FRACTION
from magnetar.data.text.token_files import open_prepared
from magnetar.launchers.prepare_data import main, parse_arguments
from magnetar.launchers.terminal.user_errors import user_errors

ROOT = Path(__file__).parents[2]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"ship {i} sails {i * i} miles on sea {i % 7}" for i in range(500)))
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prepare_data", *map(str, arguments)])
    main()


def test_the_command_prints_what_the_folder_holds(tmp_path, text_file, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ["--train", text_file, "--documents", "line", "--vocab-size", 300, "--workers", 1]
    run(monkeypatch, *arguments, "--out", tmp_path / "out")
    output = capsys.readouterr()
    prepared = open_prepared(tmp_path / "out")
    assert prepared.manifest.settings["valid_fraction"] == DEFAULT_VALID_FRACTION
    for split in (prepared.train, prepared.valid):
        assert f"{split.num_documents:,}" in output.out
        assert f"{split.num_tokens:,}" in output.out
        assert f"{split.record.num_bytes:,}" in output.out
        assert f"{split.record.num_bytes / split.num_tokens:.3f}" in output.out
    assert "300 entries, tokenizer.model" in output.out
    assert f"written: {tmp_path / 'out'}" in output.out
    run(monkeypatch, *arguments, "--out", tmp_path / "out")
    again = capsys.readouterr()
    assert again.out == output.out.replace("written: ", "up to date: ")
    assert "is up to date" in again.err


def test_a_user_error_is_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--train", tmp_path / "*.txt", "--vocab-size", 300, "--out", tmp_path)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: no file matches")


def test_every_core_works_unless_told_otherwise():
    config = parse_arguments(["--corpus", "sotu", "--vocab-size", "2000", "--out", "x"])
    assert config.workers == len(os.sched_getaffinity(0))


def alive(group: int) -> list[int]:
    """The processes of a group that run; a zombie, which nobody has reaped yet, does not."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            state, _, group_of_it = file.read_text().rpartition(")")[2].split()[:3]
            if int(group_of_it) == group and state not in "ZX":
                found.append(int(file.parent.name))
    return found


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_no_worker_and_resumes_to_the_same_bytes(tmp_path, text_file):
    long_text = tmp_path / "long.txt"
    text = text_file.read_text()
    long_text.write_text("\n".join(f"document {i}\t{text[i : i + 4000]}" for i in range(4000)))
    program = [
        sys.executable,
        "-m",
        "magnetar.launchers.prepare_data",
        "--documents=line",
        "--workers=2",
    ]

    def command(out, train, *vocabulary):
        given = ["--train", train, "--out", tmp_path / out, *vocabulary]
        return [*program, *map(str, given)]

    subprocess.run(command("vocabulary", text_file, "--vocab-size=300"), cwd=ROOT, check=True)
    vocabulary = ("--tokenizer", tmp_path / "vocabulary" / "tokenizer.model")
    stopped = command("out", long_text, *vocabulary)
    process = subprocess.Popen(stopped, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial/shards/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(alive(process.pid)) >= 3  # the command and its two workers
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = alive(process.pid)
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert left == []
    assert not (tmp_path / "out").exists()
    resumed = subprocess.run(stopped, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "finished shards" in resumed.stderr
    subprocess.run(command("whole", long_text, *vocabulary), cwd=ROOT, check=True)
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()


@user_errors()
def fail(error):
    raise error


@pytest.mark.parametrize("rank", [None, "0", "3"])
def test_only_the_first_local_rank_prints(monkeypatch, capsys, rank):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as ended:
        fail(UserError("x=1 must be 2: use 2"))
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert (printed, slept) == (
        ("", [1.0]) if rank == "3" else ("error: x=1 must be 2: use 2\n", [])
    )


def test_ctrl_c_ends_with_130_and_a_defects_traceback_is_kept(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        fail(KeyboardInterrupt())
    assert ended.value.code == 130
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit) as ended:
        fail(ValueError("ours"))
    assert ended.value.code == 1
    (report,) = tmp_path.iterdir()
    assert "ValueError: ours" in report.read_text()
    assert str(report) in capsys.readouterr().err
