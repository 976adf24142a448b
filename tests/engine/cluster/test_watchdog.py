import sys
import threading

import pytest

from magnetar.engine.cluster import watchdog
from magnetar.engine.cluster.watchdog import innermost_call
from tests.ranks import ROOT


def test_a_thread_is_found_where_our_code_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_SOURCES", ROOT)
    frames, event = [], threading.Event()
    thread = threading.Thread(target=lambda: waits(event))
    thread.start()
    while not frames or "wait, called" not in frames[-1]:
        assert thread.ident is not None
        frames.append(innermost_call(sys._current_frames().get(thread.ident)))
    event.set()
    thread.join()
    line = next(
        number
        for number, text in enumerate(
            (ROOT / "tests/engine/cluster/test_watchdog.py").open(), start=1
        )
        if text == "    event.wait(60)\n"
    )
    assert frames[-1] == f"wait, called by tests/engine/cluster/test_watchdog.py:{line}"


def waits(event: threading.Event) -> None:
    event.wait(60)


def test_a_thread_that_has_ended_is_nowhere() -> None:
    assert innermost_call(None) == "no code of Python"
