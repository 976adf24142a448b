"""Translations by a trained model, a sentence a line, in one process.

python -m launchers.translate runs/NAME --from en --to de --text "The sea is calm."
python -m launchers.translate runs/NAME --from en --to de speech.txt --out speech.de.txt
python -m launchers.translate runs/NAME --from en --to de --beam 1 < sentences.txt
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.errors import UserError
from launchers.quiet import quiet_deepspeed
from launchers.user_errors import user_errors

if TYPE_CHECKING:
    from engine.translation import Decoding
    from engine.translation_run import TranslationRun

BYTE_ORDER_MARK = "\ufeff"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m launchers.translate", description=__doc__)
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
        default="split",
        help="what happens to a sentence longer than the model's positions (%(default)s)",
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
    if not 0 <= options.length_penalty < math.inf:
        raise UserError(
            f"--length-penalty {options.length_penalty:g} must be 0 or more: 0 compares plain "
            "probabilities, 1 those of a token"
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


def sentences_of(options: argparse.Namespace) -> list[str]:
    """Every line of what is to be translated.

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
        return list(lines_of("standard input", sys.stdin.buffer))
    found: list[str] = []
    for file in options.files:
        with file.open("rb") as lines:
            found += lines_of(str(file), lines)
    return found


def lines_of(name: str, lines: IO[bytes]) -> Iterator[str]:
    """Lines of a file, without their ends.

    Raises:
        UserError: one of them is not UTF-8.
    """
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}, line {number}, is not UTF-8 at byte {error.start + 1}: save it as UTF-8"
            ) from None
        if number == 1:
            text = text.removeprefix(BYTE_ORDER_MARK)
        yield text.rstrip("\r\n")


def translate_lines(
    run: "TranslationRun",
    texts: Sequence[str],
    options: argparse.Namespace,
    decoding: "Decoding",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[str], str]:
    """A line for each text, "" for one that is empty; and what is to be said about long ones."""
    from engine.long_sentences import fit, told
    from engine.translation import joined, one_line, translate_ids

    max_len = run.model.encoder.max_len
    fitted = fit(texts, run.codec, options.target, max_len, options.too_long)
    found = translate_ids(run.model, run.codec, fitted.ids, decoding, progress)
    parts: list[list[str]] = [[] for _ in texts]
    for number, translation in zip(fitted.sentence, found, strict=True):
        parts[number].append(one_line(run.codec.decode(translation.tokens)))
    lines = [joined(of_text, options.target) for of_text in parts]
    return lines, told(fitted.too_long, len(texts), max_len, options.too_long)


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Translate and print."""
    options = parse_arguments(arguments)
    quiet_deepspeed()
    from data.codec import check_language
    from engine.translation import Decoding
    from engine.translation_run import open_translation_run
    from models.beam_search import Sampling

    run = open_translation_run(options.run, options.checkpoint, options.data)
    for option, language in (("--from", options.source), ("--to", options.target)):
        try:
            check_language(language, run.codec.languages)
        except UserError as error:
            raise UserError(f"{option}: {error}") from None
    sampling = None
    if options.sample:
        given = {name: getattr(options, name) for name in Sampling._fields}
        sampling = Sampling(**{name: v for name, v in given.items() if v is not None})
    decoding = Decoding(
        options.beam or 4, options.length_penalty, options.max_len, sampling, options.batch_size
    )
    if options.text is None and not options.files and sys.stdin.isatty():
        print("one sentence a line; Ctrl-D ends", file=sys.stderr)
        for text in lines_of("standard input", sys.stdin.buffer):
            lines, said = translate_lines(run, [text], options, decoding)
            print(lines[0], flush=True)
            if said:
                print(said, file=sys.stderr)
        return
    texts = sentences_of(options)
    with translation_bar() as progress:
        lines, said = translate_lines(run, texts, options, decoding, progress)
    _write(lines, options.out)
    if said:
        print(said, file=sys.stderr)


@contextmanager
def translation_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal: what is yielded is told how many more are done, and how many of all."""
    console = Console(stderr=True)
    columns = (TextColumn("translating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda more, total: bar.update(task, advance=more, total=total)


def _write(lines: Iterable[str], out: Path | None) -> None:
    content = "".join(f"{line}\n" for line in lines).encode()
    if out is not None:
        try:
            out.write_bytes(content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(out)) from None  # writing names no file
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(content)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
