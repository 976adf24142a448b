"""The supervisor restarts a training after a crash, on the machines that are left."""

import os
import secrets
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.format import checkpoint_folders, step_of
from magnetar.engine.cluster import logbook
from magnetar.engine.cluster.hosts import LaunchOptions, address_of, on_hosts
from magnetar.engine.config.schema import load_config
from magnetar.engine.supervise.launched_run import (
    Launched,
    kill_processes,
    run_processes,
    signal_ranks,
)
from magnetar.engine.supervise.shrink_run import fitted_settings

FINISHED, BAD_INPUT, CRASHED, INTERRUPTED = 0, 2, 1, 130
_SECONDS_FOR_A_SHARED_DISK = 60.0  # until it shows what another machine has written, at most
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Options(LaunchOptions):
    """The options of the supervisor and of the run.

    Attributes:
        config: the run's JSON.
        max_restarts: largest number of restarts in a row without a new checkpoint.
        backoff: pause in seconds before a restart, doubled for each further one without progress.
        max_backoff: longest pause in seconds.
    """

    config: Path
    max_restarts: int = 10
    backoff: float = 5.0
    max_backoff: float = 300.0


class Place(NamedTuple):
    """The machines of one start.

    Attributes:
        slots: host -> slots that take part; empty: this machine, as the launcher finds it.
        left_out: hosts that did not answer.
        is_remote: whether hosts are reached over ssh.
        first: host that the user's master_addr belongs to.
    """

    slots: dict[str, list[int]]
    left_out: tuple[str, ...] = ()
    is_remote: bool = False
    first: str | None = None

    @property
    def num_ranks(self) -> int:
        """Largest number of ranks; 0 if only the launcher knows it."""
        return sum(map(len, self.slots.values()))

    def of_first_ranks(self, num_ranks: int) -> "Place":
        """The same place with only its first `num_ranks` slots."""
        slots: dict[str, list[int]] = {}
        for host, there in self.slots.items():
            if taken := there[: num_ranks - sum(map(len, slots.values()))]:
                slots[host] = taken
        return self._replace(slots=slots)


def last_saved_step(run_dir: Path) -> int:
    """Step of the run's newest checkpoint, damaged or not; 0 if there is none."""
    return max(map(step_of, checkpoint_folders(run_dir)), default=0)


