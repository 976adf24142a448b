"""The processes of a supervised run on a machine, found by a variable that they inherit."""

import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

# DeepSpeed forwards variables to other machines whose names begin with PYTHON.
RUN_ID = "PYTHON_MAGNETAR_RUN"

_PROC = Path("/proc")
_EXIT_CODE = 49  # of /proc/PID/stat, counted from the state, which follows the name


class RunProcess(NamedTuple):
    """A process of a run.

    Attributes:
        pid: its id.
        rank: what it trains as; None for launchers, and for what a rank has started.
        local_size: ranks on this machine; 0 where rank is None.
    """

    pid: int
    rank: int | None
    local_size: int


def run_processes(run_id: str) -> list[RunProcess]:
    """Every living process of the run on this machine that we may look at."""
    found: dict[int, dict[str, str]] = {}
    for folder in _PROC.iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            variables = _environment(int(folder.name))
            if variables.get(RUN_ID) == run_id:
                found[int(folder.name)] = variables
    processes = []
    for pid, variables in found.items():
        parents = found.get(_parent(pid), {})
        is_rank = "RANK" in variables and "RANK" not in parents
        processes.append(
            RunProcess(pid, int(variables["RANK"]), int(variables.get("LOCAL_SIZE", 1)))
            if is_rank
            else RunProcess(pid, None, 0)
        )
    return processes


def _environment(pid: int) -> dict[str, str]:
    try:
        content = (_PROC / str(pid) / "environ").read_bytes()
    except OSError:  # it has ended, or is another user's
        return {}
    pairs = (entry.partition("=") for entry in content.decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs}


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; none if the process is gone."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def exit_status(pid: int) -> int | None:
    """How a process has ended that nobody has waited for yet, as subprocess has it: -9 by SIGKILL.

    None if it lives, or is gone altogether.
    """
    fields = _stat(pid)
    if not fields or fields[0] != "Z":
        return None
    return os.waitstatus_to_exitcode(int(fields[_EXIT_CODE]))


def signal_ranks(run_id: str, number: int) -> int:
    """Send a signal to the ranks on this machine; how many got it.

    SIGUSR1 would end one that is not listening yet, and asks for nothing that is needed then.
    """
    ranks = [process.pid for process in run_processes(run_id) if process.rank is not None]
    if number == signal.SIGUSR1:
        ranks = [pid for pid in ranks if _is_caught(pid, number)]
    return sum(_send(pid, number) for pid in ranks)


def _is_caught(pid: int, number: int) -> bool:
    try:
        status = (_PROC / str(pid) / "status").read_text()
    except OSError:
        return False
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def kill_processes(run_id: str, seconds: float = 10.0) -> int:
    """SIGKILL all that is left of the run on this machine, stopped or not, until it is gone.

    Returns:
        How many processes could not be ended in the time: one of them waits for a disk, say.
    """
    until = time.monotonic() + seconds
    while left := run_processes(run_id):
        if time.monotonic() > until:
            return len(left)
        for process in left:
            _send(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    return 0


def _send(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
