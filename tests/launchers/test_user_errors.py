import errno
import os
import platform
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from magnetar import __version__
from magnetar.data.errors import UserError
from magnetar.launchers.terminal.defects import reports_in
from magnetar.launchers.terminal.user_errors import user_errors
from tests.ranks import ROOT


def end_of(error: BaseException) -> object:
    """Exit status of a launcher whose work raises this."""
    with pytest.raises(SystemExit) as ended, user_errors():
        raise error
    return ended.value.code


def test_a_user_error_prints_its_message_and_exits_with_2(capsys: pytest.CaptureFixture) -> None:
    assert end_of(UserError("num_experts=3 is wrong")) == 2
    assert capsys.readouterr().err == "error: num_experts=3 is wrong\n"


def test_only_the_first_rank_of_a_machine_prints_what_concerns_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert end_of(UserError("num_experts=3 is wrong")) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("number", "way_out"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EACCES, "may write to"),
        (errno.EPERM, "may write to"),
        (errno.EROFS, "can be written to"),
        (errno.EEXIST, "choose another folder"),
        (errno.ENOTDIR, "choose another folder"),
        (errno.ENOENT, "choose another path"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.ELOOP, "leads back to itself; remove it"),
        (errno.EISDIR, "choose another folder"),
        (errno.EIO, "the disk has failed"),
        (errno.ESTALE, "mount it again"),
        (errno.EFBIG, "raise the limit on the size of a file (ulimit -f)"),
    ],
)
def test_what_the_system_refuses_is_named_by_the_rank_that_met_it(
    number: int, way_out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert end_of(OSError(number, os.strerror(number), "runs/x/config.json")) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: runs/x/config.json: {os.strerror(number)}: ")
    assert way_out in printed


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 6.94 EiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nat x"),
        RuntimeError("CUDA out of memory. Tried to allocate 80.00 GiB"),
    ],
)
def test_too_little_memory_is_said_with_ways_out(
    error: Exception, capsys: pytest.CaptureFixture
) -> None:
    assert end_of(error) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: not enough memory: ")
    assert "train_micro_batch_size_per_gpu" in printed
    assert printed.count("\n") == 1


def test_ctrl_c_exits_with_130_and_prints_nothing(capsys: pytest.CaptureFixture) -> None:
    assert end_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == ""


DEFECTS = [
    *(ValueError("ours"), KeyError("ours"), RuntimeError("ours"), OSError(errno.EBADF, "ours")),
    BrokenPipeError(errno.EPIPE, "ours"),  # of another pipe than the standard output
]


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the temporary one."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["bin/magnetar", "plot", "runs/x"])
    return tmp_path


@pytest.mark.parametrize("error", DEFECTS)
def test_a_defect_ends_with_a_paragraph_and_its_traceback_is_in_a_file(
    error: Exception, reports: Path, capsys: pytest.CaptureFixture
) -> None:
    assert end_of(error) == 1
    printed = capsys.readouterr().err
    (report,) = reports.iterdir()
    assert printed.startswith("error: magnetar plot failed in end_of (")
    assert f"{type(error).__name__}: {error}. This is a defect of Magnetar, not of your" in printed
    assert f"command line are in {report}: please report it with them." in printed
    assert printed.count("\n") == 1
    text = report.read_text()
    assert "Traceback (most recent call last)" in text
    assert f"magnetar {__version__}, python {platform.python_version()}, torch " in text
    assert f"command   {shlex.join(sys.orig_argv)}\n" in text


def test_the_report_is_in_the_runs_folder_once_that_exists(
    reports: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path_factory.mktemp("run")
    for folder, holder in ((run, run), (run / "none", reports)):
        with pytest.raises(SystemExit), user_errors(), reports_in(folder):
            raise ValueError("ours")
        (report,) = holder.iterdir()
        assert str(report) in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc/none")
    assert end_of(ValueError("ours")) == 1
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert "are printed above, since no file can be written: please report it" in printed


def test_a_variable_prints_the_traceback_too(
    reports: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MAGNETAR_TRACEBACK", "1")
    assert end_of(ValueError("ours")) == 1
    assert capsys.readouterr().err.startswith("Traceback (most recent call last)")


FAILING = """
import os, pathlib, time
from magnetar.launchers.terminal.user_errors import user_errors
here = pathlib.Path(os.environ["TMPDIR"])
(here / ("started_" + os.environ["RANK"])).touch()
while len(list(here.glob("started_*"))) < 3:
    time.sleep(0.01)
with user_errors():
    raise ValueError("ours")
"""


def test_of_several_ranks_that_meet_a_defect_one_prints_and_each_has_a_report(
    reports: Path,
) -> None:
    environment = {**os.environ, "TMPDIR": str(reports), "WORLD_SIZE": "3"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(3)
    ]
    printed = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1, 1]
    assert sum("is a defect of Magnetar" in text for text in printed) == 1
    assert len(list(reports.glob("magnetar_defect_*_rank_[012]_*.txt"))) == 3


def test_a_closed_pipe_ends_quietly() -> None:
    program = [sys.executable, "-m", "magnetar", "config", "check", "ds_configs/lm_xmoe.json"]
    reader = "pass"  # it has ended before there is anything to read
    command = f"{shlex.join(program)} | {shlex.join([sys.executable, '-c', reader])}"
    done = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.strip() == str(128 + signal.SIGPIPE)


@pytest.mark.parametrize("on_every_rank", [True, False])
def test_once_the_ranks_have_joined_one_rank_prints_what_concerns_it_alone(
    on_every_rank: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("os._exit", sys.exit)
    assert end_of(UserError("train.bin is damaged", on_every_rank)) == 2
    expected = "" if on_every_rank else "error: train.bin is damaged\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    "words", ["Connection closed by peer", "Connection reset by peer", "Broken pipe"]
)
def test_a_rank_whose_peer_has_ended_says_so(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of(RuntimeError(f"[pair.cc:538] Read error [127.0.0.1]: {words}. GLHF!")) == 3
    assert capsys.readouterr().err.startswith("error: another rank has ended")


def test_the_first_causes_status_is_seen_before_that_of_a_rank_which_lost_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert end_of(RuntimeError("Connection closed by peer")) == 3
    assert slept == [1.5]


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("x"), 2), (KeyboardInterrupt(), 130), (ValueError("x"), 1)]
)
def test_once_the_ranks_have_joined_pythons_own_ending_is_left_out(
    error: BaseException, status: int, reports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = []

    def leave(status: int) -> None:
        statuses.append(status)
        raise SystemExit(status)

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("os._exit", leave)
    assert end_of(error) == status
    assert statuses == [status]
