"""Variables that other machines get: DeepSpeed's launcher itself is what they are compared with."""

import base64
import json
import sys
from pathlib import Path

import pytest
from deepspeed.launcher import runner

from magnetar.engine.doctor import environment


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "deepspeed_env"
    path.write_text("GLOO_SOCKET_IFNAME=ib0\nOMP_NUM_THREADS = 4\nEMPTY=\n")
    monkeypatch.setenv("DS_ENV_FILE", str(path))
    monkeypatch.setattr(runner, "DEEPSPEED_ENVIRONMENT_NAME", str(path))
    return path


def test_they_are_those_of_the_launchers_command(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    started: list[list[str]] = []

    class Started(Exception):
        pass

    def popen(command: list[str], **_: object) -> None:
        started.append(command)
        raise Started

    monkeypatch.setattr(runner.subprocess, "Popen", popen)
    monkeypatch.setattr(runner.PDSHRunner, "backend_exists", lambda _: True)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=2\nb slots=1\n")
    arguments = ["--hostfile", str(hostfile), "--no_ssh_check", "--master_addr", "10.0.0.1"]
    with pytest.raises(Started):
        runner.main([*arguments, "--module", "magnetar.launchers.train"])
    (command,) = started
    exports = next(part for part in command if part.startswith("export "))
    expected = dict(
        words.removeprefix("export ").split("=", 1)
        for words in exports.strip().split("; ")
        if words
    )
    expected = {name: text.strip(";").strip('"') for name, text in expected.items()}
    found = environment.exports()
    assert found.variables == expected
    assert found.variables["GLOO_SOCKET_IFNAME"] == "ib0"
    assert found.files == [file]
    assert "OMP_PROC_BIND" in found.left_behind
    assert "OMP_NUM_THREADS" not in found.left_behind

    info = next(part for part in command if part.startswith("--world_info="))
    slots = json.loads(base64.urlsafe_b64decode(info.partition("=")[2]))
    first, second = environment.of_nodes(slots, "10.0.0.1", 29500)
    assert (first["RANK"], second["RANK"]) == ("0 to 1", "2 to 2")
    assert (second["CROSS_RANK"], second["LOCAL_SIZE"], second["WORLD_SIZE"]) == ("1", "1", "3")
    assert sys.executable in command
