"""What is in a checkpoint, and how it becomes something else.

python -m launchers.convert inspect runs/lm
python -m launchers.convert import-torchscale decoder.pt --config decoder.json --out imported/lm
python -m launchers.convert import-torchscale checkpoint_last-shared.pt --out imported/moe
python -m launchers.convert fold-admin runs/admin --out folded/admin
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launchers.quiet import quiet_deepspeed
from launchers.user_errors import user_errors


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `call` is what the command does with it."""
    parser = argparse.ArgumentParser(prog="python -m launchers.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    for add_command in (
        _inspect,
        _import_torchscale,
        _fold_admin,
    ):
        add_command(commands)
    return parser.parse_args(arguments)


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Convert, and say what came out."""
    options = parse_arguments(arguments)
    quiet_deepspeed()
    options.call(options)


def _inspect(commands: Any) -> None:
    command = commands.add_parser(
        "inspect",
        help="what is in a checkpoint, and whether it is whole",
        description="Read every file, compare the hashes, and show what is there. Exit status 2 "
        "if a file is damaged.",
    )
    add = command.add_argument
    add(
        "source",
        type=Path,
        help="a run's folder (its newest checkpoint), a checkpoint's, or a folder of weights",
    )
    add("--tensors", action="store_true", help="list every tensor")
    add("--json", action="store_true", help="print the same as JSON")

    def call(options: argparse.Namespace) -> None:
        from rich.console import Console
        from rich.text import Text

        from convert.inspect import inspect, require_undamaged, shown

        contents = inspect(options.source)
        if options.json:
            print(json.dumps(contents.to_dict(options.tensors), indent=1))
        else:
            console = Console(highlight=False)
            for part in shown(contents, options.tensors):
                console.print(part, soft_wrap=isinstance(part, Text))
        require_undamaged(contents)

    command.set_defaults(call=call)


def _import_torchscale(commands: Any) -> None:
    command = commands.add_parser(
        "import-torchscale",
        help="a model of TorchScale 0.3.0, with fairseq or without",
        description="Write a TorchScale model, dense or sparse, as a folder that "
        "models.weights.load_model loads. The model has the same logits.",
    )
    add = command.add_argument
    add(
        "checkpoint",
        nargs="+",
        type=Path,
        help="a state dict (.pt, .safetensors), fairseq's checkpoint, or NAME-shared.pt, beside "
        "which the files NAME-rank-N.pt are found",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="a JSON with the arguments of TorchScale's config class, or with all of vars(config); "
        "needed where the checkpoint holds tensors alone",
    )
    add("--trust", action="store_true", help="let the file run code: only for files of your own")

    def call(options: argparse.Namespace) -> None:
        from convert.import_torchscale import import_torchscale, report

        out = options.out
        imported = import_torchscale(options.checkpoint, out, options.config, options.trust)
        print("\n".join(report(imported, out)))

    command.set_defaults(call=call)


def _fold_admin(commands: Any) -> None:
    command = commands.add_parser(
        "fold-admin",
        help="a trained Admin model as a plain Post-LN one",
        description="Write an Admin model as a Post-LN model with the same function, in a folder "
        "that models.weights.load_model loads.",
    )
    add = command.add_argument
    add("source", type=Path, help="a run's folder (its newest checkpoint), or a folder of weights")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to make")

    def call(options: argparse.Namespace) -> None:
        from convert.fold_admin import fold_admin

        print("\n".join(fold_admin(options.source, options.out)))

    command.set_defaults(call=call)


if __name__ == "__main__":
    sys.exit(main())
