"""The command `magnetar`: one program, a subcommand for each thing that it does."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from magnetar import __version__
from magnetar.launchers.terminal.command_line import nearest
from magnetar.launchers.terminal.user_errors import user_errors

# name: function (of a module of this folder) that runs it, and what the overview says of it
COMMANDS = {
    "prepare": ("prepare_data:main", "text, JSON lines or Parquet to token files"),
    "prepare-pairs": (
        "prepare_pairs:main",
        "parallel tables to a shared vocabulary and token files",
    ),
    "train": ("launch:train", "train a model, or continue a run"),
    "supervise": ("supervise:main", "train, and start again after a crash"),
    "branch": ("convert:branch", "a run that starts from a step of another, and decays"),
    "evaluate": ("evaluate:main", "perplexity, or BLEU and chrF, of a run or an export"),
    "generate": ("generate:main", "text that a decoder continues"),
    "translate": ("translate:main", "translations, a sentence a line"),
    "plot": ("plot:main", "the curves of one run, or several runs in one picture"),
    "convert": ("convert:main", "inspect, export, import, reshard, average, upcycle ..."),
    "doctor": ("doctor:main", "check every machine before a run starts"),
    "config": ("config:main", "check a JSON, or write the pages that describe the keys"),
    "profile-admin": ("launch:profile_admin", 'the profile that norm "admin" starts from'),
    "verses": ("verses:main", "the parallel text of the translation demo"),
}


def overview() -> str:
    """The text of `magnetar --help`."""
    lines = [f"  {name:14}{about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: magnetar COMMAND ...",
            "",
            "Sparse and very deep Transformers on DeepSpeed.",
            "",
            *lines,
            "",
            "`magnetar COMMAND --help` explains a command; `magnetar --version` is the version.",
        ]
    )


@user_errors()
def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        sys.exit(0)
    if words[0] == "--version":
        print(f"magnetar {__version__}")
        sys.exit(0)
    os.environ.pop("LOCAL_RANK", None)  # left in a shell, it would silence messages as of a rank
    name, *rest = words
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        way_out = f"did you mean `{near}`?" if near else f"use one of {', '.join(COMMANDS)}"
        print(f"error: magnetar has no command {name!r}: {way_out}", file=sys.stderr)
        sys.exit(2)
    module, _, function = COMMANDS[name][0].partition(":")
    run = getattr(importlib.import_module(f"magnetar.launchers.{module}"), function)
    sys.exit(run(rest))
