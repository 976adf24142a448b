"""What ranks leave behind when a launcher ends."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.ranks import ROOT
from tests.runs import environment, launcher_command, make_corpus, write_config


@pytest.mark.needs("Linux")
@pytest.mark.parametrize(
    ("launcher", "norm"),
    [("magnetar.launchers.train", "subln"), ("magnetar.launchers.profile_admin", "admin")],
)
def test_no_thread_of_gloo_meets_the_end_of_python(
    tmp_path: Path, launcher: str, norm: str
) -> None:
    # One that does can abort a run that has done everything: see engine/cluster/process_groups.py.
    changes = {"magnetar.model.norm": norm, "magnetar.training.num_steps": 1}
    config = write_config(tmp_path, make_corpus(tmp_path / "corpus"), changes=changes)
    command = [
        part.replace("magnetar.launchers.train", "tests.launchers.threads_at_exit")
        for part in launcher_command(config)
    ]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=environment() | {"LAUNCHER": launcher},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = re.findall("threads at exit: (.*)", result.stdout)
    assert len(found) == 2
    assert not any("gloo" in names for names in found)
