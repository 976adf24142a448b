"""Train, and start again after a crash, until the run has finished.

magnetar supervise --num_gpus 8 --deepspeed_config ds_configs/lm_xmoe.json
magnetar supervise --hostfile hosts --deepspeed_config ds_configs/lm_xmoe.json

It takes what `deepspeed ... --module magnetar.launchers.train ...` takes, and calls that. Restarts,
with their causes, are in logbook.md of the run's folder.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from magnetar.engine.supervise.supervisor import Options, Supervisor
from magnetar.launchers.user_errors import user_errors

# Of DeepSpeed's launcher, handed on as they are.
_FLAGS = ("--no_ssh_check", "--save_pid", "--bind_cores_to_rank", "--no_local_rank")
_VALUES = (
    *("--launcher", "--launcher_args", "--bind_core_list", "--venv_script", "--log_level"),
    "--enable_each_rank_log",
)


def parse_arguments(arguments: Sequence[str] | None) -> Options:
    """The command line; what is no option of ours or of the launcher's ends the program."""
    parser = argparse.ArgumentParser(
        prog="magnetar supervise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--deepspeed_config", type=Path, required=True, metavar="JSON", help="the run's JSON")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override any key")
    add(
        *("--max-restarts", "--max_restarts"),
        type=_at_least_0,
        default=10,
        help="give up after so many restarts without a new checkpoint between them (10)",
    )
    add(
        "--backoff",
        type=_seconds,
        default=5.0,
        help="seconds before a restart, doubled at each further one without progress (5)",
    )
    add("--max-backoff", "--max_backoff", type=_seconds, default=300.0, help="at most (300)")
    theirs = parser.add_argument_group("of the deepspeed launcher").add_argument
    theirs("-H", "--hostfile", type=Path, help="read again before every start")
    theirs("-i", "--include", default="")
    theirs("-e", "--exclude", default="")
    theirs("--num_nodes", type=_at_least_1)
    theirs("--num_gpus", "--num_accelerators", type=_at_least_1)
    theirs("--master_addr")
    theirs("--master_port", type=_at_least_1, help="default: a free one, another at each start")
    theirs("--ssh_port", type=_at_least_1)
    theirs("--force_multi", action="store_true")
    theirs("-q", "--quiet", action="store_true")
    for name in _FLAGS:
        theirs(name, action="store_true", help=argparse.SUPPRESS)
    for name in _VALUES:
        theirs(name, help=argparse.SUPPRESS)
    theirs("--module", choices=["magnetar.launchers.train"], help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.include and given.exclude:
        parser.error("--include and --exclude contradict each other: use one of them")
    if (given.include or given.exclude) and (given.num_nodes or given.num_gpus):
        parser.error("--include and --exclude do not go with --num_nodes and --num_gpus")
    if given.hostfile is None and (given.include or given.exclude or given.num_nodes):
        parser.error("--include, --exclude and --num_nodes need --hostfile")
    passed = ["--quiet"] if given.quiet else []
    passed += [name for name in _FLAGS if getattr(given, name[2:])]
    for name in _VALUES:
        if (value := getattr(given, name[2:])) is not None:
            passed.append(f"{name}={value}")
    return Options(
        config=given.deepspeed_config,
        settings=tuple(given.set),
        max_restarts=given.max_restarts,
        backoff=given.backoff,
        max_backoff=given.max_backoff,
        hostfile=given.hostfile,
        num_nodes=given.num_nodes,
        num_gpus=given.num_gpus,
        include=given.include,
        exclude=given.exclude,
        master_addr=given.master_addr,
        master_port=given.master_port,
        ssh_port=given.ssh_port,
        force_multi=given.force_multi,
        passed=tuple(passed),
    )


def _at_least_1(text: str) -> int:
    return _at_least(text, 1)


def _at_least_0(text: str) -> int:
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} on")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value


@user_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Supervise; the status of the last start that was not restarted."""
    return Supervisor(parse_arguments(arguments)).run()


if __name__ == "__main__":
    sys.exit(main())
