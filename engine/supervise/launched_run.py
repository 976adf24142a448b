"""One start of a training: its launcher, what it prints, and its ranks on this machine."""

import os
import pty
import re
import selectors
import signal
import subprocess
import termios
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import psutil

from magnetar.engine.cluster.hosts import path_of_programs

# DeepSpeed forwards variables to other machines whose names begin with PYTHON.
RUN_ID = "PYTHON_MAGNETAR_RUN"

_EXIT_CODE = 49  # of /proc/PID/stat, counted from the state, which follows the name


class RunProcess(NamedTuple):
    """A process of a run.

    Attributes:
        pid: its id.
        rank: its rank; None for launchers, and for processes that a rank has started.
        local_size: number of ranks on this machine; 0 if rank is None.
    """

    pid: int
    rank: int | None
    local_size: int


def run_processes(run_id: str) -> list[RunProcess]:
    """Every living process of the run on this machine that belongs to this user."""
    found: dict[int, tuple[int, dict[str, str]]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or is another user's
            variables = process.environ()
            if variables.get(RUN_ID) == run_id and process.pid != os.getpid():
                found[process.pid] = (process.ppid(), variables)
    processes = []
    for pid, (parent, variables) in found.items():
        rank, local_size = None, 0
        if "RANK" in variables and "RANK" not in found.get(parent, (0, {}))[1]:
            rank, local_size = int(variables["RANK"]), int(variables.get("LOCAL_SIZE", 1))
        processes.append(RunProcess(pid, rank, local_size))
    return processes


def exit_status(pid: int) -> int | None:
    """The exit status of a zombie, as in subprocess: -9 by SIGKILL.

    None if the process lives, or is gone altogether.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return os.waitstatus_to_exitcode(int(fields[_EXIT_CODE])) if fields[0] == "Z" else None


def signal_ranks(run_id: str, number: int) -> int:
    """The number of ranks on this machine that got the signal, after sending it.

    SIGUSR1 is not sent to a rank that has no handler yet: it would end the rank, and a new rank has
    nothing to save.
    """
    ranks = [process.pid for process in run_processes(run_id) if process.rank is not None]
    if number == signal.SIGUSR1:
        ranks = [pid for pid in ranks if _is_caught(pid, number)]
    return sum(_send(pid, number) for pid in ranks)


def _is_caught(pid: int, number: int) -> bool:
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        mask = status.partition("SigCgt:")[2].split()[0]
        return bool(int(mask, 16) >> (number - 1) & 1)
    return False


def kill_processes(run_id: str, seconds: float = 10.0) -> int:
    """Kill what is left of the run here, stopped or not; the number that did not end in time."""
    until = time.monotonic() + seconds
    while left := run_processes(run_id):
        if time.monotonic() > until:
            return len(left)
        for process in left:
            _send(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    return 0


def _send(pid: int, number: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


_FAULT_OF_A_MACHINE = 3  # exit status of a rank that found a hang, or another rank gone

_KEPT_LINES = 200
_TOGETHER = 5.0  # seconds within which any of several deaths may be the cause of the others
# Seconds that the other ranks have to end by themselves: after a rank was killed or has found
# another one gone, and after a rank has failed otherwise, which may happen to them too.
_SECONDS_AFTER_FAULT = 2.0
_SECONDS_AFTER_FAILURE = 10.0
_LOOK_EVERY = 0.2  # seconds between two searches for ranks
_ANSI = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")
_RETURN_CODE = re.compile(r"(?:^(\S+): )?\[.*exits with return code = (-?\d+)")
_SSH_CODE = re.compile(r"^pdsh@\S+: (\S+): ssh exited with exit code (\d+)")
_ERROR = re.compile(r"^(?:\S+: )?(?:error: |[\w.]*(?:Error|Exception): )")


class Death(NamedTuple):
    """A rank that has ended.

    Attributes:
        name: "rank 1", or "a rank on node-2".
        status: exit status as in subprocess, -9 by SIGKILL; None if unknown.
        when: time of the end by time.monotonic, in seconds.
    """

    name: str
    status: int | None
    when: float

    @property
    def weight(self) -> int:
        """Likelihood that this death is the cause if several ranks ended at once."""
        number = killed_by(self.status)
        if self.status in (None, 0) or number == signal.SIGTERM:
            return 0
        if self.status == _FAULT_OF_A_MACHINE:
            return 1
        return 3 if number is not None else 2


def killed_by(status: int | None) -> int | None:
    """Number of the signal in a status, given as -9, as 137 (a shell) or as 247 (`sys.exit(-9)`).

    None if it is no signal's.
    """
    if status is None or not (status < 0 or 128 < status < 255):
        return None
    return next((n for n in (-status, 256 - status, status - 128) if 0 < n <= 64), None)


def ending(status: int | None) -> str:
    """A status in words; also the statuses that a shell gives for signals."""
    number = killed_by(status)
    if number is not None and number in set(signal.Signals):
        return f"was killed by {signal.Signals(number).name}"
    return "ended" if status is None else f"ended with status {status}"


class Launched:
    """A launcher in a session of its own, so that no key of the terminal reaches it.

    Its output is copied to our own stdout and stderr, byte by byte. If those are a terminal, the
    launcher gets a terminal as well, so that its progress line looks the same.
    """

    def __init__(self, command: Sequence[str], run_id: str, wake: int) -> None:
        """Start it; `run_id` marks its processes, `wake` is readable when a signal has arrived."""
        self.run_id = run_id
        self.deaths: list[Death] = []
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.failing_since: float | None = None
        self._seen: dict[int, RunProcess] = {}  # pid -> rank
        self._ranks: dict[int, RunProcess] = {}  # pidfd -> rank that has not ended
        self._sinks: dict[int, int] = {}  # what we read -> where it goes
        self._begun_lines: dict[int, bytes] = {}
        self._looked = 0.0
        self._selector = selectors.DefaultSelector()
        self._on_event(wake, lambda _: os.read(wake, 4096))
        theirs = [self._stream(1), self._stream(2)]
        variables = os.environ | {RUN_ID: run_id, "PATH": path_of_programs()}
        variables.pop("RANK", None)  # a batch system's would make the launcher look like a rank
        self.process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=theirs[0],
            stderr=theirs[1],
            start_new_session=True,
        )
        for descriptor in theirs:
            os.close(descriptor)
        self._pidfd = os.pidfd_open(self.process.pid)
        self._on_event(self._pidfd, lambda _: None)

    def _on_event(self, descriptor: int, call: Callable[[int], object]) -> None:
        self._selector.register(descriptor, selectors.EVENT_READ, call)

    def _stream(self, sink: int) -> int:
        """The write end of a pipe or terminal; its output is copied to our own file `sink`."""
        ours, theirs = pty.openpty() if os.isatty(sink) else os.pipe()
        if os.isatty(sink):
            modes = termios.tcgetattr(theirs)
            modes[1] &= ~termios.OPOST  # our terminal does it
            termios.tcsetattr(theirs, termios.TCSANOW, modes)
        os.set_blocking(ours, False)
        self._sinks[ours] = sink
        self._begun_lines[ours] = b""
        self._on_event(ours, self._pass_on)
        self.resize()
        return theirs

    def resize(self) -> None:
        """Hand a new size of the terminal on to the ranks."""
        for ours, sink in self._sinks.items():
            if os.isatty(sink):
                termios.tcsetwinsize(ours, termios.tcgetwinsize(sink))

    def watch(self, seconds: float) -> bool:
        """Copy the output and note ranks that end, for some seconds or until a signal arrives.

        Returns:
            Whether the launcher still runs.
        """
        self._look_for_ranks()
        for key, _ in self._selector.select(seconds if self._has_all_ranks else _LOOK_EVERY):
            key.data(key.fd)
        if self.process.poll() is None:
            return True
        self._look_for_ranks()
        for descriptor, rank in list(self._ranks.items()):
            if exit_status(rank.pid) is not None:
                self._note_death(descriptor)
        for descriptor in self._sinks:
            self._pass_on(descriptor)
        return False

    def close(self) -> None:
        """Wait for the launcher, which must be ending, and close the files."""
        self.process.wait()
        for descriptor in self._sinks:
            self._pass_on(descriptor)
        for descriptor in [*self._sinks, *self._ranks, self._pidfd]:
            os.close(descriptor)
        self._selector.close()

    @property
    def _has_all_ranks(self) -> bool:
        return any(len(self._seen) >= rank.local_size for rank in self._seen.values())

    def _look_for_ranks(self) -> None:
        now = time.monotonic()
        if self._has_all_ranks or now - self._looked < _LOOK_EVERY:
            return
        self._looked = now
        for process in run_processes(self.run_id):
            if process.rank is not None and process.pid not in self._seen:
                with suppress(ProcessLookupError):
                    descriptor = os.pidfd_open(process.pid)
                    self._seen[process.pid] = self._ranks[descriptor] = process
                    self._on_event(descriptor, self._note_death)

    def _note_death(self, descriptor: int) -> None:
        pid, rank, _ = self._ranks.pop(descriptor)
        self._selector.unregister(descriptor)
        os.close(descriptor)
        status = exit_status(pid)
        self.deaths.append(Death(f"rank {rank}", status, time.monotonic()))
        if status != 0:
            self._is_failing()

    def _is_failing(self) -> None:
        self.failing_since = self.failing_since or time.monotonic()

    def _pass_on(self, descriptor: int) -> None:
        """Copy everything that can be read now."""
        while True:
            try:
                content = os.read(descriptor, 65536)
            except BlockingIOError:
                return
            except OSError:  # all writers of the terminal have closed it
                content = b""
            if not content:
                if descriptor in self._selector.get_map():
                    self._selector.unregister(descriptor)
                return
            _write_all(self._sinks[descriptor], content)
            *lines, self._begun_lines[descriptor] = re.split(
                rb"[\r\n]+", self._begun_lines[descriptor] + content
            )
            for line in lines:
                self._note_line(_ANSI.sub(b"", line).decode(errors="replace").rstrip())

    def _note_line(self, line: str) -> None:
        if line:
            self.lines.append(line)
        match = _RETURN_CODE.match(line) or _SSH_CODE.match(line)
        if match and int(match[2]) != 0:
            self._is_failing()
            if match[1] and not any(match[1] in death.name for death in self.deaths):
                name, status = f"a rank on {match[1]}", int(match[2])
                self.deaths.append(Death(name, status, time.monotonic()))

    @property
    def _first(self) -> Death | None:
        """The death that caused the others: the first among those with the largest weight.

        Deaths long after the first failure do not count: the launcher kills ranks that do not end
        by themselves.
        """
        # The launcher may wait for a rank before we can read its status, and ends with the status
        # of the rank that it looked at first. Otherwise the echo of another would be blamed.
        known = [
            death._replace(name="a rank", status=self.process.returncode)
            if death.status is None and self.process.returncode
            else death
            for death in self.deaths
        ]
        failed = [death for death in known if death.status != 0]
        failed = [death for death in failed if death.when - failed[0].when < _TOGETHER]
        return max(failed, key=lambda death: death.weight, default=None)

    @property
    def is_hopeless(self) -> bool:
        """Whether a rank has failed and the others have had their time to report and end."""
        if self.failing_since is None:
            return False
        first = self._first
        is_machine = first is not None and first.weight in (1, 3)
        patience = _SECONDS_AFTER_FAULT if is_machine else _SECONDS_AFTER_FAILURE
        return time.monotonic() - self.failing_since > patience

    @property
    def status(self) -> int:
        """The status of the training; the launcher's own is that of the rank it looks at first."""
        first = self._first
        if first is not None and first.weight > 0:
            assert first.status is not None
            return first.status
        return self.process.returncode

    def cause(self) -> str:
        """The cause of the end, as far as it is known on this machine."""
        status, first = self.process.returncode, self._first
        text = f"the launcher {'has ended before its ranks' if status == 0 else ending(status)}"
        if first is not None:
            text = f"{first.name} {ending(first.status)}"
        said = self._said()
        return f"{text}: {said}" if said else text

    def _said(self) -> str:
        """The last error that a rank printed, with the lines indented below it."""
        lines = list(self.lines)
        begins = [
            i
            for i, line in enumerate(lines)
            if _ERROR.match(line) and "another rank has ended" not in line
        ]
        if not begins:
            return ""
        below = takewhile(lambda line: line.startswith("  "), lines[begins[-1] + 1 :])
        return "\n".join([lines[begins[-1]], *below])


def _write_all(descriptor: int, content: bytes) -> None:
    """Write to our own output. The run continues even if the output is closed."""
    with suppress(OSError):
        while content:
            content = content[os.write(descriptor, content) :]
