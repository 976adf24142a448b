import errno
import os
import sys

import pytest

from magnetar.data.errors import UserError
from magnetar.launchers.user_errors import user_errors


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


@pytest.mark.parametrize("error", [ValueError("ours"), OSError(errno.EIO, "ours"), KeyError("x")])
def test_a_defect_of_ours_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), user_errors():
        raise error


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


@pytest.mark.parametrize(("error", "status"), [(UserError("x"), 2), (KeyboardInterrupt(), 130)])
def test_once_the_ranks_have_joined_pythons_own_ending_is_left_out(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = []

    def leave(status: int) -> None:
        statuses.append(status)
        raise SystemExit(status)

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("os._exit", leave)
    assert end_of(error) == status
    assert statuses == [status]
