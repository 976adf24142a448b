"""Makes the prepared folder that training reads.

magnetar prepare --corpus sotu --vocab-size 2000 --out prepared/sotu
magnetar prepare --train 'text/*.jsonl.zst' --tokenizer gpt2/ --out prepared/own
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import rich.box
import rich.progress
import rich.table
from rich.console import Console

from magnetar.data.prepared_folder import Reporter
from magnetar.data.text.corpus import Documents
from magnetar.data.text.prepare import DEFAULT_VALID_FRACTION, PrepareConfig, prepare
from magnetar.data.text.token_files import Manifest
from magnetar.launchers.user_errors import user_errors

SECONDS_BETWEEN_LINES = 10.0


def parse_arguments(arguments: Sequence[str] | None = None) -> PrepareConfig:
    """The command line as a config."""
    parser = argparse.ArgumentParser(
        prog="magnetar prepare",
        description="Tokenise text into a folder that training reads. Stopped runs resume: give "
        "the same command again.",
    )
    add = parser.add_argument
    add("--corpus", help="a known corpus: sotu")
    add(
        "--train", nargs="+", default=[], metavar="GLOB", help=".txt .jsonl .parquet [.gz .xz .zst]"
    )
    add("--valid", nargs="+", default=[], metavar="GLOB", help="validation files")
    add(
        "--valid-fraction",
        type=float,
        metavar="F",
        help=f"without --valid: part of the training documents (default {DEFAULT_VALID_FRACTION})",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    add("--vocab-size", type=int, metavar="N", help="train a SentencePiece vocabulary")
    add("--tokenizer", type=Path, metavar="PATH", help=".model, tokenizer.json, or GPT-2's folder")
    add(
        "--documents",
        choices=get_args(Documents),
        default="file",
        help="what a document of a .txt file is (default %(default)s)",
    )
    add("--text-key", default="text", help="key of the text in .jsonl and .parquet")
    add("--seed", type=int, default=0, help="of the choice of validation documents")
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: every core, %(default)s here)",
    )
    values = vars(parser.parse_args(arguments))
    return PrepareConfig(**{**values, "train": (*values["train"],), "valid": (*values["valid"],)})


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


def print_summary(manifest: Manifest, out: Path, was_there: bool) -> None:
    """Prints what the folder holds, and whether it was there before."""
    columns = ("split", "documents", "tokens", "bytes", "bytes per token")
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="left" if column == "split" else "right")
    for name, split in manifest.splits.items():
        counts = (split.num_documents, split.num_tokens, split.num_bytes)
        ratio = split.num_bytes / split.num_tokens
        table.add_row(name, *(f"{count:,}" for count in counts), f"{ratio:.3f}")
    console = Console()
    console.print(table)
    console.print(
        f"vocabulary: {manifest.vocab_size:,} entries, {manifest.tokenizer_file}\n"
        f"{'up to date' if was_there else 'written'}: {out}",
        highlight=False,
        soft_wrap=True,
    )


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_arguments(arguments)
    was_there = config.out.exists()  # `prepare` then leaves it as it is
    with terminal_reporter() as reporter:
        manifest = prepare(config, reporter)
    print_summary(manifest, config.out, was_there)


if __name__ == "__main__":
    main()
