"""The live line of a training run, and the table at its end; rank 0 alone prints."""

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

# A log file gets a line now and then; a terminal gets one line that changes.
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
    """Shows records as they come. Does nothing on ranks other than 0."""

    def __init__(self, first_step: int, num_steps: int, shown: bool) -> None:
        """Prepare for the steps after `first_step`; `shown` is True on rank 0 alone."""
        self.first_step, self.num_steps, self.shown = first_step, num_steps, shown
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.live: Live | None = None
        self.started, self.printed = time.monotonic(), float("-inf")

    def __enter__(self) -> "ProgressLine":
        if self.shown and self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False)
            self.live.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.live is not None:
            self.live.stop()

    def update(self, record: dict[str, float]) -> None:
        """Show the record of a logged step."""
        if not self.shown:
            return
        line = self._line(record)
        now = time.monotonic()
        if self.live is not None:
            self.live.update(Text(line), refresh=True)
        elif now - self.printed >= SECONDS_BETWEEN_LINES or record["step"] == self.num_steps:
            self.console.print(line)
            self.printed = now

    def note(self, text: str) -> None:
        """Print a line that stays, above the live one."""
        if self.shown:
            self.console.print(text)

    def _line(self, record: dict[str, float]) -> str:
        step = int(record["step"])
        elapsed = time.monotonic() - self.started
        left = elapsed / max(1, step - self.first_step) * (self.num_steps - step)
        parts = [
            f"step {step:>{len(str(self.num_steps))}}/{self.num_steps}",
            f"loss {record['loss']:.4f}",
            f"ppl {record['perplexity']:,.1f}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
            f"grad norm {record['grad_norm']:.3f}",
        ]
        if "routing_entropy" in record:
            parts.append(f"routing entropy {record['routing_entropy']:.3f}")
        return "  ".join([*parts, f"{duration(left)} left"])


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A rich table: the first column is left-aligned, numbers right-aligned."""
    result = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        result.add_row(*row)
    return result
