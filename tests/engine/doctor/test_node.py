"""What a machine tells about itself, compared with what was done to it."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from magnetar.engine.doctor import node


def test_the_program_imports_nothing_of_ours_and_answers(tmp_path: Path) -> None:
    # As it is sent: by itself, in a folder without Magnetar; -S leaves an installed one out.
    asked = {"config": None, "data": None, "run_dir": "runs/a", "mark": "m0", "num_expected": 1}
    asked |= {"address": None, "port": None}
    source = Path(node.__file__).read_text()

    def answer(question: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", f"import sys; exec(sys.stdin.read({len(source)}))"],
            input=f"{source}{json.dumps(asked | {'question': question})}\n",
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return json.loads(done.stdout.removeprefix(node.MARK))[1]

    report = answer("report")
    assert report["failed"] == {}
    assert report["code"]["files"] == 0
    assert report["versions"]["python"] == sys.version.split()[0]
    assert report["disk"]["folder"] == str(tmp_path)
    assert answer("marks") == ["m0"]
    assert answer("unmark") is None
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_fails_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "gpus", lambda: 1 / 0)
    asked = dict.fromkeys(("config", "data", "run_dir", "mark", "address", "port"))
    told = node.report(asked)
    assert told["failed"] == {"gpus": "ZeroDivisionError: division by zero"}
    assert told["gpus"] is None
    assert told["machine"]["cores"] >= 1


def test_sources_have_another_hash_when_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "engine").mkdir()
    file = tmp_path / "engine/a.py"
    hashes = set()
    for text in ("1", "2"):
        file.write_text(text)
        hashes.add(node.code()["sha256"])
    file.rename(tmp_path / "engine/b.py")
    hashes.add(node.code()["sha256"])
    assert len(hashes) == 3


def test_data_is_known_by_manifest_and_sizes(tmp_path: Path) -> None:
    assert node.digest_of_data(None) is None
    assert node.digest_of_data(str(tmp_path / "none")) == ""
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "tokens").write_bytes(b"12")
    first = node.digest_of_data(str(tmp_path))
    (tmp_path / "tokens").write_bytes(b"1")
    second = node.digest_of_data(str(tmp_path))
    (tmp_path / "manifest.json").write_text("[]")
    assert len({first, second, node.digest_of_data(str(tmp_path))}) == 3


def test_a_lock_is_held_while_its_file_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "py311_cpu/fused_adam/lock"
    lock.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert node.locks() == []
    with lock.open("w"):
        (held,) = node.locks()
        assert held["holder"] is not None
    (left,) = node.locks()
    assert (left["path"], left["holder"]) == (str(lock), None)


def test_ports_and_addresses_are_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert node.port_problem("127.0.0.1", port) == "in use"
    assert node.port_problem("127.0.0.1", port) == ""
    assert node.port_problem("203.0.113.7", port) == "not an address of this machine"
    assert node.port_problem(None, None) == ""


def test_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ncase "$1" in *compute-apps*) echo "GPU-1, 77, python";;\n'
        '*) for gpu in "1, NVIDIA H100, 81559, 512" "2, NVIDIA H100, 81559, 0"; do\n'
        '  echo "GPU-$gpu, 580.1"; done;; esac\n'
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert node.gpus() == {"driver": "", "found": [], "processes": []}
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    told: dict[str, Any] = node.gpus()
    assert told["driver"] == "580.1"
    assert [gpu["used"] for gpu in told["found"]] == [512 * 2**20, 0]
    assert told["processes"] == [["GPU-1", "77", "python"]]
