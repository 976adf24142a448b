"""Starting the ranks of a benchmark."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def launch(
    module: str,
    num_ranks: int,
    arguments: Sequence[str | Path],
    quietly: bool = False,
    seconds: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a module on so many ranks of this machine with the `deepspeed` launcher.

    Args:
        module: dotted name of the module.
        num_ranks: number of GPUs, or of processes on the CPU.
        arguments: arguments of the module.
        quietly: whether to keep the output of the ranks for the caller.
        seconds: time limit after which all ranks are killed; None: no limit.

    Raises:
        TimeoutExpired: if they were killed.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "deepspeed.launcher.runner", "-q"),
            *("--num_gpus", str(num_ranks), "--master_port", str(port), "--module", module),
            *map(str, arguments),
        ],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE if quietly else None,
        stderr=subprocess.STDOUT if quietly else None,
        text=True,
        start_new_session=seconds is not None,  # one group of processes, ranks included
    ) as launcher:
        try:
            output, _ = launcher.communicate(timeout=seconds)
        except BaseException:
            if seconds is None:
                launcher.kill()
            else:
                os.killpg(launcher.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, output)
