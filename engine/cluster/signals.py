"""Signals to a run in training: save, or save and stop.

| signal | the run |
|---|---|
| SIGTERM | saves a checkpoint after the step that it is in, and ends with status 0 |
| SIGINT (Ctrl-C) | does the same; a second one ends it at once, with status 130 |
| SIGUSR1 (a batch system's warning) | saves a checkpoint after its step, and continues |

One rank or all of them may get the signal; `engine.guards` has the ranks agree on the step. The
`deepspeed` command hands no signal on, and leaves its ranks behind when a signal ends it. So a rank
whose launcher is gone acts as if it had got SIGTERM.
"""

import os
import select
import signal
import sys
import threading
from itertools import takewhile
from pathlib import Path

import psutil

_ENDED_BY_CTRL_C = 130
_LOOK_EVERY = 1.0  # seconds between two checks of the launchers


def launchers_above(pid: int) -> list[psutil.Process]:
    """DeepSpeed's launchers among the ancestors of a process, from its parent on."""

    def is_launcher(process: psutil.Process) -> bool:
        words = process.cmdline()
        return any(
            w.startswith("deepspeed.launcher.") or Path(w).name == "deepspeed" for w in words
        )

    try:
        return list(takewhile(is_launcher, psutil.Process(pid).parents()))
    except psutil.Error:  # one is just ending
        return []


def _is_alive(process: psutil.Process) -> bool:
    """Whether a process lives; one that ended and was not waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class Requests:
    """The requests of signals; a context manager that installs the handlers for its time.

    Attributes:
        stop: name of the signal that asks to save and stop, or "".
        save: whether a signal asks for a checkpoint.
    """

    def __init__(self) -> None:
        self.stop = ""
        self.save = False
        self._launchers = launchers_above(os.getpid())
        self._handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Requests":
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        # Python runs a handler when it has the main thread again, and a collective whose other
        # ranks are gone never gives it back. The number of a signal reaches the pipe in any case.
        self._before = signal.set_wakeup_fd(self._writing)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._handlers[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(reading,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._before)
        os.close(self._writing)  # which ends the thread

    def _listen(self, reading: int) -> None:
        while True:
            if select.select([reading], [], [], _LOOK_EVERY)[0]:
                received = os.read(reading, 1)
                if not received:
                    break
                self.take(received[0])
            elif not self.stop and not all(map(_is_alive, self._launchers)):
                self.stop = "the end of its launcher"
        os.close(reading)

    def take(self, number: int) -> None:
        """Take a signal."""
        if number == signal.SIGUSR1:
            self.save = True
        elif number == signal.SIGTERM:
            self.stop = self.stop or "SIGTERM"
        elif number == signal.SIGINT:
            if self.stop == "Ctrl-C":
                sys.stdout.flush()
                os._exit(_ENDED_BY_CTRL_C)
            self.stop = "Ctrl-C"
