"""The time of one forward and backward pass by kernels, launches and synchronisations."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

WARM_UP = 5
PASS = "one forward and backward pass"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
RUNTIME = ("cuda_runtime", "cuda_driver")
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch")
SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def profile_table(step: Callable[[], None], device: torch.device, num_rows: int = 25) -> str:
    """A Markdown list of the time of one step, which is run after a warm-up."""
    for _ in range(WARM_UP):
        step()
    return report(traced(step, device, PASS), num_rows)


def traced(step: Callable[[], Any], device: torch.device, name: str) -> list[dict[str, Any]]:
    """The events of a Chrome trace of two steps, the second of which has a name."""
    is_cuda = device.type == "cuda"
    finish = torch.cuda.synchronize if is_cuda else lambda: None
    finish()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_cuda) as profiler:
        step()  # the first pass in a profile pays for its setting up
        finish()
        with record_function(name):
            step()
            finish()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return json.loads(file.read_text())["traceEvents"]


def within(events: list[dict[str, Any]], name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The event of a name, and all events that begin within it."""
    complete = [event for event in events if event.get("ph") == "X"]
    (outer,) = (e for e in complete if e["name"] == name and e["cat"] == "user_annotation")
    begin, end = outer["ts"], outer["ts"] + outer["dur"]
    return outer, [event for event in complete if begin <= event["ts"] <= end]


def report(events: list[dict[str, Any]], num_rows: int) -> str:
    """Markdown of the events of a Chrome trace (times in microseconds) that belong to PASS.

    It lists the kernels on a GPU, and elsewhere the operators by their own time.
    """
    outer, inside = within(events, PASS)
    calls = [event for event in inside if event["cat"] in RUNTIME]
    # A kernel starts after the call that launched it, maybe after the pass has returned.
    launched = {event.get("args", {}).get("correlation") for event in calls} - {None}
    kernels = [
        event
        for event in events
        if event.get("cat") in ON_DEVICE and event.get("args", {}).get("correlation") in launched
    ]
    if not kernels:
        operators = own_times([event for event in inside if event["cat"] == "cpu_op"])
        return _rows(operators, outer["dur"], num_rows)
    span = max(e["ts"] + e["dur"] for e in kernels) - min(e["ts"] for e in kernels)
    busy = sum(event["dur"] for event in kernels)
    names = [event["name"] for event in calls]
    copies = sum("DtoH" in event["name"] for event in kernels if event["cat"] == "gpu_memcpy")
    return (
        f"first kernel to last {span / 1000:.3f} ms, kernels {busy / 1000:.3f} ms, between them "
        f"{(span - busy) / 1000:.3f} ms; {sum(n.startswith(LAUNCHES) for n in names)} launches, "
        f"{sum(n in SYNCHRONISATIONS for n in names)} synchronisations, "
        f"{copies} copies to the host\n\n"
        + _rows([(e["name"], e["dur"]) for e in kernels], busy, num_rows)
    )


def own_times(operators: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Name and microseconds of each operator without those it called, on its thread."""
    own: list[tuple[str, float]] = []
    by_thread = defaultdict(list)
    for event in operators:
        by_thread[event["tid"]].append(event)
    for events in by_thread.values():
        events.sort(key=lambda event: (event["ts"], -event["dur"]))
        open_ones: list[tuple[float, int]] = []  # when an outer operator ends, its place in `own`
        for event in events:
            while open_ones and open_ones[-1][0] <= event["ts"]:
                open_ones.pop()
            if open_ones:
                name, microseconds = own[open_ones[-1][1]]
                own[open_ones[-1][1]] = (name, microseconds - event["dur"])
            open_ones.append((event["ts"] + event["dur"], len(own)))
            own.append((event["name"], event["dur"]))
    return own


def _rows(times: list[tuple[str, float]], total: float, num_rows: int) -> str:
    sums: dict[str, float] = defaultdict(float)
    numbers: dict[str, int] = defaultdict(int)
    for name, microseconds in times:
        sums[name] += microseconds
        numbers[name] += 1
    lines = ["| milliseconds | share | calls | |", "|---|---|---|---|"]
    for name in sorted(sums, key=lambda name: -sums[name])[:num_rows]:
        short = name if len(name) <= 90 else name[:87] + "..."
        lines.append(
            f"| {sums[name] / 1000:.3f} | {sums[name] / total:.1%} | {numbers[name]} | `{short}` |"
        )
    return "\n".join(lines) + "\n"
