"""Text from a trained language model, in one process.

magnetar generate runs/quickstart --prompt "My fellow citizens"
magnetar generate runs/quickstart < prompts.txt
"""

import argparse
import io
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial

from rich.console import Console

from magnetar.data.errors import UserError
from magnetar.data.text.lines import BYTE_ORDER_MARK, require_utf8
from magnetar.launchers.terminal.command_line import (
    AT_LEAST_1,
    COUNT,
    SEED,
    TOP_P,
    CommandParser,
    add_option,
    add_run_options,
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
    add = partial(add_option, parser)
    add("--prompt TEXT", "what to continue (default: each line of the input)")
    add("--tokens N", "tokens to add (%(default)s)", int, 100, rule=AT_LEAST_1)
    what = "0: always the most probable token; 1: the model's own probabilities (%(default)s)"
    must = "finite and 0 or more: 0 takes the most probable token, 1 follows the model's own ones"
    add("--temperature T", what, float, 0.8, rule=(lambda value: 0 <= value < math.inf, must))
    what = "draw among the likeliest tokens that make up this probability (%(default)s)"
    add("--top-p P", what, float, 0.95, rule=TOP_P)
    add("--seed N", "seed of the draw (%(default)s)", int, 0, rule=SEED)
    add("--num-samples N", "texts per prompt (%(default)s)", int, 1, rule=COUNT)
    options = parser.parse_args(arguments)
    if options.prompt is not None:
        options.prompt = options.prompt.removeprefix(BYTE_ORDER_MARK)
        require_utf8(options.prompt, "--prompt", "give it in UTF-8")
        if not options.prompt.strip():
            raise UserError("--prompt is empty: give the beginning of a text to continue")
    return options


def prompts_of(prompt: str | None) -> Iterator[tuple[str, str]]:
    """The one prompt, or each line of standard input that is not blank, after what it is called.

    Raises:
        UserError: the input has none, or a line that is not UTF-8.
    """
    if prompt is not None:
        yield "--prompt", prompt
        return
    if sys.stdin.isatty():
        print("one prompt a line; Ctrl-D ends", file=sys.stderr)
    num_prompts = 0
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # judged line by line
    for number, line in enumerate(sys.stdin, start=1):
        where = f"line {number} of standard input"
        require_utf8(line, where, "save the prompts as UTF-8")
        line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if line.strip():
            num_prompts += 1
            yield where, line.rstrip("\r\n")
    if not num_prompts:
        raise UserError('no prompt: give --prompt "TEXT", or lines on standard input')


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Sample and print."""
    options = parse_arguments(arguments)
    quiet_deepspeed()
    import torch

    from magnetar.engine.checkpoint.open_run import open_run
    from magnetar.engine.report.samples import continuation_text
    from magnetar.models.decoding.generation import sample
    from magnetar.models.transformer import Transformer

    run = open_run(options.run, options.checkpoint, options.data, options.ema)
    architecture = run.config.architecture
    if architecture != "decoder":
        raise UserError(
            f"{options.run} holds an {architecture.replace('_', '-')}, which continues no text: "
            f"use `magnetar evaluate {shlex.quote(str(options.run))}`, or name the run of a decoder"
        )
    console = Console(highlight=False)
    tokenizer, model = run.tokenizer, run.model
    assert isinstance(model, Transformer)
    for where, prompt in prompts_of(options.prompt):
        ids = tokenizer.encode(prompt)
        if not ids:
            raise UserError(
                f"{where} has no token in this vocabulary, which drops all of its characters: give "
                "a prompt with letters"
            )
        tokens = sample(
            model,
            torch.tensor([ids] * options.num_samples, device=run.device),
            options.tokens,
            options.temperature,
            options.top_p,
            options.seed,
        )
        for row in tokens.tolist():
            text = continuation_text(tokenizer, row, len(ids))
            console.print(text, soft_wrap=True, end="\n\n")


if __name__ == "__main__":
    sys.exit(main())
