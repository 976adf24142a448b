"""The questions to every machine of a hostfile, asked in parallel over ssh."""

import contextlib
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from magnetar.engine.cluster.hosts import ssh_command
from magnetar.engine.doctor import node as node_program
from magnetar.engine.doctor.node import MARK

_SECONDS = 60.0  # time limit of a machine's report
_SOURCE = Path(node_program.__file__)


@dataclass(frozen=True)
class Node:
    """A machine of the run.

    Attributes:
        name: name in the hostfile.
        slots: number of ranks on it.
        is_remote: whether it is reached over ssh.
    """

    name: str
    slots: int
    is_remote: bool


@dataclass
class Answer:
    """The answer of a machine.

    Attributes:
        node: the machine.
        report: report of engine.doctor.node; empty if there is none, for the reason in `problem`.
        clock: seconds by which its clock is ahead of ours.
        marks: names of the marks that it found in the run's folder.
        command: ssh command to try by hand.
        mark: name of its own mark.
    """

    node: Node
    report: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    clock: float = 0.0
    marks: list[str] = field(default_factory=list)
    command: str = ""
    mark: str = ""


def ask(
    nodes: Sequence[Node], about: Mapping[str, Any], exports: Mapping[str, str]
) -> list[Answer]:
    """The answers of all machines, in their order.

    Args:
        nodes: machines of the run, rank 0's first.
        about: the request: config, data, run_dir, address and port, see engine.doctor.node.
        exports: variables that the launcher sets there.
    """
    token = secrets.token_hex(4)
    conversations = [
        _Conversation(
            node, f"{token}-{index}", about, exports if node.is_remote else {}, index == 0
        )
        for index, node in enumerate(nodes)
    ]
    with ThreadPoolExecutor(max_workers=min(64, len(nodes))) as pool:
        list(pool.map(_Conversation.hear_report, conversations))
        num_marks = sum(not conversation.answer.problem for conversation in conversations)
        list(pool.map(lambda conversation: conversation.hear_marks(num_marks), conversations))
        list(pool.map(_Conversation.end, conversations))
    return [conversation.answer for conversation in conversations]


class _Conversation:
    """A conversation with the program on one machine."""

    def __init__(
        self,
        node: Node,
        mark: str,
        about: Mapping[str, Any],
        exports: Mapping[str, str],
        serves: bool,
    ) -> None:
        self.answer = Answer(node, mark=mark)
        self.asked = {**about, "mark": mark}
        if not serves:
            self.asked |= {"address": None, "port": None}
        source = _SOURCE.read_text()
        words = [sys.executable, "-c", "import sys; exec(sys.stdin.read(int(sys.argv[1])))"]
        words.append(str(len(source)))
        if node.is_remote:
            variables = "".join(f"export {name}={shlex.quote(v)}; " for name, v in exports.items())
            there = f"{variables}cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"
            words = ssh_command(node.name, ["sh", "-c", there])
            self.answer.command = shlex.join(ssh_command(node.name, ["hostname"]))
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.source = source

    def _say(self, text: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # standard error has the reason
            self.process.stdin.write(text)
            self.process.stdin.flush()

    def _hear(self) -> tuple[float, Any] | None:
        """The arrival time and the content of its next line; None at the end of its output."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return time.time(), json.loads(line.removeprefix(MARK))
        return None

    def hear_report(self) -> None:
        timer = threading.Timer(_SECONDS, self.process.kill)
        timer.start()
        try:
            self._say(f"{self.source}{json.dumps(self.asked)}\n")
            clock, told = self._hear(), self._hear()
        finally:
            timer.cancel()
        if clock is not None:
            self.answer.clock = clock[1] - clock[0]
        if told is not None:
            self.answer.report = told[1]
            return
        assert self.process.stderr is not None
        status = self.process.wait()
        said = [line.strip() for line in self.process.stderr if line.strip()]
        if status == -9:
            said = [f"no answer within {_SECONDS:g} s"]
        self.answer.problem = said[-1] if said else f"it ended with status {status}"

    def hear_marks(self, num_expected: int) -> None:
        if not self.answer.problem:
            self._say(f"{num_expected}\n")
            self.answer.marks = (self._hear() or (0.0, []))[1]

    def end(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
