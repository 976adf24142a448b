"""Validation loss and perplexity of a trained run, or BLEU and chrF of one that translates.

magnetar evaluate runs/quickstart
magnetar evaluate runs/quickstart --checkpoint step_00000200 --sequences 64 --json
magnetar evaluate runs/bible --directions en-de de-en --max-sentences 200

The answer is also written into the run's folder, as evaluation.json.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from magnetar.data.errors import UserError
from magnetar.launchers.terminal.command_line import (
    CommandParser,
    add_run_options,
    given_values,
    option_of,
    require_at_least_1,
)
from magnetar.launchers.terminal.user_errors import quiet_deepspeed, user_errors
from magnetar.launchers.translate import MAX_LENGTH_PENALTY, translation_bar

if TYPE_CHECKING:
    from magnetar.data.pairs.folder import Texts
    from magnetar.engine.checkpoint.open_run import SavedModel
    from magnetar.engine.translation.translate import TranslationScores

_OF_TRANSLATION = ("directions", "max_sentences", "beam", "length_penalty", "write_translations")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="magnetar evaluate", description=__doc__)
    add_run_options(
        parser,
        "the run's folder, such as runs/quickstart, or what convert export made of it",
        "a prepared folder (default: the run's own)",
    )
    add = parser.add_argument
    add("--batch-size", type=int, default=16, metavar="N", help="sequences at once (%(default)s)")
    add("--sequences", type=int, metavar="N", help="only the first N sequences (default: all)")
    add("--json", action="store_true", help="print one JSON object")
    of_translation = parser.add_argument_group("for a run that translates")
    add = of_translation.add_argument
    add("--directions", nargs="+", metavar="FROM-TO", help="such as en-de (default: all)")
    add("--max-sentences", type=int, metavar="N", help="sentences of each direction (default: all)")
    add("--beam", type=int, metavar="N", help="hypotheses; 1: greedy (4)")
    add("--length-penalty", type=float, metavar="A", help="see magnetar translate (1.0)")
    add(
        "--write-translations",
        type=Path,
        metavar="DIR",
        help="new folder for en-de.translations.txt, en-de.references.txt and so on, for sacrebleu",
    )
    options = parser.parse_args(arguments)
    require_at_least_1(options, ("batch_size", "sequences", "max_sentences", "beam"))
    if options.length_penalty is not None and not 0 <= options.length_penalty <= MAX_LENGTH_PENALTY:
        raise UserError(
            f"--length-penalty {options.length_penalty:g} must be 0 to {MAX_LENGTH_PENALTY}"
        )
    folder = options.write_translations
    if folder is not None and folder.exists():
        raise UserError(
            f"--write-translations {folder} exists: name a folder that does not, or remove it"
        )
    return options


def _tell(options: argparse.Namespace, answer: dict[str, Any]) -> bool:
    """Write the answer beside the run and, with --json, print it; whether it was printed."""
    from magnetar.data.atomic import write_atomically

    text, file = json.dumps(answer, indent=1) + "\n", options.run / "evaluation.json"
    if options.json:
        print(text, end="")
    try:
        write_atomically(file, text)
    except OSError as error:  # the answer is worth more than its file
        print(
            f"warning: {file} is not written ({error.strerror}): keep the answer with --json",
            file=sys.stderr,
        )
    return options.json


def _write_translations(folder: Path, texts: "Texts", scores: "TranslationScores") -> None:
    from magnetar.engine.translation.translate import one_line

    folder.mkdir(parents=True)
    for direction, (_, references) in texts.items():
        sides = {"translations": scores.translations[direction], "references": references}
        for name, lines in sides.items():
            content = "".join(f"{one_line(line)}\n" for line in lines)
            (folder / f"{'-'.join(direction)}.{name}.txt").write_text(content, encoding="utf-8")


def _check_kind(options: argparse.Namespace, translates: bool) -> None:
    """Refuse options of the other kind of run."""
    others = ("sequences",) if translates else _OF_TRANSLATION
    for name in others:
        if getattr(options, name) is not None:
            kind = "translates" if translates else "does not translate"
            raise UserError(
                f"{option_of(name)} says nothing about {options.run}, which {kind}: leave it out"
            )


def evaluate_translations(options: argparse.Namespace, run: "SavedModel") -> None:
    """Translate the validation split, and print how good that is."""
    from magnetar.data.pairs.codec import parse_direction
    from magnetar.engine.report.translations import (
        sample_words,
        signature_lines,
        translation_tables,
    )
    from magnetar.engine.translation.translate import Decoding, evaluate_translation

    # The prepared folder, which is needed here anyhow, holds the vocabulary too.
    codec, prepared = run.codec, run.pairs(options.data)
    learnt = run.run_config.data.pairs if run.run_config else None
    asked = options.directions or (learnt.directions if learnt else None)
    directions = [parse_direction(name, prepared.languages) for name in asked] if asked else None
    texts = prepared.texts("valid", directions, options.max_sentences)
    given = given_values(options, ("batch_size", "beam", "length_penalty"))
    with translation_bar() as progress:
        scores = evaluate_translation(run.translator, codec, texts, Decoding(**given), progress)
    if options.write_translations is not None:
        _write_translations(options.write_translations, texts, scores)
    answer = {
        "run": str(options.run),
        "checkpoint": run.name,
        "step": run.step,
        "data": str(prepared.path),
        "split": "valid",
        "sample": sample_words(options.max_sentences),
        **scores.to_dict(),
    }
    if _tell(options, answer):
        return
    console = Console(highlight=False)
    for found in translation_tables(f"Validation split of {prepared.path}, {run.name}", scores):
        console.print(found)
    for line in signature_lines(scores):
        console.print(line, soft_wrap=True, markup=False)


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate and print."""
    options = parse_arguments(arguments)
    quiet_deepspeed()
    from magnetar.data.loader import TextData
    from magnetar.engine.checkpoint.open_run import open_run
    from magnetar.engine.evaluate import evaluate
    from magnetar.engine.prepare_run import data_options
    from magnetar.engine.report.samples import evaluation_table

    run = open_run(options.run, options.checkpoint, options.data)
    _check_kind(options, run.has_learnt_pairs)
    if run.has_learnt_pairs:
        evaluate_translations(options, run)
        return
    own = data_options(run.text_config)
    num_sequences = math.ceil((run.prepared.valid.num_tokens - 1) / own.seq_len)
    num_sequences = min(num_sequences, options.sequences or num_sequences)
    data = TextData(run.prepared, dataclasses.replace(own, eval_sequences=num_sequences))

    def progress(batches: Iterable) -> Iterable:
        total = math.ceil(num_sequences / options.batch_size)
        console = Console(stderr=True)
        return track(batches, "evaluating", total, console=console, disable=not console.is_terminal)

    batches = data.valid_batches(options.batch_size, rank=0, world_size=1)
    result = evaluate(run.model, batches, run.device, data.predicted_bytes(), progress)
    unigram = data.unigram_perplexity(result.num_tokens)
    answer = {
        "run": str(options.run),
        "checkpoint": run.name,
        "step": run.step,
        "data": str(run.prepared.path),
        "split": "valid",
        **result.to_dict(),
        "unigram_perplexity": unigram,
        "perplexity_of_unigram": result.perplexity / unigram,
    }
    if _tell(options, answer):
        return
    title = f"Validation split of {run.prepared.path}, "
    title += f"{result.num_tokens:,} {data.asked_tokens}"
    rows = {run.name: result.to_dict()}
    Console(highlight=False).print(evaluation_table(title, rows, unigram))


if __name__ == "__main__":
    sys.exit(main())
