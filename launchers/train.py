"""Train a model, as one of the ranks that a launcher has started.

`magnetar train JSON` starts the deepspeed launcher, which starts this. By hand, one of

deepspeed [--hostfile H] --module magnetar.launchers.train --deepspeed_config JSON
deepspeed [--hostfile H] launchers/train.py --deepspeed_config JSON
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__" and not __package__:
    # A script, not a module: Python has put this file's folder in front. What we need there is the
    # folder that holds magnetar/, a checkout's or site-packages.
    _ROOM = Path(__file__).resolve().parent.parent
    sys.path[0] = str(_ROOM if (_ROOM / "magnetar").is_dir() else _ROOM.parent)

from magnetar.engine.cluster.arguments import opened
from magnetar.engine.cluster.environment import launched_world_size
from magnetar.launchers.terminal.command_line import CommandParser, add_config_options, take_config
from magnetar.launchers.terminal.defects import reports_in
from magnetar.launchers.terminal.output import let_no_print_fail
from magnetar.launchers.terminal.user_errors import user_errors

if TYPE_CHECKING:
    from magnetar.engine.config.schema import RunConfig


def parse_arguments(
    arguments: Sequence[str] | None, prog: str, description: str | None
) -> argparse.Namespace:
    """The command line of what the deepspeed launcher starts; it adds --local_rank."""
    parser = CommandParser(prog=prog, description=description)
    add_config_options(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(opened(sys.argv[1:] if arguments is None else arguments))
    options.config = take_config(parser, options)
    return options


def launched_config(options: argparse.Namespace) -> "tuple[RunConfig, int]":
    """The run's config, checked for the ranks that were started with this one; their number."""
    from magnetar.engine.config.schema import load_config

    world_size = launched_world_size()
    return load_config(options.config, options.set, world_size), world_size


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Check everything, then join the other ranks and train."""
    let_no_print_fail()
    from magnetar.engine.cluster.start_times import StartTimes

    times = StartTimes()
    options = parse_arguments(arguments, "magnetar.launchers.train", __doc__)
    config, world_size = launched_config(options)
    from magnetar.engine.cluster.process_groups import leave_distributed
    from magnetar.engine.prepare_run import prepare_run
    from magnetar.engine.trainer import train

    times.end("imports")
    with reports_in(Path(config.training.run_dir)):
        prepared = prepare_run(config, world_size)
        times.end("checks")
        train(*prepared, times)
        leave_distributed()


if __name__ == "__main__":
    main()
