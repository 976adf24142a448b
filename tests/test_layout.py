"""Imports go one way, and importing does nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT

PACKAGES = ("launchers", "engine", "convert", "models", "data")
MAY_IMPORT = {
    "launchers": {"launchers", "engine", "convert", "models", "data"},
    "engine": {"engine", "models", "data"},
    "convert": {"convert", "engine", "models", "data"},
    "models": {"models"},
    "data": {"data"},
}
FOR_EVERYBODY = {"magnetar.data.errors", "magnetar.data.atomic"}
MAY_IMPORT_DEEPSPEED = {
    "models/moe/deepspeed.py",
    "engine/checkpoint/save_load.py",
    "engine/doctor/environment.py",
    "engine/doctor/run.py",
    "engine/build.py",
    "engine/evaluate.py",
    "engine/zero.py",
    "engine/train_step.py",
    "engine/cluster/process_groups.py",
    "engine/admin/measure.py",
    "engine/guards.py",
    "engine/report/samples.py",
    "engine/sparse_clip.py",
    "engine/trainer.py",
}
# docs/design.md says what each of them knows. The messages of engine/config may name a stage.
KNOW_THE_ZERO_STAGE = {
    "engine/config/schema.py",
    "engine/memory_planner.py",
    "engine/sparse_clip.py",
    "engine/zero.py",
    "models/moe/deepspeed.py",
    "models/moe/drop_in.py",
}
ZERO_STAGE = re.compile(r"zero.?3|zero_stage|\bstage3|ds_id|ds_tensor|is_away", re.IGNORECASE)
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).glob("**/*.py"))


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    allowed = MAY_IMPORT[path.relative_to(ROOT).parts[0]]
    for module in imported_modules(path):
        top, _, rest = module.partition(".")
        assert top not in PACKAGES, f"{name} imports {module} without the name of the package"
        if top == "magnetar" and rest and module not in FOR_EVERYBODY:
            assert rest.split(".")[0] in allowed, f"{name} imports {module}"
        if top == "triton":
            is_kernel = "/kernels/" in name
            assert is_kernel, f"{name} imports {module}"
        if top == "deepspeed":
            assert name in MAY_IMPORT_DEEPSPEED, f"{name} imports {module}"


def test_deepspeed_is_imported_by_no_more_files_than_listed() -> None:
    importing = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(module.split(".")[0] == "deepspeed" for module in imported_modules(path))
    }
    assert importing == MAY_IMPORT_DEEPSPEED


def test_the_zero_stage_is_known_to_no_more_files_than_listed() -> None:
    knowing = {
        name
        for path in SOURCES
        if not (name := str(path.relative_to(ROOT))).startswith("engine/config/")
        if ZERO_STAGE.search(path.read_text())
    }
    assert knowing | {"engine/config/schema.py"} == KNOW_THE_ZERO_STAGE


@pytest.mark.slow
def test_importing_prints_nothing_of_our_own_and_changes_no_environment() -> None:
    modules = [
        "magnetar."
        + str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for path in SOURCES
        if not path.stem.endswith("_magnetar")  # imported by transformers only, from their copies
    ]
    program = (
        "import importlib, os, sys, bitsandbytes, deepspeed, torch\n"  # these may
        "environment, threads = dict(os.environ), torch.get_num_threads()\n"
        "print('here')\n"
        f"for module in {modules}: importlib.import_module(module)\n"
        "assert dict(os.environ) == environment\n"
        "assert torch.get_num_threads() == threads\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("here\n")[1] == ""


def test_the_front_of_engine_and_every_folder_can_be_taken_in_at_a_glance() -> None:
    def num_sources(folder: Path) -> int:
        return sum(path.name != "__init__.py" for path in folder.glob("*.py"))

    assert num_sources(ROOT / "engine") <= 12
    folders = {path.parent for path in SOURCES}
    assert {str(folder): n for folder in folders if (n := num_sources(folder)) > 15} == {}
