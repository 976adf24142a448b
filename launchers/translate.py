"""Translations by a trained model, a sentence a line, in one process.

magnetar translate runs/NAME --from en --to de --text "The sea is calm."
magnetar translate runs/NAME --from en --to de speech.txt --out speech.de.txt
magnetar translate runs/NAME --from en --to de --beam 1 < sentences.txt

Lines come out in their order, some hundred at a time; from a pipe or a terminal also whenever it
pauses for a moment. Ctrl-C keeps what has come out, and says how many lines that is.
"""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from magnetar.data.errors import UserError
from magnetar.data.text.lines import sentences_of, windows_of_input
from magnetar.launchers.terminal.command_line import (
    CommandParser,
    add_run_options,
    given_values,
    option_of,
    require_at_least_1,
)
from magnetar.launchers.terminal.user_errors import quiet_deepspeed, user_errors

if TYPE_CHECKING:
    from magnetar.engine.checkpoint.open_run import SavedModel
    from magnetar.engine.translation.translator import Translator

MAX_LENGTH_PENALTY = 10  # what n tokens are raised to must stay a number
WINDOW = 512  # lines that are sorted by length together, and come out together


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="magnetar translate", description=__doc__)
    add_run_options(
        parser,
        "the run's folder, such as runs/bible, or a folder of weights",
        "folder of the vocabulary (default: the run's, or the one that it was trained on)",
    )
    add = parser.add_argument
    add(
        "files",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="UTF-8 text, a sentence a line (default: standard input)",
    )
    add("--from", dest="source", required=True, metavar="LANG", help="language of the sentences")
    add("--to", dest="target", required=True, metavar="LANG", help="language to translate into")
    add("--text", help="a sentence, in place of files")
    add("--out", type=Path, metavar="FILE", help="where to write (default: standard output)")
    add("--beam", type=int, metavar="N", help="hypotheses; 1: greedy (4)")
    add(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="A",
        help="compare log p / tokens^A; more favours long translations (%(default)s)",
    )
    add("--sample", action="store_true", help="draw each token, in place of the search")
    add(
        "--temperature",
        type=float,
        metavar="T",
        help="with --sample: below 1 likelier tokens, above 1 others (1.0)",
    )
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="with --sample: the likeliest tokens that make up this probability (1.0)",
    )
    add("--seed", type=int, metavar="N", help="with --sample: of the draw (0)")
    add("--batch-size", type=int, default=32, metavar="N", help="sentences at once (%(default)s)")
    add(
        "--max-len",
        type=int,
        metavar="N",
        help="tokens of a translation (default: twice its source's and 20)",
    )
    add(
        "--too-long",
        choices=("split", "truncate", "refuse"),
        help="what happens to a sentence longer than the model's positions (default: what the "
        "run's data.pairs.too_long_inference says, or split)",
    )
    options = parser.parse_intermixed_args(arguments)  # a FILE may follow options
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    require_at_least_1(options, ("beam", "batch_size", "max_len"))
    if not 0 <= options.length_penalty <= MAX_LENGTH_PENALTY:
        raise UserError(
            f"--length-penalty {options.length_penalty:g} must be 0 to {MAX_LENGTH_PENALTY}: 0 "
            "compares plain probabilities, 1 those of a token"
        )
    for name in ("temperature", "top_p", "seed"):
        value, option = getattr(options, name), option_of(name)
        if value is not None and not options.sample:
            raise UserError(f"{option} {value:g} belongs to --sample: add it, or leave it out")
    if options.temperature is not None and not 0 < options.temperature < math.inf:
        raise UserError(
            f"--temperature {options.temperature:g} must be more than 0: 1 follows the model's own "
            "probabilities; --beam 1 without --sample takes the most probable token"
        )
    if options.sample and options.beam is not None and options.beam > 1:
        raise UserError(
            f"--sample and --beam {options.beam} exclude each other: a draw follows one "
            "hypothesis: leave one of them out"
        )
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise UserError(
            f"--top-p {options.top_p:g} must be more than 0 and at most 1: 1 allows every token"
        )
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise UserError(f"--seed {options.seed} must be 0 or more and less than 2^63")
    if options.text is not None and options.files:
        raise UserError(f"--text and {options.files[0]}: give one of the two")
    if options.source == options.target:
        raise UserError(f"--from and --to are both {options.source}: name two languages")
    if options.out is not None and options.out.is_dir():
        raise UserError(f"--out {options.out} is a folder: name a file")
    if options.out is not None and options.out.is_file():
        raise UserError(f"--out {options.out} exists: name a file that does not, or remove it")
    if options.out is not None and not options.out.parent.is_dir():
        raise UserError(f"--out {options.out}: {options.out.parent} is no folder: make it first")
    for file in options.files:
        if not file.is_file():
            raise UserError(f"{file} is not a file: name a text file, a sentence a line")


