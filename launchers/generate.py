"""Text from a trained language model, in one process.

magnetar generate runs/quickstart --prompt "My fellow citizens"
magnetar generate runs/quickstart < prompts.txt
"""

import argparse
import io
import math
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console

from magnetar.data.errors import UserError
from magnetar.data.text.lines import require_utf8
from magnetar.launchers.terminal.command_line import (
    CommandParser,
    add_run_options,
    require_at_least_1,
)
from magnetar.launchers.terminal.user_errors import quiet_deepspeed, user_errors


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="magnetar generate", description=__doc__)
    add_run_options(
        parser,
        "the run's folder, such as runs/quickstart, or a folder of weights",
        "folder of the tokenizer (default: the run's)",
    )
    add = parser.add_argument
    add("--prompt", metavar="TEXT", help="what to continue (default: each line of the input)")
    add("--tokens", type=int, default=100, metavar="N", help="tokens to add (%(default)s)")
    add(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="0: always the most probable token; 1: the model's own probabilities (%(default)s)",
    )
    add(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="draw among the likeliest tokens that make up this probability (%(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the draw (%(default)s)")
    add(
        "--num-samples",
        type=int,
        default=1,
        metavar="N",
        help="texts per prompt (%(default)s)",
    )
    options = parser.parse_args(arguments)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if options.prompt is not None:
        require_utf8(options.prompt, "--prompt", "give it in UTF-8")
        if not options.prompt.strip():
            raise UserError("--prompt is empty: give the beginning of a text to continue")
    require_at_least_1(options, ("tokens", "num_samples"))
    if not 0 <= options.temperature < math.inf:
        raise UserError(
            f"--temperature {options.temperature:g} must be 0 or more: 0 takes the most probable "
            "token, 1 follows the model's own probabilities"
        )
    if not 0 < options.top_p <= 1:
        raise UserError(
            f"--top-p {options.top_p:g} must be more than 0 and at most 1: 1 allows every token"
        )
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed {options.seed} must be 0 or more and less than 2^63")


def prompts_of(prompt: str | None) -> Iterator[str]:
    """The one prompt, or each line of standard input that is not blank.

    Raises:
        UserError: the input has none, or a line that is not UTF-8.
    """
    if prompt is not None:
        yield prompt
        return
    if sys.stdin.isatty():
        print("one prompt a line; Ctrl-D ends", file=sys.stderr)
    num_prompts = 0
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # judged line by line
    for number, line in enumerate(sys.stdin, start=1):
        require_utf8(line, f"line {number} of standard input", "save the prompts as UTF-8")
        if line.strip():
            num_prompts += 1
            yield line.rstrip("\r\n")
    if not num_prompts:
        raise UserError('no prompt: give --prompt "TEXT", or lines on standard input')


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Sample and print."""
    options = parse_arguments(arguments)
    quiet_deepspeed()
    import torch

    from magnetar.engine.checkpoint.open_run import open_run
    from magnetar.engine.report.samples import continuation_text, decode_continuation
    from magnetar.models.decoding.generation import sample
    from magnetar.models.transformer import Transformer

    run = open_run(options.run, options.checkpoint, options.data)
    architecture = run.config.architecture
    if architecture != "decoder":
        raise UserError(
            f"{options.run} holds an {architecture.replace('_', '-')}, which continues no text: "
            f"use `magnetar evaluate {options.run}`, or name the run of a decoder"
        )
    console = Console(highlight=False)
    tokenizer, model = run.tokenizer, run.model
    assert isinstance(model, Transformer)
    for prompt in prompts_of(options.prompt):
        ids = tokenizer.encode(prompt)
        tokens = sample(
            model,
            torch.tensor([ids] * options.num_samples, device=run.device),
            options.tokens,
            options.temperature,
            options.top_p,
            options.seed,
        )
        for row in tokens.tolist():
            text = continuation_text(*decode_continuation(tokenizer, row, len(ids)))
            console.print(text, soft_wrap=True, end="\n\n")


if __name__ == "__main__":
    sys.exit(main())
