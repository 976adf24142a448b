"""Runs a function on several real ranks (processes joined by gloo, or NCCL on GPUs)."""

import importlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank_variables(world_size: int) -> list[dict[str, str]]:
    """What the launcher says to each of so many ranks of this machine."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"WORLD_SIZE": str(world_size), "LOCAL_SIZE": str(world_size)}
    shared["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def run_on_ranks(target: str, world_size: int, *arguments: Any, timeout: float = 300) -> list[Any]:
    """What `module:function` returns on each rank.

    The function is called with the arguments in processes that have the launcher's environment;
    a failure of any rank is raised here with that rank's output.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "arguments").write_bytes(pickle.dumps(arguments))
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.ranks", target, folder],
                env=os.environ | own,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for own in rank_variables(world_size)
        ]
        outputs = []
        try:
            outputs = [process.communicate(timeout=timeout)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
            if process.returncode != 0:
                raise AssertionError(f"rank {rank} ended with {process.returncode}:\n{output}")
        return [
            pickle.loads(Path(folder, f"result_{rank}").read_bytes()) for rank in range(world_size)
        ]


if __name__ == "__main__":
    from tests.machine import imitate

    imitate()
    module, function = sys.argv[1].split(":")
    given = pickle.loads(Path(sys.argv[2], "arguments").read_bytes())
    answer = getattr(importlib.import_module(module), function)(*given)
    Path(sys.argv[2], f"result_{os.environ['RANK']}").write_bytes(pickle.dumps(answer))
    sys.stdout.flush()
    # Not by Python's shutdown, in which a thread of gloo may abort the process; that the launchers
    # end well all the same is tested by themselves (engine/cluster/process_groups.py).
    os._exit(0)