class Supervisor:
    """Starts, watches and restarts one run."""

    def __init__(self, options: Options) -> None:
        """Read the run's folder from the JSON.

        Raises:
            UserError: if the JSON or the hostfile is wrong.
        """
        self.options = options
        config = load_config(options.config, options.settings)
        self.run_dir = Path(config.training.run_dir)
        self.run_id = secrets.token_hex(8)
        self.signals: deque[int] = deque()
        self.stopping: signal.Signals | None = None  # the signal that asked for it
        self.hosts: set[str] = set()  # hosts on which this run may have processes
        self.wanted_ranks = self._place(set()).num_ranks
        self.wake, self._woken = os.pipe()
        os.set_blocking(self._woken, False)

    def run(self) -> int:
        """The exit status, after supervising the run to its end."""
        handlers = {
            number: signal.signal(number, lambda number, _: self.signals.append(number))
            for number in (*_STOPPING, signal.SIGUSR1, signal.SIGWINCH)
            if signal.getsignal(number) is not signal.SIG_IGN  # nohup
        }
        before = signal.set_wakeup_fd(self._woken)
        try:
            return self._run()
        except UserError as error:
            self._say("give-up", f"{error}")
            return BAD_INPUT
        finally:
            signal.set_wakeup_fd(before)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        num_idle = 0  # restarts since the last new checkpoint
        reached = last_saved_step(self.run_dir)
        while True:
            status, cause = self._start_and_watch()
            if cause == "":
                return status
            saved = last_saved_step(self.run_dir)
            num_idle = 0 if saved > reached else num_idle
            reached = max(saved, reached)
            if num_idle == self.options.max_restarts:
                self._say(
                    "give-up",
                    f"{cause}. {num_idle} restarts made no checkpoint beyond step {reached}: "
                    "mend the cause, and start the same command again",
                )
                return status
            seconds = min(self.options.backoff * 2**num_idle, self.options.max_backoff)
            num_idle += 1
            self._say(
                "restart",
                f"{cause}. Going on after step {reached} in {seconds:g} s (restart {num_idle} of "
                f"{self.options.max_restarts} without a new checkpoint)",
            )
            self._sleep(seconds)
            if self.stopping is not None:
                return self._stopped(f"by {self.stopping.name} while waiting to restart")

    def _start_and_watch(self) -> tuple[int, str]:
        """Status of one start, and the cause of its crash; "" if it must not be restarted."""
        place, settings = self._fitted_place()
        if self.options.hostfile is not None and not place.slots:
            return CRASHED, f"no host of {self.options.hostfile} answers over ssh"
        self.hosts = set(place.slots) if place.is_remote else set()
        self._kill_left()  # of a start whose host did not answer then
        before = self._book()
        launched = Launched(self._command(place, settings), self.run_id, self.wake)
        try:
            while launched.watch(0.5):
                why = self._pass_signals(launched)
                if why and self.stopping is not None:
                    self._kill_left()
                    return self._stopped(f"at once by {self.stopping.name}: {why}"), ""
                if launched.is_hopeless:
                    break
            num_left = self._kill_left()
        finally:
            kill_processes(self.run_id)
            launched.close()
        return self._outcome(launched, num_left, before)

    def _outcome(self, launched: Launched, num_left: int, before: bytes) -> tuple[int, str]:
        status, cause = launched.status, launched.cause()
        if status == 0 and num_left == 0 and self.stopping is not None:
            return self._ended_well(f"stopped by {self.stopping.name}"), ""
        if status == 0 and num_left == 0:
            give_up = time.monotonic() + _SECONDS_FOR_A_SHARED_DISK * bool(self.hosts)
            while self._book() == before and time.monotonic() < give_up:
                time.sleep(0.5)
            if self._book() != before:
                return self._ended_well("finished"), ""
            self._say(
                "give-up",
                f"the ranks have ended with status 0, and none has written into {self.run_dir}: "
                "they have trained in another folder. Give every machine the same JSON, and "
                "training.run_dir on a disk that all of them and this one share",
            )
            return CRASHED, ""
        if self.stopping is not None:
            return self._stopped(f"by {self.stopping.name}, saving nothing: {cause}"), ""
        if status in (BAD_INPUT, INTERRUPTED):
            self._say("give-up", f"{cause}. A restart would not help")
            return status, ""
        return CRASHED, cause

    def _ended_well(self, how: str) -> int:
        saved = last_saved_step(self.run_dir)
        self._say("exit", f"{how}; the newest checkpoint is of step {saved}" if saved else how)
        return FINISHED

    def _book(self) -> bytes:
        """The logbook, to which each start adds a line."""
        with suppress(OSError):
            return (self.run_dir / logbook.NAME).read_bytes()
        return b""

    def _fitted_place(self) -> tuple[Place, list[str]]:
        """The machines of the next start, and the settings that fit the run to them."""
        options = self.options
        place = self._place(set())
        if options.hostfile is None:
            return place, list(options.settings)
        if place.is_remote:
            answers = on_hosts(place.slots, ["true"], options.ssh_port)
            place = self._place({host for host, answer in answers.items() if answer is None})
        for host in place.left_out:
            self._tell(f"{host} does not answer over ssh: it is left out")
        if not place.slots:
            return place, []
        layout, settings = fitted_settings(
            options.config, options.settings, self.wanted_ranks, place.num_ranks
        )
        if place.num_ranks != self.wanted_ranks:
            self._say(
                "change",
                f"{place.num_ranks} of {self.wanted_ranks} ranks are there"
                + (f" ({', '.join(place.left_out)} left out)" if place.left_out else "")
                + f": going on with {layout}",
            )
        return place.of_first_ranks(layout.num_ranks), settings

    def _place(self, silent: set[str]) -> Place:
        """The machines of the current hostfile, without the hosts that do not answer."""
        slots = self.options.slots()
        left = {host: numbers for host, numbers in slots.items() if host not in silent}
        is_remote = self.options.is_remote(slots)
        return Place(left, tuple(sorted(silent)), is_remote, next(iter(slots), None))

    def _command(self, place: Place, settings: Sequence[str]) -> list[str]:
        """The launcher's command line for one start."""
        words = [sys.executable, "-m", "deepspeed.launcher.runner"]
        words += self.options.words(self._master_addr(place), place.slots, place.is_remote)
        return words + self.options.training(settings)

    def _master_addr(self, place: Place) -> str:
        host = next(iter(place.slots), "")
        if self.options.master_addr is not None and host == place.first:
            return self.options.master_addr
        return address_of(host, self.options.ssh_port) if place.is_remote else "127.0.0.1"

    def _pass_signals(self, launched: Launched) -> str:
        """Hand arrived signals on; the reason to end everything at once, or ""."""
        while self.signals:
            number = self.signals.popleft()
            if number == signal.SIGWINCH:
                launched.resize()
                continue
            if number == signal.SIGINT and self.stopping == signal.SIGINT:
                return "it came twice"
            if number in _STOPPING:
                self.stopping = signal.Signals(number)
            # A closed terminal is no reason to lose steps, and ranks know nothing of SIGHUP.
            sent = signal.SIGTERM if number == signal.SIGHUP else number
            num_ranks = signal_ranks(self.run_id, sent)
            answers = self._on_other_hosts("signal_ranks", sent)
            num_ranks += sum(int(answer) for answer in answers if answer)
            self._tell(f"{signal.Signals(sent).name} goes to {num_ranks} ranks")
            if self.stopping is not None and num_ranks == 0:
                return "no rank has begun"
        return ""

    def _sleep(self, seconds: float) -> None:
        """Wait, or until a signal asks to stop."""
        until = time.monotonic() + seconds
        while self.stopping is None and time.monotonic() < until:
            time.sleep(min(0.1, seconds))
            while self.signals:
                if (number := self.signals.popleft()) in _STOPPING:
                    self.stopping = signal.Signals(number)

    def _kill_left(self) -> int:
        """Number of processes of the run that were left on all hosts, after killing them."""
        num_left = sum(process.rank is not None for process in run_processes(self.run_id))
        stuck = kill_processes(self.run_id)
        if stuck:
            self._tell(f"{stuck} processes cannot be killed: they wait for a disk or a device")
        self._on_other_hosts("kill_processes")
        return num_left

    def _on_other_hosts(self, function: str, *arguments: int) -> list[str | None]:
        """Results of a function of `launched_run` on the other hosts, in the same folder."""
        call = f"{function}({', '.join(map(repr, (self.run_id, *map(int, arguments))))})"
        program = f"from magnetar.engine.supervise.launched_run import *; print({call})"
        there = 'cd "$1" && exec "$2" -c "$3"'
        words = ["sh", "-c", there, "sh", os.getcwd(), sys.executable, program]
        return list(on_hosts(sorted(self.hosts), words, self.options.ssh_port).values())

    def _stopped(self, how: str) -> int:
        """The status after a signal has stopped the run; `how` begins with "by" or "at once"."""
        assert self.stopping is not None
        self._say("exit", f"stopped {how}")
        return 128 + self.stopping

    def _say(self, event: str, text: str) -> None:
        """Write to the logbook and to the terminal."""
        self._tell(f"{event}: {text}")
        try:
            logbook.write(self.run_dir, event, text)
        except OSError as error:  # a full disk must not stop the run
            self._tell(f"the logbook cannot be written: {error}")

    def _tell(self, text: str) -> None:
        with suppress(OSError):
            print(f"supervise: {text}", file=sys.stderr, flush=True)
