"""The live lines of a training run, and its tables; only rank 0 prints."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from magnetar.engine.cluster import logbook

# A terminal has a bar and a line that change in place. A log file gets a line now and then.
SECONDS_BETWEEN_LINES = 10.0


def duration(seconds: float) -> str:
    """12 -> "12s", 200 -> "3m20s", 4000 -> "1h06m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class ProgressLine:
    """Shows the record of each logged step; does nothing on ranks other than 0."""

    def __init__(self, first_step: int, num_steps: int, shown: bool) -> None:
        """Prepare for the steps after `first_step`; `shown` is True on rank 0 only."""
        self.first_step, self.num_steps, self.shown = first_step, num_steps, shown
        self.console = Console(file=sys.stdout, highlight=False)
        self.live: Live | None = None
        self.started, self.printed = time.monotonic(), float("-inf")
        self.bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[times]}"),
            console=self.console,
            auto_refresh=False,
        )
        self.task = self.bar.add_task("", total=num_steps, completed=first_step, times="")

    def __enter__(self) -> "ProgressLine":
        self.started = time.monotonic()
        if self.shown and self.console.is_terminal:
            self.live = Live(self.bar, console=self.console, auto_refresh=False)
            self.live.start(refresh=True)
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.live is not None:
            self.live.stop()

    def update(self, record: dict[str, float]) -> None:
        """Show the record of a logged step."""
        if not self.shown:
            return
        step, now = int(record["step"]), time.monotonic()
        elapsed = now - self.started
        left = duration(elapsed / max(1, step - self.first_step) * (self.num_steps - step))
        if self.live is not None:
            times = f"{duration(elapsed)} gone, {left} left"
            self.bar.update(self.task, completed=step, times=times)
            line = Text(metrics_line(record), no_wrap=True, overflow="ellipsis")
            self.live.update(Group(self.bar, line), refresh=True)
        elif now - self.printed >= SECONDS_BETWEEN_LINES or step == self.num_steps:
            width = len(str(self.num_steps))
            self.note(f"step {step:>{width}}/{self.num_steps}  {metrics_line(record)}  {left} left")
            self.printed = now

    def note(self, text: str) -> None:
        """Print lines that stay, above the live ones."""
        if self.shown:
            self.console.print(text, markup=False, soft_wrap=True)


class RunLog:
    """The terminal and the logbook of a run; only rank 0 writes."""

    def __init__(self, run_dir: Path, progress: ProgressLine) -> None:
        self.run_dir, self.progress = run_dir, progress

    def write(self, event: str, text: str) -> None:
        """Write an event into the logbook."""
        if self.progress.shown:
            logbook.write(self.run_dir, event, text)

    def tell(self, event: str, text: str) -> None:
        """Print an event, and write it into the logbook."""
        self.progress.note(text)
        self.write(event, text)


def metrics_line(record: dict[str, float]) -> str:
    """The metrics that a person watches, in about 80 columns."""
    parts = [
        f"loss {record['loss']:.4f}",
        f"ppl {record['perplexity']:,.1f}",
        f"grad norm {record['grad_norm']:.3f}",
    ]
    if "routing_entropy" in record:
        parts.append(f"routing entropy {record['routing_entropy']:.3f}")
    return "  ".join([*parts, f"{record['tokens_per_second']:,.0f} tokens/s"])


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A rich table: the first column is left-aligned, numbers right-aligned."""
    result = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        result.add_row(*row)
    return result
