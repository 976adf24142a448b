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
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from magnetar.data.errors import UserError
from magnetar.data.text.lines import sentences_of, windows_of_input
from magnetar.launchers.terminal.command_line import (
    AT_LEAST_1,
    COUNT,
    LENGTH_PENALTY,
    SEED,
    TOP_P,
    CommandParser,
    add_option,
    add_run_options,
    given_values,
    option_of,
    terminal_bar,
)
from magnetar.launchers.terminal.user_errors import quiet_deepspeed, user_errors

if TYPE_CHECKING:
    from magnetar.engine.checkpoint.open_run import SavedModel
    from magnetar.engine.translation.translator import Translator

WINDOW = 512  # lines that are sorted by length together, and come out together


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="magnetar translate", description=__doc__)
    add_run_options(
        parser,
        "the run's folder, such as runs/bible, or a folder of weights",
        "folder of the vocabulary (default: the run's, or the one that it was trained on)",
    )
    add = partial(add_option, parser)
    what = "UTF-8 text, a sentence a line (default: standard input)"
    add("files", what, Path, nargs="*", metavar="FILE")
    add("--from LANG", "language of the sentences", dest="source", required=True)
    add("--to LANG", "language to translate into", dest="target", required=True)
    add("--text TEXT", "a sentence, in place of files")
    add("--out FILE", "where to write (default: standard output)", Path)
    add("--beam N", "hypotheses; 1: greedy (4)", int, rule=COUNT)
    what = "compare log p / tokens^A; more favours long translations (%(default)s)"
    add("--length-penalty A", what, float, 1.0, rule=LENGTH_PENALTY)
    add("--sample", "draw each token, in place of the search")
    what = "with --sample: below 1 likelier tokens, above 1 others (1.0)"
    must = "more than 0: 1 follows the model's own probabilities; --beam 1 without --sample takes "
    must += "the most probable token"
    add("--temperature T", what, float, rule=(lambda value: 0 < value < math.inf, must))
    what = "with --sample: the likeliest tokens that make up this probability (1.0)"
    add("--top-p P", what, float, rule=TOP_P)
    add("--seed N", "with --sample: of the draw (0)", int, rule=SEED)
    add("--batch-size N", "sentences at once (%(default)s)", int, 32, rule=COUNT)
    what = "tokens of a translation (default: twice its source's and 20)"
    add("--max-len N", what, int, rule=AT_LEAST_1)
    what = "what happens to a sentence longer than the model's positions (default: what the run's "
    what += "data.pairs.too_long_inference says, or split)"
    add("--too-long", what, str, choices=("split", "truncate", "refuse"))
    options = parser.parse_intermixed_args(arguments)  # a FILE may follow options
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    for name in ("temperature", "top_p", "seed"):
        value, option = getattr(options, name), option_of(name)
        if value is not None and not options.sample:
            raise UserError(f"{option} {value:g} belongs to --sample: add it, or leave it out")
    if options.sample and options.beam is not None and options.beam > 1:
        raise UserError(
            f"--sample and --beam {options.beam} exclude each other: a draw follows one "
            "hypothesis: leave one of them out"
        )
    if options.text is not None and options.files:
        raise UserError(f"--text and {options.files[0]}: give one of the two")
    if options.source == options.target:
        raise UserError(f"--from and --to are both {options.source}: name two languages")
    if (out := options.out) is not None:
        if out.is_dir():
            raise UserError(f"--out {out} is a folder: name a file")
        if out.is_file():
            raise UserError(f"--out {out} exists: name a file that does not, or remove it")
        if not out.parent.is_dir():
            raise UserError(f"--out {out}: {out.parent} is no folder: make it first")
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

    run = open_run(options.run, options.checkpoint, options.data, options.ema)
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
        with terminal_bar("translating", options.out is not None or not sys.stdout.isatty()) as bar:
            task = bar.add_task("", total=total)
            for window in windows:
                found = translator.lines(window, lambda more, _: bar.advance(task, more))
                _write(found, options.out, num_written)
                num_written = translator.num_done
    except KeyboardInterrupt:
        print(f"stopped: {_written(num_written, options.out)}", file=sys.stderr)
        raise
    except UserError as error:
        if not num_written:
            raise
        raise UserError(f"{error}; {_written(num_written, options.out)}") from error
    if not num_written:
        _write([], options.out, 0)
    if said := translator.told():
        print(said, file=sys.stderr)


def _written(num_lines: int, out: Path | None) -> str:
    where = f" into {out}" if out is not None else ""
    return f"{num_lines:,} lines are translated and written{where}"


def _write(lines: Iterable[str], out: Path | None, num_before: int) -> None:
    content = "".join(f"{line}\n" for line in lines).encode()
    if out is None:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    size = out.stat().st_size if num_before else 0
    try:
        with out.open("ab" if num_before else "wb") as file:
            file.write(content)
    except OSError as error:
        if num_before:
            os.truncate(out, size)  # whole lines, as many as the message says
            raise UserError(
                f"{out}: {error.strerror}: free some space, and write the rest into another file"
            ) from None
        if out.is_file():  # or the same command would be refused
            out.unlink()
        raise OSError(error.errno, error.strerror, str(out)) from None  # writing names no file


if __name__ == "__main__":
    sys.exit(main())
