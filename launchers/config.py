"""Checks a config, and writes the pages that describe configs.

magnetar config check quickstart [--set key=value ...] [--world-size N]
magnetar config docs [--check]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from magnetar.engine.config.docs import generated_files
from magnetar.engine.config.schema import load_config
from magnetar.launchers.terminal.command_line import (
    CONFIGS,
    CommandParser,
    add_set_option,
    find_config,
)
from magnetar.launchers.terminal.user_errors import user_errors


def _ranks(text: str) -> int:
    """A number of ranks."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of ranks: use 1 or more")
    return int(text)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command and its options."""
    parser = CommandParser(prog="magnetar config", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="print the resolved config, or all that is wrong")
    check.add_argument("config", help="a JSON file, or a shipped config's name, such as quickstart")
    add_set_option(check, dest="overrides")
    check.add_argument(
        "--world-size", type=_ranks, help="ranks: fills in the batch sizes, checks ep_size"
    )
    docs = commands.add_parser("docs", help="write ds_configs/README.md and ds_configs/schema.json")
    docs.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    docs.add_argument("--folder", type=Path, default=CONFIGS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def write_docs(folder: Path, only_check: bool) -> int:
    """Writes the generated files, or says which are out of date; returns the exit status."""
    stale = []
    for name, text in generated_files().items():
        path = folder / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not only_check:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    if only_check and stale:
        print(
            f"{folder}: {' and '.join(stale)} out of date: run `magnetar config docs`",
            file=sys.stderr,
        )
        return 1
    return 0


@user_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = parse_arguments(arguments)
    if options.command == "docs":
        return write_docs(options.folder, options.check)
    config = load_config(find_config(options.config), options.overrides, options.world_size)
    print(json.dumps(config.to_dict(), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
