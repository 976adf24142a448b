"""Train, and start again after a crash, until the run has finished.

magnetar supervise lm_xmoe --num_gpus 8
magnetar supervise lm_xmoe --hostfile hosts

It takes the options of `magnetar train` and starts the same launcher. The restarts and their causes
are in logbook.md of the run's folder.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial

from magnetar.engine.supervise.supervisor import Options, Supervisor
from magnetar.launchers.launch import (
    add_launcher_options,
    handed_on,
    refuse_contradictions,
    underscored,
)
from magnetar.launchers.terminal.command_line import (
    CommandParser,
    add_config_options,
    add_option,
    take_config,
    whole_number,
)
from magnetar.launchers.terminal.output import let_no_print_fail
from magnetar.launchers.terminal.user_errors import user_errors


def parse_arguments(arguments: Sequence[str] | None) -> Options:
    """The command line; what is no option of ours or of the launcher's ends the program."""
    parser = CommandParser(prog="magnetar supervise", description=__doc__, allow_abbrev=False)
    add_config_options(parser)
    add = partial(add_option, parser)
    add(
        "--max-restarts --max_restarts N",
        "give up after N restarts with no new checkpoint between them (%(default)s)",
        *(partial(whole_number, least=0), 10),
    )
    add(
        "--backoff S",
        "seconds before a restart, doubled after each restart without progress (%(default)g)",
        *(_seconds, 5.0),
    )
    about = "longest pause before a restart, in seconds (%(default)g)"
    add("--max-backoff --max_backoff S", about, _seconds, 300.0)
    add_launcher_options(parser, "magnetar.launchers.train")
    given = parser.parse_args(underscored(arguments))
    refuse_contradictions(parser, given)
    if given.hostfile is None and (given.include or given.exclude or given.num_nodes):
        parser.error("--include, --exclude and --num_nodes need --hostfile")
    given.config, given.settings = take_config(parser, given), tuple(given.set)
    given.passed = tuple(handed_on(given))
    return Options(**{field.name: getattr(given, field.name) for field in fields(Options)})


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{text} is no number of seconds")


@user_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Supervise; the status of the last start that was not restarted."""
    let_no_print_fail()
    return Supervisor(parse_arguments(arguments)).run()


if __name__ == "__main__":
    sys.exit(main())
