"""The time from the start of the launcher to the first step, part by part."""

import os
import time
from contextlib import suppress
from pathlib import Path

from magnetar.engine.cluster.signals import launchers_above

_STARTED = 19  # of /proc/PID/stat, counted from the state: ticks after the machine's start


class StartTimes:
    """Seconds of each part of a start, in their order, from the start of the launcher.

    Attributes:
        seconds: part -> its duration in seconds.
    """

    def __init__(self) -> None:
        """Read the start times of this process and of the launchers above it."""
        own = self._begun = _started(os.getpid())
        for launcher in launchers_above(os.getpid()):
            with suppress(OSError):  # it has ended
                self._begun = _started(launcher.pid)
        self.seconds: dict[str, float] = {}
        self._reached = self._begun
        if own > self._begun:
            self._end("launcher", own)

    def end(self, part: str) -> None:
        """End the current part, and begin the next."""
        self._end(part, time.clock_gettime(time.CLOCK_BOOTTIME))

    def _end(self, part: str, now: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._reached
        self._reached = now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"{self._reached - self._begun:.1f} s: {parts}"


def parsed_times(text: str) -> dict[str, float]:
    """The seconds of each part, parsed from a text that `str` has made."""
    pairs = (part.rpartition(" ") for part in text.partition(": ")[2].split(", "))
    return {name: float(seconds) for name, _, seconds in pairs}


def _started(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[_STARTED]) / os.sysconf("SC_CLK_TCK")
