"""The time from the start of the launcher to the first step, part by part."""

import os
import time
from pathlib import Path

_STARTED = 19  # of /proc/PID/stat, counted from the state: ticks after the machine's start


class StartTimes:
    """Seconds of each part of a start, in their order, from the start of the launcher.

    Attributes:
        seconds: part -> its duration in seconds.
    """

    def __init__(self) -> None:
        """Read the start times of this process and of the launchers above it."""
        own = _started(os.getpid())
        self.seconds: dict[str, float] = {}
        self._begun = self._reached = _first_launcher_started(os.getppid(), own)
        if own > self._begun:
            self._end("launcher", own)

    def end(self, part: str) -> None:
        """End the current part, and begin the next."""
        self._end(part, _now())

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


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _started(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[_STARTED]) / os.sysconf("SC_CLK_TCK")


def _first_launcher_started(pid: int, otherwise: float) -> float:
    """The start time of the topmost of DeepSpeed's launchers above a process."""
    started = otherwise
    try:
        while is_launcher(pid):
            started = _started(pid)
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        pass
    return started


def is_launcher(pid: int) -> bool:
    """Whether a process is one of DeepSpeed's launchers; OSError if it is gone."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return any(
        word.startswith("deepspeed.launcher.") or Path(word).name == "deepspeed" for word in words
    )
