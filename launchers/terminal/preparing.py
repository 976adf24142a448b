"""What `magnetar prepare` and `magnetar prepare-pairs` have in common."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import rich.box
import rich.progress
import rich.table
from rich.console import Console

from magnetar.data.pairs.folder import PairsManifest
from magnetar.data.prepared_folder import Config, Reporter
from magnetar.data.text.token_files import Manifest

SECONDS_BETWEEN_LINES = 10.0
AnyConfig = TypeVar("AnyConfig", bound=Config)
AnyManifest = TypeVar("AnyManifest", Manifest, PairsManifest)


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


def prepare_and_print(
    config: AnyConfig,
    prepare: Callable[[AnyConfig, Reporter], AnyManifest],
    summary: Callable[[AnyManifest], tuple[rich.table.Table, Sequence[str]]],
) -> None:
    """Prepare a folder, and print what it holds.

    Args:
        config: what to prepare.
        prepare: makes the folder.
        summary: the table of its splits, and the lines below it, before the vocabulary.
    """
    was_there = config.out.exists()  # it is left as it is then
    with _terminal_reporter() as reporter:
        manifest = prepare(config, reporter)
    table, lines = summary(manifest)
    console = Console()
    console.print(table)
    console.print(
        *lines,
        f"vocabulary: {manifest.vocab_size:,} entries, {manifest.tokenizer_file}",
        f"{'up to date' if was_there else 'written'}: {config.out}",
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
def _terminal_reporter() -> Iterator[Reporter]:
    """A reporter that draws a bar on a terminal, and else writes a line now and then."""
    last = time.monotonic()

    def line(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def line_progress(stage: str, done_bytes: int, all_bytes: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            line(f"{stage}: {done_bytes / 1e6:,.0f} of {all_bytes / 1e6:,.0f} MB read")

    if not sys.stderr.isatty():
        yield Reporter(message=line, progress=line_progress)
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
