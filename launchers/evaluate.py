"""Validation loss and perplexity of a trained run, in one process.

python -m launchers.evaluate runs/quickstart
python -m launchers.evaluate runs/quickstart --checkpoint step_00000200 --sequences 64 --json
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from data.errors import UserError
from launchers.quiet import quiet_deepspeed
from launchers.user_errors import user_errors


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m launchers.evaluate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "run",
        type=Path,
        help="the run's folder, such as runs/quickstart, or what convert export made of it",
    )
    add("--checkpoint", metavar="NAME", help="such as step_00000400 (default: the newest)")
    add("--data", type=Path, metavar="DIR", help="a prepared folder (default: the run's own)")
    add("--batch-size", type=int, default=16, metavar="N", help="sequences at once (%(default)s)")
    add("--sequences", type=int, metavar="N", help="only the first N sequences (default: all)")
    add("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    for name, value in (("batch-size", options.batch_size), ("sequences", options.sequences)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    return options


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate and print."""
    options = parse_arguments(arguments)
    quiet_deepspeed()
    from engine.evaluation import evaluate
    from engine.report import asked_about, evaluation_table
    from engine.trained_run import open_run
    from engine.windows import predicted_bytes, unigram_perplexity, windows

    run = open_run(options.run, options.checkpoint, options.data)
    valid = windows(run.prepared.valid, run.config)
    num_sequences = math.ceil((valid.split.num_tokens - 1) / valid.seq_len)
    num_sequences = min(num_sequences, options.sequences or num_sequences)

    def progress(batches: Iterable) -> Iterable:
        total = math.ceil(num_sequences / options.batch_size)
        console = Console(stderr=True)
        return track(batches, "evaluating", total, console=console, disable=not console.is_terminal)

    num_bytes = predicted_bytes(run.prepared, valid, run.config, num_sequences)
    result = evaluate(
        run.model, valid, options.batch_size, run.device, num_bytes, num_sequences, progress
    )
    unigram = unigram_perplexity(run.prepared, run.config, result.num_tokens)
    if options.json:
        answer = {
            "run": str(options.run),
            "checkpoint": run.name,
            "step": run.step,
            "data": str(run.prepared.path),
            **result.to_dict(),
            "unigram_perplexity": unigram,
            "perplexity_of_unigram": result.perplexity / unigram,
        }
        print(json.dumps(answer, indent=1))
        return
    title = f"Validation split of {run.prepared.path}, "
    title += asked_about(run.config, result.num_tokens)
    rows = {run.name: result.to_dict()}
    Console(highlight=False).print(evaluation_table(title, rows, unigram))


if __name__ == "__main__":
    sys.exit(main())
