"""What holds for every test: where it runs, on how many threads, and what it is skipped for."""

import os
from collections import Counter

import pytest
import torch

from tests import machine

machine.imitate()
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, so that no process waits at the end for one of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


# First, so that no fixture is made for a test that is skipped.
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs what this machine lacks, and say so."""
    for need in needs(item):
        if (reason := machine.lacks(need)) is not None:
            pytest.skip(reason)


def needs(item: pytest.Item) -> list[str]:
    """Keys of machine.PROBES that a test's markers name."""
    # GPUs first: they decide what arithmetic there is.
    found = ["1 GPU"] * any(item.iter_markers("gpu"))
    found += ["2 GPUs"] * any(item.iter_markers("multi_gpu"))
    return found + [need for marker in item.iter_markers("needs") for need in marker.args]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what this machine could not show: each reason, and how many tests it skipped."""
    reports = terminalreporter.stats.get("skipped", [])
    # Of a whole file that skips itself, each process of pytest-xdist sends a report.
    reasons = {report.nodeid: report.longrepr[2].removeprefix("Skipped: ") for report in reports}
    if not reasons:
        return
    terminalreporter.section("not shown on this machine")
    for reason, number in Counter(reasons.values()).most_common():
        terminalreporter.line(f"{number:4} test{'s' if number > 1 else ' '}  {reason}")
