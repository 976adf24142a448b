"""How every command ends when something has gone wrong: a message and an exit status."""

import errno
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from magnetar.data.errors import MachineError, UserError
from magnetar.launchers.terminal.defects import (
    TRACEBACK,
    defect_message,
    is_first_to_fail,
    write_report,
)
from magnetar.launchers.terminal.output import prepare_output


def quiet_deepspeed() -> None:
    """Name the accelerator before deepspeed is first imported, so that it need not guess aloud."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


# What the system can refuse wherever something is written, and what a person can do about it.
_WAYS_OUT = {
    errno.ENOSPC: "free some space, and start the same command again",
    errno.EDQUOT: "free some space, and start the same command again",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder on a disk that can be written to",
    errno.EEXIST: "a file has the name of a folder that is to be made; choose another folder",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.ENOENT: "it is not there, or a folder of the path cannot be made; choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "a link of the path leads back to itself; remove it, or choose another path",
    errno.EISDIR: "a folder has the name of a file that is to be written; choose another folder",
    errno.EIO: "the disk has failed to read or write; look into the system's log",
    errno.ESTALE: "the network's disk has gone; mount it again",
    errno.EMFILE: "raise the limit on open files (ulimit -n), or prepare fewer directions",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or choose another disk",
}

_NEED_LESS = (
    "use a smaller model or train_micro_batch_size_per_gpu, a higher zero_optimization.stage, or "
    "more ranks"
)

_DEFECT, _BAD_INPUT, _FAULT_OF_A_MACHINE = 1, 2, 3

# What torch says of a GPU's and of the host's memory.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")

# What gloo says when another rank is gone.
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_LOST_PEER_MESSAGE = "another rank has ended; what it printed, if it could, says why"
# DeepSpeed's launcher looks for ranks that have ended once a second, and ends with the status of
# one of those that it finds. That of the first cause says more than ours.
_AFTER_A_PEER = 1.5  # seconds


def _ranks_have_joined() -> bool:
    """Whether a process group exists; without importing torch for that."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _say(message: str) -> None:
    with suppress(OSError, ValueError):  # nobody reads it: the status is all that is left to say
        print(f"error: {message}", file=sys.stderr, flush=True)


def _leave(status: int) -> NoReturn:
    if _ranks_have_joined():
        # Other ranks may wait in a collective, so the groups cannot be left in order, and Python's
        # own ending may abort: see engine.cluster.process_groups.
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status) from None


def _expected(error: Exception) -> tuple[str, int, bool] | None:
    """The message, the status, and whether every rank has it; None for a defect of ours."""
    if isinstance(error, UserError | MachineError):
        status = _BAD_INPUT if isinstance(error, UserError) else _FAULT_OF_A_MACHINE
        return str(error), status, error.on_every_rank or not _ranks_have_joined()
    if isinstance(error, OSError) and error.errno in _WAYS_OUT:
        name = error.filename or "a file, or what the output goes to"
        return f"{name}: {error.strerror}: {_WAYS_OUT[error.errno]}", _BAD_INPUT, False
    said = str(error)
    is_torchs = isinstance(error, RuntimeError)
    if isinstance(error, MemoryError) or (is_torchs and any(map(said.__contains__, _NO_MEMORY))):
        said = said.partition("\n")[0]
        return f"not enough memory: {said}: {_NEED_LESS}", _BAD_INPUT, False
    if is_torchs and any(map(said.__contains__, _LOST_PEER)):
        return _LOST_PEER_MESSAGE, _FAULT_OF_A_MACHINE, False
    return None


def _end(error: Exception) -> NoReturn:
    expected = _expected(error)
    if expected is not None:
        message, status, is_everybodys = expected
        if is_everybodys and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(1.0)
        else:
            _say(message)
        if message == _LOST_PEER_MESSAGE and "WORLD_SIZE" in os.environ:
            time.sleep(_AFTER_A_PEER)
        _leave(status)
    where = write_report(error)
    if is_first_to_fail():
        if os.environ.get(TRACEBACK, "0") != "0":
            traceback.print_exception(error)
        _say(defect_message(error, where))
    if "WORLD_SIZE" in os.environ:
        # The rank that prints must not be killed before, and others must see for a while that it
        # has printed: a launcher ends all ranks when it finds that one has ended.
        time.sleep(1.0)
    _leave(_DEFECT)


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the program without a traceback, whatever is raised.

    The status is 2 after a UserError, 3 after a MachineError, 130 after Ctrl-C. Anything that
    nobody expected is a defect of ours: its traceback goes into a file, and the status is 1.

    Wrap a launcher's `main` in it, as a decorator or in a `with` statement. The message is printed
    once a machine, by local rank 0. The other ranks wait a second first: a multi-process launcher
    kills everybody as soon as one rank has ended, and that must not be the rank that prints. What
    concerns one rank alone (damaged data that it reads, no space on its disk) that rank prints.
    """
    prepare_output()
    try:
        try:
            yield
        except SystemExit as ending:  # of --help, say
            if isinstance(ending.__context__, BrokenPipeError):  # it is rich that ends
                _leave_closed_pipe()
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # or a closed pipe would be found when it is too late to say so
    except KeyboardInterrupt:
        _leave(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            _leave_closed_pipe()
        _end(error)


def _output_is_closed() -> bool:
    """Whether the standard output is a pipe that nobody reads any more."""
    with suppress(OSError, ValueError):  # an output that is no file
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def _leave_closed_pipe() -> NoReturn:
    """End as a program does that SIGPIPE kills: the reader of the output has seen enough."""
    with suppress(OSError, ValueError):  # what is left in the buffer must go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _leave(128 + signal.SIGPIPE)
