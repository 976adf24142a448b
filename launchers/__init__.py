"""The commands: each parses its arguments, calls one function and prints."""

import os
import sys
from contextlib import suppress


def command_of(module: str) -> str:
    """The command whose module in this folder has the given name: `magnetar prepare`, say."""
    return f"magnetar {module.removesuffix('_data').replace('_', '-')}"


def _tell_new_name() -> None:
    """Name the command that replaces `python -m launchers.NAME`, once a run."""
    ranks = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    rank = next((os.environ[name] for name in ranks if name in os.environ), "0")
    # Only what was typed: a process of a pool imports this package, too.
    typed = [word for word in sys.orig_argv if word.startswith(f"{__name__}.")]
    if typed and rank == "0":
        new = command_of(typed[0].removeprefix(f"{__name__}."))
        with suppress(OSError):  # nobody reads it
            print(
                f"{typed[0]} will go in the next release: use `{new}`", file=sys.stderr, flush=True
            )


if __name__ == "launchers":  # a checkout's folder, not magnetar.launchers
    _tell_new_name()
