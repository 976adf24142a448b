"""One start of a training: its launcher, what it prints, and its ranks on this machine."""

import fcntl
import os
import pty
import re
import selectors
import signal
import struct
import subprocess
import sys
import termios
import time
from collections import deque
from collections.abc import Sequence
from itertools import takewhile
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
        rank: its rank; None for launchers, and for processes that a rank has started.
        local_size: number of ranks on this machine; 0 if rank is None.
    """

    pid: int
    rank: int | None
    local_size: int


def run_processes(run_id: str) -> list[RunProcess]:
    """Every living process of the run on this machine that belongs to this user."""
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
    """The exit status of a zombie, as in subprocess: -9 by SIGKILL.

    None if the process lives, or is gone altogether.
    """
    fields = _stat(pid)
    if not fields or fields[0] != "Z":
        return None
    return os.waitstatus_to_exitcode(int(fields[_EXIT_CODE]))


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
    try:
        status = (_PROC / str(pid) / "status").read_text()
    except OSError:
        return False
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def kill_processes(run_id: str, seconds: float = 10.0) -> int:
    """Send SIGKILL to the rest of the run on this machine, stopped or not, until it is gone.

    Returns:
        Number of processes that did not end in time, for example because they wait for a disk.
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
    if status is None:
        return "ended"
    number = killed_by(status)
    if number is not None and number in set(signal.Signals):
        return f"was killed by {signal.Signals(number).name}"
    return f"ended with status {status}"


class Launched:
    """A launcher in a session of its own, so that no key of the terminal reaches it.

    Its output is copied to our own stdout and stderr, byte by byte. If those are a terminal, the
    launcher gets a terminal as well, so that its progress line looks the same.
    """

    def __init__(self, command: Sequence[str], run_id: str, wake: int) -> None:
        """Start it.

        Args:
            command: command line of the launcher.
            run_id: value of the variable that marks all of its processes.
            wake: file descriptor that becomes readable when a signal has arrived.
        """
        self.run_id = run_id
        self.deaths: list[Death] = []
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.failing_since: float | None = None
        self._ranks: dict[int, tuple[int, int]] = {}  # pidfd -> pid, rank
        self._seen: set[int] = set()
        self._num_local_ranks = 0
        self._sinks: dict[int, int] = {}  # what we read -> where it goes
        self._begun_lines: dict[int, bytes] = {}
        self._looked = 0.0
        self._wake = wake
        self._selector = selectors.DefaultSelector()
        self._selector.register(wake, selectors.EVENT_READ)
        theirs = [self._stream(1), self._stream(2)]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        self.process = subprocess.Popen(
            command,
            env=os.environ | {RUN_ID: run_id, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=theirs[0],
            stderr=theirs[1],
            start_new_session=True,
        )
        for descriptor in theirs:
            os.close(descriptor)
        self._pidfd = os.pidfd_open(self.process.pid)
        self._selector.register(self._pidfd, selectors.EVENT_READ)

    def _stream(self, sink: int) -> int:
        """The write end of a pipe or terminal; its output is copied to our own file `sink`."""
        if os.isatty(sink):
            ours, theirs = pty.openpty()
            modes = termios.tcgetattr(theirs)
            modes[1] &= ~termios.OPOST  # our terminal does it
            termios.tcsetattr(theirs, termios.TCSANOW, modes)
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, _window(sink))
        else:
            ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        self._sinks[ours] = sink
        self._begun_lines[ours] = b""
        self._selector.register(ours, selectors.EVENT_READ)
        return theirs

    def resize(self) -> None:
        """Hand a new size of the terminal on to the ranks."""
        for ours, sink in self._sinks.items():
            if os.isatty(ours) and os.isatty(sink):
                fcntl.ioctl(ours, termios.TIOCSWINSZ, _window(sink))

    def watch(self, seconds: float) -> bool:
        """Copy the output and note ranks that end, for some seconds or until a signal arrives.

        Returns:
            Whether the launcher still runs.
        """
        self._look_for_ranks()
        for key, _ in self._selector.select(seconds if self._has_all_ranks else _LOOK_EVERY):
            if key.fd == self._wake:
                os.read(self._wake, 4096)
            elif key.fd in self._sinks:
                self._pass_on(key.fd)
            elif key.fd in self._ranks:
                self._note_death(key.fd)
        if self.process.poll() is None:
            return True
        self._look_for_ranks()
        for descriptor in list(self._ranks):
            if exit_status(self._ranks[descriptor][0]) is not None:
                self._note_death(descriptor)
        for descriptor in list(self._sinks):
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
        return bool(self._seen) and len(self._seen) >= self._num_local_ranks

    def _look_for_ranks(self) -> None:
        now = time.monotonic()
        if self._has_all_ranks or now - self._looked < _LOOK_EVERY:
            return
        self._looked = now
        for process in run_processes(self.run_id):
            if process.rank is None or process.pid in self._seen:
                continue
            try:
                descriptor = os.pidfd_open(process.pid)
            except ProcessLookupError:
                continue
            self._seen.add(process.pid)
            self._num_local_ranks = process.local_size
            self._ranks[descriptor] = (process.pid, process.rank)
            self._selector.register(descriptor, selectors.EVENT_READ)

    def _note_death(self, descriptor: int) -> None:
        pid, rank = self._ranks.pop(descriptor)
        self._selector.unregister(descriptor)
        os.close(descriptor)
        status = exit_status(pid)
        self.deaths.append(Death(f"rank {rank}", status, time.monotonic()))
        if status != 0:
            self._is_failing()

    def _is_failing(self) -> None:
        if self.failing_since is None:
            self.failing_since = time.monotonic()

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
        if not line:
            return
        self.lines.append(line)
        for pattern in (_RETURN_CODE, _SSH_CODE):
            match = pattern.match(line)
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
        # The launcher may have waited for a rank before we could read its status. It then ends with
        # the status of the rank that it looked at first, which must not count as unknown here: the
        # echo of another rank would be taken for the cause.
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
        if first is not None:
            text = f"{first.name} {ending(first.status)}"
        elif status == 0:
            text = "the launcher has ended before its ranks"
        else:
            text = f"the launcher {ending(status)}"
        said = self._said()
        return f"{text}: {said}" if said else text

    def _said(self) -> str:
        """The last error that a rank printed, with the lines indented below it."""
        lines = list(self.lines)
        begins = [i for i, line in enumerate(lines) if _ERROR.match(line) and not _is_echo(line)]
        if not begins:
            return ""
        below = takewhile(lambda line: line.startswith("  "), lines[begins[-1] + 1 :])
        return "\n".join([lines[begins[-1]], *below])


def _is_echo(line: str) -> bool:
    return "another rank has ended" in line


def _window(terminal: int) -> bytes:
    try:
        return fcntl.ioctl(terminal, termios.TIOCGWINSZ, bytes(8))
    except OSError:
        return struct.pack("HHHH", 24, 80, 0, 0)


def _write_all(descriptor: int, content: bytes) -> None:
    """Write to our own output. The run continues even if the output is closed."""
    try:
        while content:
            content = content[os.write(descriptor, content) :]
    except OSError:
        return
