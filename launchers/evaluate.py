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
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

from magnetar.data.errors import UserError
from magnetar.launchers.terminal.command_line import (
    AT_LEAST_1,
    COUNT,
    LENGTH_PENALTY,
    CommandParser,
    add_option,
    add_run_options,
    given_values,
    option_of,
    terminal_bar,
)
from magnetar.launchers.terminal.user_errors import quiet_deepspeed, user_errors

if TYPE_CHECKING:
    from magnetar.data.pairs.folder import Texts
    from magnetar.engine.checkpoint.open_run import SavedModel
    from magnetar.engine.translation.translate import TranslationScores

_OF_TRANSLATION = ("directions", "max_sentences", "beam", "length_penalty", "write_translations")
# The prepared folder, the answer's entries, and what a terminal shows of them.
Found = tuple[Path, dict[str, Any], Sequence[RenderableType]]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="magnetar evaluate", description=__doc__)
    add_run_options(
        parser,
        "the run's folder, such as runs/quickstart, or what convert export made of it",
        "a prepared folder (default: the run's own)",
    )
    add = partial(add_option, parser)
    add("--batch-size N", "sequences at once (%(default)s)", int, 16, rule=COUNT)
    add("--sequences N", "only the first N sequences (default: all)", int, rule=AT_LEAST_1)
    add("--json", "print one JSON object")
    add = partial(add_option, parser.add_argument_group("for a run that translates"))
    add("--directions FROM-TO", "such as en-de (default: all)", nargs="+")
    what = "sentences of each direction (default: all)"
    add("--max-sentences N", what, int, rule=AT_LEAST_1)
    add("--beam N", "hypotheses; 1: greedy (4)", int, rule=COUNT)
    add("--length-penalty A", "see magnetar translate (1.0)", float, rule=LENGTH_PENALTY)
    what = "new folder for en-de.translations.txt, en-de.references.txt and so on, for sacrebleu"
    add("--write-translations DIR", what, Path)
    options = parser.parse_args(arguments)
    folder = options.write_translations
    if folder is not None and folder.exists():
        raise UserError(
            f"--write-translations {folder} exists: name a folder that does not, or remove it"
        )
    return options


def _refuse_options_of_the_other_kind(options: argparse.Namespace, translates: bool) -> None:
    for name in ("sequences",) if translates else _OF_TRANSLATION:
        if getattr(options, name) is not None:
            kind = "translates" if translates else "does not translate"
            raise UserError(
                f"{option_of(name)} says nothing about {options.run}, which {kind}: leave it out"
            )


def _translations(options: argparse.Namespace, run: "SavedModel") -> Found:
    """Translate the validation split, and find how good that is."""
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
    with terminal_bar("translating") as bar:
        task = bar.add_task("", total=None)

        def progress(more: int, total: int) -> None:
            bar.update(task, advance=more, total=total)

        scores = evaluate_translation(run.translator, codec, texts, Decoding(**given), progress)
    if options.write_translations is not None:
        _write_translations(options.write_translations, texts, scores)
    for warning in scores.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    tables = translation_tables(f"Validation split of {prepared.path}, {run.name}", scores)
    answer = {"sample": sample_words(options.max_sentences), **scores.to_dict()}
    return prepared.path, answer, [*tables, *signature_lines(scores)]


def _write_translations(folder: Path, texts: "Texts", scores: "TranslationScores") -> None:
    from magnetar.data.atomic import atomic_folder
    from magnetar.engine.translation.translate import one_line

    with atomic_folder(folder) as made:
        for direction, (_, references) in texts.items():
            sides = {"translations": scores.translations[direction], "references": references}
            for name, lines in sides.items():
                content = "".join(f"{one_line(line)}\n" for line in lines)
                (made / f"{'-'.join(direction)}.{name}.txt").write_text(content, encoding="utf-8")


def _predictions(options: argparse.Namespace, run: "SavedModel") -> Found:
    """Find how well the validation split is predicted."""
    from magnetar.data.loader import TextData
    from magnetar.engine.evaluate import evaluate
    from magnetar.engine.prepare_run import data_options
    from magnetar.engine.report.samples import evaluation_table

    own, prepared = data_options(run.text_config), run.prepared
    num_sequences = math.ceil((prepared.valid.num_tokens - 1) / own.seq_len)
    num_sequences = min(num_sequences, options.sequences or num_sequences)
    data = TextData(prepared, dataclasses.replace(own, eval_sequences=num_sequences))
    batches = data.valid_batches(options.batch_size, rank=0, world_size=1)
    with terminal_bar("evaluating") as bar:
        shown = bar.track(batches, math.ceil(num_sequences / options.batch_size))
        result = evaluate(run.model, shown, run.device, data.predicted_bytes())
    unigram, values = data.unigram_perplexity(result.num_tokens), result.to_dict()
    title = f"Validation split of {prepared.path}, {result.num_tokens:,} {data.asked_tokens}"
    answer = {
        **values,
        "unigram_perplexity": unigram,
        "perplexity_of_unigram": result.perplexity / unigram,
    }
    return prepared.path, answer, [evaluation_table(title, {run.name: values}, unigram)]


def _keep(answer: dict[str, Any], file: Path) -> None:
    """Write the answer beside the run, or say why it is not written."""
    from magnetar.data.atomic import write_atomically

    try:
        write_atomically(file, json.dumps(answer, indent=1) + "\n")
    except OSError as error:  # the answer is worth more than its file
        print(
            f"warning: {file} is not written ({error.strerror}): keep the answer with --json",
            file=sys.stderr,
        )


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate and print."""
    options = parse_arguments(arguments)
    quiet_deepspeed()
    from magnetar.engine.checkpoint.open_run import open_run

    run = open_run(options.run, options.checkpoint, options.data, options.ema)
    _refuse_options_of_the_other_kind(options, run.has_learnt_pairs)
    folder, values, shown = (_translations if run.has_learnt_pairs else _predictions)(options, run)
    about = {"run": str(options.run), "checkpoint": run.name, "step": run.step}
    about |= {"ema": True} if options.ema else {}
    answer = {**about, "data": str(folder), "split": "valid", **values}
    if options.json:
        print(json.dumps(answer, indent=1))
    _keep(answer, options.run / "evaluation.json")
    console = Console(highlight=False)
    for part in () if options.json else shown:
        console.print(part, soft_wrap=isinstance(part, str), markup=False)


if __name__ == "__main__":
    sys.exit(main())