def warn_of_untrained(run: "SavedModel", options: argparse.Namespace) -> None:
    """Say so where the run has not learnt the direction, as far as its config or data tell."""
    if run.run_config is None or run.run_config.data.pairs is None:
        return
    learnt = run.run_config.data.pairs.directions
    if learnt is None:
        try:
            found = run.pairs(None).directions("train")
        except (UserError, OSError):  # the data need not be there
            return
        learnt = ["-".join(direction) for direction in found]
    asked = f"{options.source}-{options.target}"
    if asked not in learnt:
        print(
            f"warning: {options.run} has not learnt {asked}, and may write anything: it has learnt "
            f"{', '.join(learnt)}",
            file=sys.stderr,
        )


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Translate and print."""
    options = parse_arguments(arguments)
    quiet_deepspeed()
    from magnetar.data.pairs.codec import check_language
    from magnetar.engine.checkpoint.open_run import open_run
    from magnetar.engine.translation.translate import Decoding
    from magnetar.engine.translation.translator import Translator
    from magnetar.models.decoding.beam_search import Sampling

    run = open_run(options.run, options.checkpoint, options.data)
    for option, language in (("--from", options.source), ("--to", options.target)):
        try:
            check_language(language, run.codec.languages)
        except UserError as error:
            raise UserError(f"{option}: {error}") from None
    warn_of_untrained(run, options)
    given = given_values(options, Sampling._fields)
    sampling = Sampling(**given) if options.sample else None
    decoding = Decoding(
        options.beam or 4, options.length_penalty, options.max_len, sampling, options.batch_size
    )
    _translate_all(options, Translator(run, decoding, options.target, options.too_long))


def _translate_all(options: argparse.Namespace, translator: "Translator") -> None:
    """Write the translations of the input, window after window."""
    texts = sentences_of(options.text, options.files)
    size = max(WINDOW, 8 * options.batch_size)
    if texts is None:
        if sys.stdin.isatty():
            print("one sentence a line; Ctrl-D ends", file=sys.stderr)
        windows, total = windows_of_input(sys.stdin.buffer, size), None
    else:
        windows = (texts[first : first + size] for first in range(0, len(texts), size))
        total = sum(bool(text.strip()) for text in texts)
    num_written = 0
    try:
        # Lines of translations would run into a bar on the same terminal.
        with translation_bar(options.out is not None or not sys.stdout.isatty()) as progress:
            for window in windows:
                found = translator.lines(window, lambda more, _: progress(more, total))
                _write(found, options.out, "ab" if num_written else "wb")
                num_written = translator.num_done
    except KeyboardInterrupt:
        print(f"stopped: {_written(num_written, options.out)}", file=sys.stderr)
        raise
    except UserError as error:
        if not num_written:
            raise
        raise UserError(f"{error}; {_written(num_written, options.out)}") from error
    if not num_written:
        _write([], options.out, "wb")
    if said := translator.told():
        print(said, file=sys.stderr)


def _written(num_lines: int, out: Path | None) -> str:
    where = f" into {out}" if out is not None else ""
    return f"{num_lines:,} lines are translated and written{where}"


@contextmanager
def translation_bar(shown: bool = True) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on a terminal: what is yielded is told how many more are done, and how many of all."""
    console = Console(stderr=True)
    columns = (TextColumn("translating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not (shown and console.is_terminal)
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda more, total: bar.update(task, advance=more, total=total)


def _write(lines: Iterable[str], out: Path | None, mode: str) -> None:
    content = "".join(f"{line}\n" for line in lines).encode()
    if out is not None:
        try:
            with out.open(mode) as file:
                file.write(content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(out)) from None  # writing names no file
        return
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


if __name__ == "__main__":
    sys.exit(main())
