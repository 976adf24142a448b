"""The questions to every machine of a hostfile, asked in parallel over ssh."""

import json
import os
import secrets
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from magnetar.engine.cluster.hosts import ssh_command
from magnetar.engine.doctor import node
from magnetar.engine.doctor.node import MARK

_SECONDS = 60.0  # time limit of a machine's report


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
    token, source = secrets.token_hex(4), Path(node.__file__).read_text()
    programs = []
    for index, machine in enumerate(machines):
        machine.mark = f"{token}-{index}"
        programs.append(_start(machine, len(source), exports, ssh_port))

    def hear_report(index: int) -> None:
        asked = {**about, "mark": machines[index].mark}
        if index > 0:  # rank 0 will not listen there
            asked |= {"address": None, "port": None}
        _hear_report(machines[index], programs[index], f"{source}{json.dumps(asked)}\n")

    def hear_marks(index: int) -> None:
        if not machines[index].problem:
            _say(programs[index], f"{num_marks}\n")
            machines[index].marks = (_hear(programs[index]) or (0.0, []))[1]

    with ThreadPoolExecutor(max_workers=min(64, len(machines))) as pool:
        list(pool.map(hear_report, range(len(machines))))
        num_marks = sum(not machine.problem for machine in machines)
        list(pool.map(hear_marks, range(len(machines))))
        list(pool.map(_end, programs))


def _start(
    machine: Machine, length: int, exports: Mapping[str, str], ssh_port: int | None
) -> subprocess.Popen[str]:
    """The program on a machine, whose own text is the first that it reads."""
    program = "import sys; exec(sys.stdin.read(int(sys.argv[1])))"
    words = [sys.executable, "-c", program, str(length)]
    if machine.is_remote:
        variables = "".join(f"export {name}={shlex.quote(v)}; " for name, v in exports.items())
        there = f"{variables}cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"
        words = ssh_command(machine.name, ["sh", "-c", there], ssh_port)
        machine.command = shlex.join(ssh_command(machine.name, ["hostname"], ssh_port))
    pipe = subprocess.PIPE
    return subprocess.Popen(
        words, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def _say(program: subprocess.Popen[str], text: str) -> None:
    assert program.stdin is not None
    with suppress(BrokenPipeError):  # standard error has the reason
        program.stdin.write(text)
        program.stdin.flush()


def _hear(program: subprocess.Popen[str]) -> tuple[float, Any] | None:
    """The arrival time and the content of its next line; None at the end of its output."""
    assert program.stdout is not None
    for line in program.stdout:
        if line.startswith(MARK):
            return time.time(), json.loads(line.removeprefix(MARK))
    return None


def _hear_report(machine: Machine, program: subprocess.Popen[str], question: str) -> None:
    timer = threading.Timer(_SECONDS, program.kill)
    timer.start()
    try:
        _say(program, question)
        clock, told = _hear(program), _hear(program)
    finally:
        timer.cancel()
    if clock is not None:
        machine.clock = clock[1] - clock[0]
    if told is not None:
        machine.report = told[1]
        return
    assert program.stderr is not None
    status = program.wait()
    said = [line.strip() for line in program.stderr if line.strip()]
    if status == -9:
        said = [f"no answer within {_SECONDS:g} s"]
    machine.problem = said[-1] if said else f"it ended with status {status}"


def _end(program: subprocess.Popen[str]) -> None:
    assert program.stdin is not None
    with suppress(BrokenPipeError):
        program.stdin.close()
    try:
        program.wait(timeout=10)
    except subprocess.TimeoutExpired:
        program.kill()
        program.wait()
