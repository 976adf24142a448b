"""The questions to every machine of a hostfile, asked in parallel over ssh."""

import json
import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from magnetar.engine.cluster.arguments import exported
from magnetar.engine.cluster.hosts import ssh_command
from magnetar.engine.doctor import node

_SECONDS = 60.0  # time limit of an answer


@dataclass(eq=False)
class Machine:
    """A machine of the run, and what it has answered.

    Attributes:
        name: name in the hostfile.
        slots: number of ranks on it.
        is_remote: whether it is reached over ssh.
        report: report of engine.doctor.node; empty if there is none, for the reason in `problem`.
        clock: seconds by which its clock is ahead of ours.
        marks: names of the marks that it found in the run's folder.
        command: ssh command to try by hand.
        mark: name of its own mark.
    """

    name: str
    slots: int
    is_remote: bool
    report: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    clock: float = 0.0
    marks: list[str] = field(default_factory=list)
    command: str = ""
    mark: str = ""


def ask(
    machines: Sequence[Machine],
    about: Mapping[str, Any],
    exports: Mapping[str, str],
    ssh_port: int | None = None,
) -> None:
    """Ask all machines, rank 0's first, and note what they answer.

    Args:
        machines: machines of the run.
        about: the request: config, data, run_dir, address and port, see engine.doctor.node.
        exports: variables that the launcher sets there.
        ssh_port: port of sshd; None: ssh's default.
    """
    token = secrets.token_hex(4)
    elsewhere = {"address": None, "port": None}  # rank 0 will not listen there

    def answers(question: str, **more: Any) -> None:
        def note_answer(index: int, machine: Machine) -> None:
            if not machine.problem:
                asked = {"question": question, "mark": machine.mark, **about, **more}
                answer = _answer(machine, asked | (elsewhere if index else {}), exports, ssh_port)
                if answer is not None:
                    setattr(machine, question, answer)

        with ThreadPoolExecutor(max_workers=min(64, len(machines))) as pool:
            list(pool.map(note_answer, range(len(machines)), machines))

    for index, machine in enumerate(machines):
        machine.mark = f"{token}-{index}"
    try:
        answers("report")
        answers("marks", num_expected=sum(not machine.problem for machine in machines))
    finally:
        answers("unmark")


def _answer(
    machine: Machine, asked: Mapping[str, Any], exports: Mapping[str, str], ssh_port: int | None
) -> Any:
    """The answer of the program on a machine; None with the reason in the machine's `problem`."""
    source = Path(node.__file__).read_text()
    program = "import sys; exec(sys.stdin.read(int(sys.argv[1])))"
    words = [sys.executable, "-c", program, str(len(source))]
    if machine.is_remote:
        there = f"{exported(exports)}cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"
        words = ssh_command(machine.name, ["sh", "-c", there], ssh_port)
        machine.command = shlex.join(ssh_command(machine.name, ["hostname"], ssh_port))
    try:
        done = subprocess.run(
            words,
            input=f"{source}{json.dumps(asked)}\n",
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        machine.problem = f"no answer within {_SECONDS:g} s"
        return None
    arrived = time.time()
    for line in done.stdout.splitlines():
        if line.startswith(node.MARK):
            clock, answer = json.loads(line.removeprefix(node.MARK))
            machine.clock = clock - arrived
            return answer
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    machine.problem = said[-1] if said else f"it ended with status {done.returncode}"
    return None
