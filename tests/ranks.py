"""Runs a function on several real ranks (processes joined by gloo, or NCCL on GPUs)."""

import importlib
import math
import multiprocessing
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
SECONDS_AFTER_FAILURE = 10.0  # until the other ranks are killed
# Ranks are forked from a process that has imported what they need: importing DeepSpeed takes longer
# than most of them work. It has no threads yet, and inherits what tests/conftest.py has set.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["magnetar.engine.trainer", "tests.engine.programs", "torch._dynamo"])


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


def run_processes(
    module: str,
    arguments: list[str],
    environments: list[dict[str, str]],
    timeout: float = 300,
    fresh: bool = False,
) -> list[tuple[int | None, str]]:
    """Status and output of `python -m module` in each of several environments.

    When one has failed, the others are killed a little later; their status is None.

    Args:
        module: the module.
        arguments: its arguments.
        environments: all variables of each process.
        timeout: seconds until all of them are killed.
        fresh: whether each is a new interpreter, for what is decided when one starts.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(number)) for number in range(len(environments))]
        processes: list[Any] = []
        for output, environment in zip(outputs, environments, strict=True):
            if fresh or torch.cuda.is_available():  # CUDA cannot be forked
                words = [sys.executable, "-m", module, *arguments]
                with output.open("w") as file:
                    processes.append(
                        subprocess.Popen(
                            words, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
                        )
                    )
            else:
                given = (module, arguments, environment, str(output))
                processes.append(FORKED.Process(target=_run_module, args=given))
                processes[-1].start()
        end, grace = time.monotonic() + timeout, math.inf
        try:
            while None in (statuses := [_status(process) for process in processes]):
                if any(statuses):  # as the launcher does, which asks no longer
                    grace = min(grace, time.monotonic() + SECONDS_AFTER_FAILURE)
                if time.monotonic() > grace:
                    break
                if time.monotonic() > end:
                    raise subprocess.TimeoutExpired(module, timeout)
                time.sleep(0.02)
        finally:
            for process in processes:
                process.kill()
        return [(s, path.read_text()) for s, path in zip(statuses, outputs, strict=True)]


def _status(process: Any) -> int | None:
    """The exit status of a process; None while it runs."""
    return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode


def _run_module(module: str, arguments: list[str], environment: dict[str, str], out: str) -> None:
    """Be a new process that runs a module."""
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.chdir(ROOT)
    if os.environ.get("MAGNETAR_TEST_WITHOUT"):  # a program of users' takes nothing away itself
        from tests.machine import take_away

        take_away()  # it has as many threads as a user's
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_on_ranks(
    target: str, world_size: int, *arguments: Any, timeout: float = 300, fresh: bool = False
) -> list[Any]:
    """What `module:function` returns on each rank.

    The function is called with the arguments in processes that have the launcher's environment;
    a failure of any rank is raised here with that rank's output.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "arguments").write_bytes(pickle.dumps(arguments))
        environments = [os.environ | own for own in rank_variables(world_size)]
        found = run_processes("tests.ranks", [target, folder], environments, timeout, fresh)
        for rank, (status, output) in enumerate(found):
            if status:
                raise AssertionError(f"rank {rank} ended with {status}:\n{output}")
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
