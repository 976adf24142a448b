"""The watchdog finds a rank that hangs, for which all others would wait forever.

A thread of every rank writes a heartbeat and the current action of its rank to the rendezvous
store. When a rank has not advanced for the time limit, its thread reads the entries of the others
and names the rank that all wait for. Then it ends its own process with status 3, and the launcher
ends the rest.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from magnetar.engine.cluster import logbook
from magnetar.engine.cluster.rendezvous import another_connection

STATUS = 3
_SOURCES = Path(__file__).parents[2]  # the folder of the package
_KEY = "magnetar/watchdog"
_SECONDS_FOR_THE_LOGBOOK = 5.0
_STORE_TIMEOUT = timedelta(seconds=30)


def innermost_call(frame: FrameType | None) -> str:
    """The place of a thread of ours, such as `all_reduce, called by engine/sparse_clip.py:95`."""
    collective = called = ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_SOURCES) and ".venv" not in path.parts:
            place = f"{path.relative_to(_SOURCES)}:{frame.f_lineno}"
            return f"{collective or called or frame.f_code.co_name}, called by {place}"
        called = frame.f_code.co_name
        if path.name == "distributed_c10d.py":
            collective = collective or called
        frame = frame.f_back
    return called or "no code of Python"


class Watchdog:
    """Watches this rank, from the `with` statement to its end.

    Without other ranks, or with no limit, it does nothing.
    """

    def __init__(self, run_dir: Path, limit: float | None) -> None:
        """Prepare to report into the run's logbook after `limit` seconds without progress."""
        self.run_dir, self.limit = run_dir, limit
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.doing, self.since = "starting", time.monotonic()
        self._period = min(10.0, (limit or 0.0) / 4)
        self._main = threading.get_ident()
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.limit is not None and self.num_ranks > 1:
            for work in (self._tell, self._watch):
                threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def beat(self, doing: str) -> None:
        """Write a heartbeat with the next action of this rank, such as "step 12"."""
        self.doing, self.since = doing, time.monotonic()

    def _tell(self) -> None:
        try:
            store, awake = another_connection(_STORE_TIMEOUT), 0
            while not self._ended.wait(self._period):
                awake += 1
                where = innermost_call(sys._current_frames().get(self._main))
                told = {"awake": awake, "doing": self.doing, "where": where}
                store.set(f"{_KEY}/{self.rank}", json.dumps(told))
        except RuntimeError:  # rank 0, which keeps the store, has ended
            return

    def _watch(self) -> None:
        assert self.limit is not None
        while not self._ended.wait(self._period):
            since = self.since
            if time.monotonic() - since <= self.limit:
                continue
            # If rank 0 does not answer, every rank finds it out for itself.
            found = [("rank 0 does not answer, nor does the store that it serves", self.rank)]
            # A question to a dead rank 0 may never return.
            _run_aside(self._ask, found, seconds=8 * self._period)
            text, reporter = found[-1]
            if reporter != self.rank:
                # It ends this rank, too; if it does not, it has found nothing wrong itself.
                self._ended.wait(4 * self._period)
            if self._ended.is_set() or self.since != since:
                continue  # the rank was slow, but does not hang
            self._report(text)
            os._exit(STATUS)  # sys.exit would wait for the main thread, which hangs

    def _ask(self, found: list[tuple[str, int]]) -> None:
        """Append the silent ranks and the places of the others, and the rank that reports it."""
        store = another_connection(_STORE_TIMEOUT)
        before = self._told(store)
        time.sleep(3 * self._period)
        silent, waiting, answering = [], [], []
        for rank, (then, now) in enumerate(zip(before, self._told(store), strict=True)):
            place = f"in {now['doing']}: {now['where']}" if now else "nowhere yet"
            if then.get("awake") == now.get("awake"):
                silent.append(f"rank {rank} does not answer (it was {place})")
            else:
                waiting.append(f"rank {rank} is {place}")
                answering.append(rank)
        # All waiting ranks find it out at the same time; one of them reports.
        found.append(("; ".join([*silent, *waiting]), min(answering, default=self.rank)))

    def _told(self, store: dist.TCPStore) -> list[dict[str, Any]]:
        keys = [f"{_KEY}/{rank}" for rank in range(self.num_ranks)]
        return [json.loads(store.get(key)) if store.check([key]) else {} for key in keys]

    def _report(self, text: str) -> None:
        message = f"nothing has happened for {self.limit:g} seconds: {text}"
        print(
            f"error: {message}. The same command goes on from the last checkpoint; if it was only "
            "slow, raise magnetar.guards.hang_timeout_seconds",
            file=sys.stderr,
            flush=True,
        )
        # The disk may be the cause of the hang.
        _run_aside(self._log, message, seconds=_SECONDS_FOR_THE_LOGBOOK)

    def _log(self, message: str) -> None:
        with suppress(OSError):
            logbook.write(self.run_dir, "hang", message)


def _run_aside(call: Callable[..., None], *arguments: Any, seconds: float) -> None:
    """Call a function in a thread, and wait for it no longer than some seconds."""
    thread = threading.Thread(target=call, args=arguments, daemon=True)
    thread.start()
    thread.join(seconds)
