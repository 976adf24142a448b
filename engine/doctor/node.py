"""The program that reports about one machine; sent there as text, it imports nothing of ours.

Standard input has this program, and then a question as one line of JSON. "report" leaves a mark in
the run's folder, too; "marks" asks for the marks of all machines there, and "unmark" takes the own
mark away. The answer is one line: the time of the machine's clock, and what was asked for.
"""

import errno
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MARK = "magnetar-doctor: "  # tells our lines from those that a login shell prints
_MARK_FILE = ".magnetar-doctor-"
_SOURCES = ("launchers", "convert", "engine", "models", "data")
_PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "pydantic", "triton", "mpi4py")
_NCCL = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")
_ASKED_VARIABLES = ("TORCH_CUDA_ARCH_LIST", "TORCH_EXTENSIONS_DIR")


def report(asked: dict[str, Any]) -> dict[str, Any]:
    """The report. Its entry `failed` names what could not be found out, with the reason.

    Args:
        asked: the request. config, data, run_dir: paths or None. mark: name of this machine's mark
            in the run's folder. address and port: place where rank 0 will listen, None elsewhere.
    """
    parts: dict[str, Callable[[], Any]] = {
        "versions": versions,
        "code": code,
        "config": lambda: digest_of_file(asked["config"]),
        "data": lambda: digest_of_data(asked["data"]),
        "gpus": gpus,
        "machine": machine,
        "locks": locks,
        "port": lambda: port_problem(asked["address"], asked["port"]),
        "disk": lambda: disk(asked["run_dir"], asked["mark"]),  # last, because it leaves the mark
    }
    told: dict[str, Any] = {"failed": {}}
    for name, part in parts.items():
        try:
            told[name] = part()
        except Exception as error:  # a failed check must not hide the others
            told[name] = None
            told["failed"][name] = f"{type(error).__name__}: {error}"
    return told


def versions() -> dict[str, str]:
    """Versions of Python, the driver and packages, read without importing any."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_NCCL):
        with suppress(metadata.PackageNotFoundError):
            found["nccl" if name in _NCCL else name] = metadata.version(name)
    return found


def code() -> dict[str, Any]:
    """Commit of the working folder; hash of its sources, or of the installed package's."""
    digest, count = hashlib.sha256(), 0
    root, installed = Path(), find_spec("magnetar")
    if not Path("engine").is_dir() and installed is not None:  # no checkout
        root = Path(installed.origin or "").parent
    for folder in _SOURCES:
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
            count += 1
    commit = ""
    if shutil.which("git"):
        command = ["git", "-c", "safe.directory=*", "rev-parse", "--short=12", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {"folder": os.getcwd(), "commit": commit, "files": count, "sha256": digest.hexdigest()}


def digest_of_file(path: str | None) -> str | None:
    """sha256 of a file; "" if it is missing, None without a path."""
    if path is None:
        return None
    if not Path(path).is_file():
        return ""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def digest_of_data(path: str | None) -> str | None:
    """Hash of a prepared folder: its manifest, and the names and sizes of its files."""
    if path is None:
        return None
    folder = Path(path)
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
            if file.suffix == ".json":
                digest.update(file.read_bytes())
    return digest.hexdigest()


def disk(run_dir: str | None, mark: str) -> dict[str, Any] | None:
    """Free bytes at the place of the run's folder, after leaving a mark there."""
    if run_dir is None:
        return None
    folder = nearest_folder(run_dir)
    problem = ""
    try:
        (folder / f"{_MARK_FILE}{mark}").write_text("")
    except OSError as error:
        problem = error.strerror or str(error)
    return {"folder": str(folder), "free": shutil.disk_usage(folder).free, "problem": problem}


def nearest_folder(path: str) -> Path:
    """The path, or the nearest folder above it that exists."""
    folder = Path(path).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def marks(asked: dict[str, Any]) -> list[str]:
    """The marks in the run's folder; waits a few seconds until a shared disk shows all of them."""
    if asked["run_dir"] is None:
        return []
    folder, give_up = nearest_folder(asked["run_dir"]), time.monotonic() + 3
    while True:
        found = [path.name.removeprefix(_MARK_FILE) for path in folder.glob(f"{_MARK_FILE}*")]
        if len(found) >= asked["num_expected"] or time.monotonic() > give_up:
            return found
        time.sleep(0.2)


def unmark(asked: dict[str, Any]) -> None:
    """Remove the mark of this machine."""
    if asked["run_dir"] is not None:
        own = nearest_folder(asked["run_dir"]) / f"{_MARK_FILE}{asked['mark']}"
        own.unlink(missing_ok=True)


def gpus() -> dict[str, Any]:
    """NVIDIA's GPUs and the processes on them; none without nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return {"driver": "", "found": [], "processes": []}
    rows = _nvidia("--query-gpu=uuid,name,memory.total,memory.used,driver_version")
    found = [
        {"id": id_, "name": name, "total": float(total) * 2**20, "used": float(used) * 2**20}
        for id_, name, total, used, _ in rows
    ]
    processes = _nvidia("--query-compute-apps=gpu_uuid,pid,process_name")
    driver = rows[0][4] if rows else ""
    return {"driver": driver, "found": found, "processes": processes}


def _nvidia(query: str) -> list[list[str]]:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines() if line]


def machine() -> dict[str, Any]:
    """Cores, shared memory, compilers, and the variables that change compilation."""
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    programs = {name: shutil.which(name, path=path) for name in ("ninja", "c++")}
    return {
        "cores": len(os.sched_getaffinity(0)),
        "shared_memory": shared,
        "programs": programs,
        "variables": {name: os.environ[name] for name in _ASKED_VARIABLES if name in os.environ},
    }


def locks() -> list[dict[str, Any]]:
    """Locks in the cache where torch compiles extensions, with the process that holds each.

    The compiling process keeps the file open until it is done.
    """
    default = Path.home() / ".cache/torch_extensions"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", default))
    found = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    holders: dict[str, int] = {}
    if found:
        for link in Path("/proc").glob("[0-9]*/fd/*"):
            with suppress(OSError):
                holders.setdefault(os.readlink(link), int(link.parts[2]))
    return [
        {
            "path": str(path),
            "seconds": max(0.0, time.time() - path.stat().st_mtime),
            "holder": holders.get(str(path.resolve())),
        }
        for path in found
    ]


def port_problem(address: str | None, port: int | None) -> str:
    """The reason why rank 0 could not listen here, or ""."""
    if address is None or port is None:
        return ""
    words = {errno.EADDRINUSE: "in use", errno.EADDRNOTAVAIL: "not an address of this machine"}
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen()
    except OSError as error:
        return words.get(error.errno or 0, error.strerror or str(error))
    return ""


def main() -> None:
    """Answer the question of standard input on standard output, as the module says."""
    asked = json.loads(sys.stdin.readline())
    answer = {"report": report, "marks": marks, "unmark": unmark}[asked["question"]](asked)
    print(f"{MARK}{json.dumps([time.time(), answer])}", flush=True)


if __name__ == "__main__":
    main()
