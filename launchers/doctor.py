"""Look at every machine before a run starts, and say what to do about what is wrong.

magnetar doctor --hostfile hosts --deepspeed_config ds_configs/lm_xmoe.json

Machines are asked side by side over ssh: whether they answer, clock, code, versions, JSON, data,
disk, GPUs, locks of compilations, the port. If nothing speaks against it, the deepspeed launcher
then starts all ranks, which measure their collectives and links. Without --hostfile: this machine.
Status 0: a run can start; 1: something must be mended first; 2: bad input.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields

from magnetar.launchers.launch import (
    add_launcher_options,
    handed_on,
    refuse_contradictions,
    underscored,
)
from magnetar.launchers.terminal.command_line import (
    CommandParser,
    add_option,
    add_set_option,
    find_config,
)
from magnetar.launchers.terminal.user_errors import user_errors


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the fields of LaunchOptions."""
    parser = CommandParser(prog="magnetar doctor", description=__doc__)
    add_option(parser, "--deepspeed_config JSON", "the run's JSON, or a shipped config's name")
    add_set_option(parser)
    add_launcher_options(parser, "magnetar.launchers.train")
    add_option(parser, "--measure SIZES", argparse.SUPPRESS)  # what the ranks do
    add_option(parser, "--local_rank N", argparse.SUPPRESS, int)
    given = parser.parse_args(underscored(arguments))
    refuse_contradictions(parser, given)
    if given.set and given.deepspeed_config is None:
        parser.error("--set overrides keys of a JSON: give --deepspeed_config, too")
    given.config = None if given.deepspeed_config is None else find_config(given.deepspeed_config)
    given.settings, given.passed = tuple(given.set), tuple(handed_on(given))
    return given


def measure(asked: str) -> None:
    """What each rank does: measure collectives and links."""
    from magnetar.engine.cluster.process_groups import leave_distributed
    from magnetar.engine.doctor import bandwidth

    *sizes, seconds = map(int, asked.split(","))
    bandwidth.measure(bandwidth.Sizes(*sizes), seconds)
    leave_distributed()


@user_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Examine and print; 1 if something must be mended before a run starts."""
    given = parse_arguments(arguments)
    if given.measure is not None:
        measure(given.measure)
        return 0
    from rich.console import Console

    from magnetar.engine.cluster.hosts import LaunchOptions
    from magnetar.engine.doctor import tables
    from magnetar.engine.doctor.run import examine

    options = LaunchOptions(**{f.name: getattr(given, f.name) for f in fields(LaunchOptions)})
    with Console(stderr=True).status("asking the machines, then measuring: up to 3 minutes"):
        examination = examine(options)
    console = Console(highlight=False)
    console.print(tables.overview(examination))
    console.print(tables.machines(examination))
    if examination.measured is not None:
        console.print(tables.collectives(examination))
    else:
        console.print(f"Collectives were not measured: {examination.skipped}.\n")
    tables.print_environment(console, examination)
    console.print()
    tables.print_findings(console, examination)
    if examination.num_problems:
        console.print(f"\n{examination.num_problems} to mend before a run starts")
        return 1
    console.print("A run can start." if examination.findings else "All well: a run can start.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
