"""What is written and printed of an exception that nobody expected: a defect of Magnetar."""

import errno
import os
import platform
import shlex
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import magnetar
from magnetar.launchers import command_of

# If this variable is set, to something but 0, the traceback is printed as well as written.
TRACEBACK = "MAGNETAR_TRACEBACK"
_PACKAGE = Path(magnetar.__file__).parent
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LONGEST = 300  # characters of an exception's own text in the message

_claim: socket.socket | None = None  # held until the process ends; see is_first_to_fail


@contextmanager
def reports_in(folder: Path) -> Iterator[None]:
    """Let the report of a defect be written into a folder, a run's say, if it exists by then."""
    try:
        yield
    except Exception as error:
        error.__dict__.setdefault("_report_folder", folder)
        raise


def is_first_to_fail() -> bool:
    """Whether no other rank of this machine is printing; False for all but one of them.

    The first rank takes a name among Unix sockets, which the system frees when the rank ends. The
    name holds the process that has started the ranks, so that two runs do not meet.
    """
    if "WORLD_SIZE" not in os.environ and "OMPI_COMM_WORLD_SIZE" not in os.environ:
        return True
    global _claim
    _claim = socket.socket(socket.AF_UNIX)
    try:
        _claim.bind(f"\0magnetar-defect-{os.getppid()}")
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True


def _place(error: BaseException) -> str:
    """The innermost of our functions in a traceback, with its file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    ends = ("user_errors", "reports_in")  # the frames that every exception passes through
    ours = [frame for frame in frames if frame.filename.startswith(str(_PACKAGE))]
    ours = [frame for frame in ours if frame.name not in ends and not frame.name.startswith("<")]
    frame = (ours or list(frames))[-1]
    file = frame.filename.removeprefix(f"{_PACKAGE.parent}{os.sep}")
    return f"{frame.name} ({file}, line {frame.lineno})"


def _typed() -> str:
    """The command that runs: `magnetar train`, say."""
    program = Path(sys.argv[0])
    if program.name == "magnetar" or program.parts[-2:] == ("magnetar", "__main__.py"):
        return " ".join(["magnetar", *sys.argv[1:2]])
    return command_of(program.stem)


def write_report(error: BaseException) -> str:
    """Write what somebody needs who looks for the defect, and return where it is.

    The folder is the run's, or the temporary one.
    """
    versions = [f"magnetar {magnetar.__version__}", f"python {platform.python_version()}"]
    for name in ("torch", "deepspeed", "numpy", "pydantic"):
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    ranks = [f"{name}={os.environ[name]}" for name in _OF_RANKS if name in os.environ]
    text = "\n".join(
        [
            f"command   {shlex.join(sys.orig_argv)}",
            f"folder    {os.getcwd()}",
            f"versions  {', '.join(versions)}",
            f"system    {platform.platform()}",
            f"rank      {' '.join(ranks) or 'one process'}",
            f"time      {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
            "",
            *traceback.format_exception(error),
        ]
    )
    moment = time.strftime("%Y%m%d_%H%M%S")
    name = f"magnetar_defect_{moment}_rank_{os.environ.get('RANK', '0')}_{os.getpid()}.txt"
    for folder in (error.__dict__.get("_report_folder"), Path(tempfile.gettempdir())):
        if folder is not None and folder.is_dir():
            with suppress(OSError):
                (folder / name).write_text(text, encoding="utf-8", errors="replace")
                return f"in {folder / name}"
    print(text, file=sys.stderr, flush=True)
    return "printed above, since no file can be written"


def defect_message(error: BaseException, where: str) -> str:
    """The paragraph that a user sees; `where` is what `write_report` has returned."""
    said = str(error).strip().partition("\n")[0]
    said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."
    what = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return (
        f"{_typed()} failed in {_place(error)}: {what}. This is a defect of Magnetar, not of your "
        f"input. Traceback, versions and command line are {where}: please report it with them. "
        f"{TRACEBACK}=1 prints the traceback here."
    )
