"""Train a model.

deepspeed [--hostfile H] --module magnetar.launchers.train --deepspeed_config X.json
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from magnetar.launchers.user_errors import user_errors


def parse_arguments(
    arguments: Sequence[str] | None, prog: str, description: str | None
) -> argparse.Namespace:
    """The command line of what the deepspeed launcher starts; it adds --local_rank."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument(
        "--deepspeed_config", type=Path, required=True, metavar="JSON", help="the run's JSON"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override any key, magnetar.model.num_layers=4 say; may be repeated",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def launched_world_size() -> int:
    """Ranks that were started with this one: by deepspeed or torchrun, by MPI, or none."""
    names = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    return next((int(os.environ[name]) for name in names if name in os.environ), 1)


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Check everything, then join the other ranks and train."""
    from magnetar.engine.cluster.start_times import StartTimes

    times = StartTimes()
    options = parse_arguments(arguments, "magnetar.launchers.train", __doc__)
    from magnetar.engine.config.schema import load_config

    world_size = launched_world_size()
    config = load_config(options.deepspeed_config, options.set, world_size)
    from magnetar.engine.cluster.process_groups import leave_distributed
    from magnetar.engine.prepare_run import prepare_run
    from magnetar.engine.trainer import train

    times.end("imports")
    prepared = prepare_run(config, world_size)
    times.end("checks")
    train(*prepared, times)
    leave_distributed()


if __name__ == "__main__":
    main()
