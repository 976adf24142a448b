"""No print ends what runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from magnetar.launchers.terminal.output import let_no_print_fail
from tests.ranks import ROOT

PROGRAM = """
import sys
from rich.console import Console
from magnetar.launchers.terminal.output import let_no_print_fail
from magnetar.launchers.terminal.user_errors import user_errors
with user_errors():
    {before}
    for _ in range(3000):
        Console(highlight=False).print("\\u2026 a step with a caf\\u00e9 and \\udce9")
        print("a line", flush=True)
        print("and an error", file=sys.stderr)
    open(sys.argv[1], "w").write("finished")
"""


def run(tmp_path: Path, shell: str, before: str = "pass", **variables: str) -> int:
    """The status of a program whose output goes where a shell says."""
    program = [sys.executable, "-c", PROGRAM.format(before=before), str(tmp_path / "done")]
    command = ["bash", "-c", f'"$@" {shell}; exit "${{PIPESTATUS[0]}}"', "bash", *program]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=False, timeout=60)
    return done.returncode


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii:surrogateescape"},
        {"PYTHONIOENCODING": "utf-8:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
def test_letters_that_a_terminal_lacks_are_replaced(
    variables: dict[str, str], tmp_path: Path
) -> None:
    assert run(tmp_path, ">/dev/null", **variables) == 0
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(
    "shell", ["| true", "2>&1 | true", ">/dev/full 2>&1", ">&-", ">&- 2>&-", "<&- >&- 2>&-"]
)
def test_what_trains_goes_on_without_its_output(shell: str, tmp_path: Path) -> None:
    assert run(tmp_path, shell, "let_no_print_fail()") == 0
    assert (tmp_path / "done").read_text() == "finished"


def test_other_commands_end_with_their_reader(tmp_path: Path) -> None:
    assert run(tmp_path, "2>/dev/null | true") == 128 + 13
    assert not (tmp_path / "done").exists()


def test_an_output_is_wrapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    let_no_print_fail()
    once = sys.stdout
    let_no_print_fail()
    assert sys.stdout is once
    assert sys.stdout.isatty() in (True, False)
