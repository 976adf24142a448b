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
import select
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from magnetar.data.errors import UserError
from magnetar.launchers.user_errors import quiet_deepspeed, user_errors

if TYPE_CHECKING:
    from magnetar.engine.checkpoint.open_run import SavedModel
    from magnetar.engine.translation.long_sentences import TooLong
    from magnetar.engine.translation.translate import Decoding

BYTE_ORDER_MARK = "\ufeff"
MAX_LENGTH_PENALTY = 10  # what n tokens are raised to must stay a number
WINDOW = 512  # lines that are sorted by length together, and come out together
PAUSE = 0.2  # seconds without a line after which those of a pipe are translated
PARTS = 1 << 32  # more lines than there are: part p of line n draws as n + p * PARTS


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="magnetar translate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("run", type=Path, help="the run's folder, such as runs/bible, or a folder of weights")
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
    add("--checkpoint", metavar="NAME", help="such as step_00000400 (default: the newest)")
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of the vocabulary (default: the run's, or the one that it was trained on)",
    )
    options = parser.parse_intermixed_args(arguments)  # a FILE may follow options
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    for name in ("beam", "batch_size", "max_len"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if not 0 <= options.length_penalty <= MAX_LENGTH_PENALTY:
        raise UserError(
            f"--length-penalty {options.length_penalty:g} must be 0 to {MAX_LENGTH_PENALTY}: 0 "
            "compares plain probabilities, 1 those of a token"
        )
    for name in ("temperature", "top_p", "seed"):
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
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


def sentences_of(options: argparse.Namespace) -> list[str] | None:
    """Every line of --text or of the files; None where standard input is to be translated.

    Raises:
        UserError: a line is not UTF-8.
    """
    if options.text is not None:
        try:
            options.text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"--text is not UTF-8 at character {error.start + 1}: give it in UTF-8"
            ) from None
        return options.text.split("\n")
    if not options.files:
        return None
    found: list[str] = []
    for file in options.files:
        with file.open("rb") as lines:
            found += lines_of(str(file), lines)
    return found


def lines_of(name: str, lines: Iterable[bytes]) -> Iterator[str]:
    """Lines of a file, without their ends.

    Raises:
        UserError: one of them is not UTF-8.
    """
    for number, line in enumerate(lines, start=1):
        yield decoded(name, number, line)


def decoded(name: str, number: int, line: bytes) -> str:
    """Line `number`, from 1, of a file, without its end; see `lines_of`."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}, line {number}, is not UTF-8 at byte {error.start + 1}: save it as UTF-8"
        ) from None
    if number == 1:
        text = text.removeprefix(BYTE_ORDER_MARK)
    return text.rstrip("\r\n")


def arriving(stream: IO[bytes]) -> Iterator[list[bytes]]:
    """What a pipe brings, in lines; an empty list once at each pause."""
    rest = b""
    while True:
        if not select.select([stream], [], [], PAUSE)[0]:
            yield []
        chunk = stream.read1(1 << 16)  # type: ignore[attr-defined]
        if not chunk:
            break
        *lines, rest = (rest + chunk).split(b"\n")
        yield lines
    if rest:
        yield [rest]


def windows_of_input(stream: IO[bytes], size: int) -> Iterator[list[str]]:
    """Lines of standard input, at most `size` at a time, and fewer where it pauses or ends.

    Raises:
        UserError: one of them is not UTF-8; those before it may have come.
    """
    number, window = 0, list[str]()
    try:
        stream.fileno()
        groups = arriving(stream)
    except OSError:  # nothing that can pause
        groups = iter([list(stream)])
    for lines in groups:
        for line in lines:
            number += 1
            window.append(decoded("standard input", number, line))
            if len(window) == size:
                yield window
                window = []
        if not lines and window:
            yield window
            window = []
    if window:
        yield window


class Translator:
    """Translates lines, a window after the other.

    Attributes:
        num_done: lines so far.
        too_long: numbers, from 0, of those that did not fit.
    """

    def __init__(
        self, run: "SavedModel", options: argparse.Namespace, decoding: "Decoding"
    ) -> None:
        """Nothing is done yet."""
        self.run, self.target, self.decoding = run, options.target, decoding
        self.how: TooLong = options.too_long or "split"
        if options.too_long is None and run.run_config is not None and run.run_config.data.pairs:
            self.how = run.run_config.data.pairs.too_long_inference
        self.num_done, self.too_long = 0, list[int]()

    def lines(
        self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> list[str]:
        """A line for each of the next texts, "" for one that is empty."""
        from magnetar.engine.translation.long_sentences import fit
        from magnetar.engine.translation.translate import joined, one_line, translate_ids

        model, codec, first = self.run.translator, self.run.codec, self.num_done
        fitted = fit(texts, codec, self.target, model.encoder.max_len, self.how, first)
        parts: list[list[str]] = [[] for _ in texts]
        # A line's draws depend on its number in all of the input, and on no window.
        seen = Counter[int]()
        ids = []
        for number in fitted.sentence:
            ids.append(first + number + PARTS * seen[number])
            seen[number] += 1
        found = translate_ids(model, codec, fitted.ids, self.decoding, progress, ids)
        for number, translation in zip(fitted.sentence, found, strict=True):
            parts[number].append(one_line(codec.decode(translation.tokens)))
        self.num_done += len(texts)
        self.too_long += [first + number for number in fitted.too_long]
        return [joined(of_text, self.target) for of_text in parts]

    def told(self) -> str:
        """What is to be said about long ones, or ""."""
        from magnetar.engine.translation.long_sentences import told

        return told(self.too_long, self.num_done, self.run.translator.encoder.max_len, self.how)


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
    from magnetar.models.decoding.beam_search import Sampling

    run = open_run(options.run, options.checkpoint, options.data)
    for option, language in (("--from", options.source), ("--to", options.target)):
        try:
            check_language(language, run.codec.languages)
        except UserError as error:
            raise UserError(f"{option}: {error}") from None
    warn_of_untrained(run, options)
    sampling = None
    if options.sample:
        given = {name: getattr(options, name) for name in Sampling._fields}
        sampling = Sampling(**{name: v for name, v in given.items() if v is not None})
    decoding = Decoding(
        options.beam or 4, options.length_penalty, options.max_len, sampling, options.batch_size
    )
    _translate_all(options, Translator(run, options, decoding))


def _translate_all(options: argparse.Namespace, translator: Translator) -> None:
    """Write the translations of the input, window after window."""
    texts = sentences_of(options)
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
