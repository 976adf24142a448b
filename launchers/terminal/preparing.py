"""What `magnetar prepare` and `magnetar prepare-pairs` have in common."""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import rich.box
import rich.progress
import rich.table
from rich.console import Console

from magnetar.data.pairs.folder import PairsManifest
from magnetar.data.prepared_folder import Reporter
from magnetar.data.text.token_files import Manifest

SECONDS_BETWEEN_LINES = 10.0


def add_options(parser: argparse.ArgumentParser, tokenizer: str, metavar: str) -> None:
    """The options of both: the folder, its vocabulary, and the processes."""
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    add("--vocab-size", type=int, metavar="N", help="train a SentencePiece vocabulary")
    add("--tokenizer", type=Path, metavar=metavar, help=tokenizer)
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: every core, %(default)s here)",
    )


def print_summary(
    table: rich.table.Table,
    lines: Sequence[str],
    manifest: Manifest | PairsManifest,
    out: Path,
    was_there: bool,
) -> None:
    """Print what a prepared folder holds.

    Args:
        table: its splits.
        lines: what stands below them, before the vocabulary.
        manifest: the folder's.
        out: the folder.
        was_there: whether nothing had to be done.
    """
    console = Console()
    console.print(table)
    console.print(
        *lines,
        f"vocabulary: {manifest.vocab_size:,} entries, {manifest.tokenizer_file}",
        f"{'up to date' if was_there else 'written'}: {out}",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )


def summary_table(columns: Sequence[str], texts: Sequence[str]) -> rich.table.Table:
    """An empty table whose columns are right-aligned but for those that hold texts."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="left" if column in texts else "right")
    return table


@contextmanager
def terminal_reporter() -> Iterator[Reporter]:
    """A reporter that draws a bar on a terminal, and else writes a line now and then."""
    if not sys.stderr.isatty():
        yield Reporter(message=_print_line, progress=_LineProgress())
        return
    columns = [
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
    ]
    with rich.progress.Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, rich.progress.TaskID] = {}

        def progress(stage: str, done_bytes: int, all_bytes: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=all_bytes)
            bars.update(tasks[stage], completed=done_bytes)

        yield Reporter(message=bars.console.print, progress=progress)


def _print_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _LineProgress:
    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, stage: str, done_bytes: int, all_bytes: int) -> None:
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            _print_line(f"{stage}: {done_bytes / 1e6:,.0f} of {all_bytes / 1e6:,.0f} MB read")
