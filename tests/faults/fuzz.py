"""Broken JSONs and broken data, fed to the launchers: a clear message and status 2, or a run.

    python -m tests.faults.fuzz --configs 2000 --files 500 --out benchmarks/results/fuzz.json
    python -m tests.faults.fuzz --configs 2000 --files 500 --only 17  # a case again

Each JSON of ds_configs/, cut down to two steps of a tiny model, is changed in one to three places
or damaged as text. Files of prepared folders and raw text are damaged too. A launcher's real `main`
gets the result, in a process forked from one that has imported everything. A case fails if it ends
with a traceback, with a status other than 0 and 2, or without a message or a step. It also fails
after --limit seconds without a step, or if a file that existed before has changed.
"""

import argparse
import hashlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from benchmarks.measurement import git_commit, versions
from magnetar.data.errors import UserError
from magnetar.launchers.terminal.user_errors import user_errors
from tests.faults.fuzz_cases import (
    CONFIGS,
    NUM_VALID,
    Case,
    config_cases,
    file_cases,
    preparation,
    raw_files,
    shrunk,
)

PRELOADED = (
    "magnetar.launchers.train",
    "magnetar.launchers.prepare_data",
    "magnetar.launchers.prepare_pairs",
)
PRELOADED += ("magnetar.engine.trainer", "torch.utils.tensorboard", "deepspeed", "torch._dynamo")
PRELOADED += ("deepspeed.runtime.zero.muon.muon_optimizer", "rich.progress")
GOOD = ("message", "trained", "prepared")
MAX_MEMORY = 12 * 2**30  # bytes of address space of a case
MAX_MESSAGE = 20_000  # characters that somebody may still read


class Outcome(NamedTuple):
    """How a case ended: one of GOOD, or what is wrong; and what it printed."""

    verdict: str
    output: str
    seconds: float


def make_world(folder: Path) -> None:
    """Everything that cases share, and none of them may change.

    Raises:
        UserError: if nothing can be trained here at all.
    """
    inputs = folder / "inputs"
    (inputs / "raw").mkdir(parents=True)
    for prefix, num_rows in (("", 120), ("valid-", NUM_VALID)):
        for name, content in raw_files(num_rows).items():
            (inputs / "raw" / (prefix + name)).write_bytes(content)
    (folder / "sentinel.txt").write_text("nobody may write here\n")
    for name, made in (("text.txt", "tokens"), ("table.tsv", "pairs")):
        module, arguments = preparation(name)
        _must(module, arguments, inputs)
        (inputs / "out").rename(inputs / made)
    other = shrunk(json.loads((CONFIGS / "quickstart.json").read_text()))
    other["magnetar"]["model"]["d_ff"] = 24  # no other config can go on with it
    other["magnetar"]["data"]["path"] = "inputs/tokens"
    other["magnetar"]["training"]["run_dir"] = "runs/other"
    (folder / "other.json").write_text(json.dumps(other))
    _must("magnetar.launchers.train", ["--deepspeed_config", "other.json"], folder)


def _must(module: str, arguments: list[str], folder: Path, limit: float = 120) -> None:
    status, output = run(module, arguments, folder, limit, lambda: False)
    if status != 0:
        raise UserError(f"{module} fails on sound input with {status}:\n{output[-4000:]}")


def run(
    module: str, arguments: Sequence[str], folder: Path, limit: float, is_enough: Callable[[], bool]
) -> tuple[int | None, str]:
    """A launcher's exit status and what it prints; None: it was killed after `limit` seconds.

    Afterwards, once in a while, `is_enough` is asked whether it may be killed before.
    """
    log = folder / "output.txt"
    pid = os.fork()
    if pid == 0:
        _child(module, arguments, folder, log)
    end, status = time.monotonic() + limit, None
    asked = time.monotonic() + limit / 3
    while time.monotonic() < end:
        done, ended = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(ended)
            break
        if time.monotonic() > asked:
            if is_enough():
                break
            asked += 1
        time.sleep(0.02)
    _kill_group(pid)  # also what a case has left behind
    if status is None:
        os.waitpid(pid, 0)
    return status, log.read_text(errors="replace")


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _child(module: str, arguments: Sequence[str], folder: Path, log: Path) -> NoReturn:
    """Be a process that was started with a launcher."""
    status = 1
    try:
        os.setsid()
        target = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, stream in ((nothing, 0), (target, 1), (target, 2)):
            os.dup2(source, stream)
        os.chdir(folder)
        # A compiler that is killed leaves half a file, with which every later run would fail.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder.parent / "extensions")
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.argv = [module, *arguments]
        status = importlib.import_module(module).main() or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def fingerprint(folder: Path) -> dict[str, str]:
    """What is in every file of the world."""
    found = {}
    for part in ("inputs", "runs", "sentinel.txt", "other.json"):
        paths = [folder / part] if (folder / part).is_file() else (folder / part).rglob("*")
        for path in sorted(paths):
            if path.is_file():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                found[str(path.relative_to(folder))] = content
    return found


def steps_done(folder: Path, since: float) -> int:
    """Records with a loss that were written since then in any run below a folder."""
    number = 0
    for path in folder.rglob("metrics.jsonl"):
        if path.stat().st_mtime >= since:
            number += path.read_text(errors="replace").count('"loss":')
    return number


def needs_compiler(case: Case) -> bool:
    """Whether a run has DeepSpeed's Adam, compiled when first used, or torch's compiler."""
    content = case.files.get("run.json", b"")
    if b'"compile": true' in content:
        return True
    try:
        optimizer = json.loads(content)["optimizer"]
        return optimizer["params"].get("torch_adam") is False
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return False


def build_extension(world: Path) -> None:
    """Compile DeepSpeed's Adam: a case that is killed meanwhile would leave a lock behind."""
    config = shrunk(json.loads((CONFIGS / "quickstart.json").read_text()))
    config["optimizer"]["params"]["torch_adam"] = False
    config["magnetar"]["data"]["path"] = "../inputs/tokens"
    folder = world / "building"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(config))
    _must("magnetar.launchers.train", ["--deepspeed_config", "run.json"], folder, 600)


def outcome(case: Case, world: Path, limit: float) -> Outcome:
    """Run a case in a folder of its own beside the inputs, and judge it."""
    folder = world / "case"
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    before = fingerprint(world)
    own = {name: hashlib.sha256(content).hexdigest() for name, content in case.files.items()}
    if b'"compile"' in case.files.get("run.json", b""):
        limit *= 6  # torch's compiler takes that long on a CPU
    begin, since = time.monotonic(), time.time() - 0.05
    status, output = run(
        case.module, case.arguments, folder, limit, lambda: steps_done(world, since) >= 2
    )
    seconds = time.monotonic() - begin
    changed = [name for name, content in before.items() if fingerprint(world).get(name) != content]
    for name, content in own.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != content:
            changed.append(f"case/{name}")
    return Outcome(_verdict(case, status, output, changed, world, since), output, seconds)


def _verdict(
    case: Case, status: int | None, output: str, changed: list[str], world: Path, since: float
) -> str:
    """One of GOOD, or what is wrong."""
    if changed:
        return f"overwrote {', '.join(changed)}"
    if "Traceback (most recent call last)" in output or "is a defect of Magnetar" in output:
        return "traceback"
    prepares = case.module != "magnetar.launchers.train"
    if status is None:
        return "trained" if not prepares and steps_done(world, since) else "hang"
    if status == 2:
        said = output.partition("error: ")[2]
        if not said.strip():
            return "status 2 without a message"
        return "message" if len(said) <= MAX_MESSAGE else "a message too long to read"
    if status != 0:
        return f"status {status}"
    if prepares:
        made = (world / "case/out/manifest.json").is_file()
        return "prepared" if made else "status 0 and nothing prepared"
    return "trained" if steps_done(world, since) else "status 0 and no step"


def preload() -> None:
    """Import what the launchers import, so that a fork has it."""
    for name in PRELOADED:
        importlib.import_module(name)


def _use_one_core(number: int) -> None:
    """For this process and its children: threads of several would wait for each other."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


def work(cases: list[Case], numbers: list[int], world: Path, limit: float, out: Path) -> None:
    """Run some of the cases; a line of JSON for each."""
    pristine = world.with_name(world.name + "-pristine")
    shutil.copytree(world, pristine)
    with out.open("w") as file:
        for number in numbers:
            found = outcome(cases[number], world, limit)
            if found.verdict.startswith("overwrote"):
                shutil.rmtree(world)
                shutil.copytree(pristine, world)
            file.write(json.dumps([number, *found]) + "\n")
            file.flush()
    shutil.rmtree(pristine)


def run_all(cases: list[Case], world: Path, options: argparse.Namespace) -> list[Outcome]:
    """Every case, by several processes that each have the world for themselves."""
    begin, children = time.monotonic(), []
    for worker in range(options.workers):
        own = world.with_name(f"worker-{worker}")
        shutil.copytree(world, own)
        numbers = list(range(worker, len(cases), options.workers))
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _use_one_core(worker)
                work(cases, numbers, own, options.limit, own.with_suffix(".jsonl"))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(pid)
    results = [world.with_name(f"worker-{worker}.jsonl") for worker in range(options.workers)]
    waiting = set(children)
    while waiting:
        time.sleep(1)
        for pid in list(waiting):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                waiting.discard(pid)
                if status:
                    raise RuntimeError("a worker failed; see its traceback above")
        if options.progress:
            lines = sum(path.read_text().count("\n") for path in results if path.exists())
            print(
                f"{lines} of {len(cases)}, {time.monotonic() - begin:.0f} s", end="\r", flush=True
            )
    found: dict[int, Outcome] = {}
    for path in results:
        for line in path.read_text().splitlines():
            number, *values = json.loads(line)
            found[number] = Outcome(*values)
    return [found[number] for number in range(len(cases))]


def summary(cases: list[Case], outcomes: list[Outcome]) -> dict[str, Any]:
    """Counts by kind of case, and the failures."""
    kinds: dict[str, Counter[str]] = {}
    for case, found in zip(cases, outcomes, strict=True):
        verdict = found.verdict if found.verdict in GOOD else "failed"
        kinds.setdefault(case.kind, Counter())[verdict] += 1
    failures = [
        {
            "case": number,
            "kind": case.kind,
            "verdict": found.verdict,
            "output": found.output[-3000:],
        }
        for number, (case, found) in enumerate(zip(cases, outcomes, strict=True))
        if found.verdict not in GOOD
    ]
    said = {
        re.sub(r"[\d.e+-]+", "N", found.output.partition("error: ")[2])[:80]
        for found in outcomes
        if found.verdict == "message"
    }
    return {
        "cases": {kind: dict(counts) for kind, counts in kinds.items()},
        "different_messages": len(said),
        "slowest_seconds": max((found.seconds for found in outcomes), default=0.0),
        "failures": failures,
    }


def table(cases: dict[str, dict[str, int]]) -> str:
    """Markdown, a line for each kind."""
    columns = [*GOOD, "failed"]
    lines = [f"| broken | cases | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    total: Counter[str] = Counter()
    for counts in cases.values():
        total.update(counts)
    for kind, counts in [*cases.items(), ("all", dict(total))]:
        numbers = " | ".join(str(counts.get(column, 0)) for column in columns)
        lines.append(f"| {kind} | {sum(counts.values())} | {numbers} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--configs", type=int, default=2000, help="broken JSONs: 2000")
    parser.add_argument("--files", type=int, default=500, help="broken data files: 500")
    parser.add_argument("--seed", type=int, default=1, help="of all of them: 1")
    parser.add_argument("--workers", type=int, default=2, help="cases at once: 2")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds of a case: 30")
    parser.add_argument("--only", type=int, help="run this case alone and print what it prints")
    parser.add_argument("--out", type=Path, help="results, a .json file")
    parser.add_argument("--failures", type=Path, help="folder for the files of cases that failed")
    parser.add_argument(
        "--without-compiler", action="store_true", help="leave out what would be compiled"
    )
    parser.add_argument("--progress", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


@user_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases, print a table, write the results; 1 if any failed."""
    options = parse(arguments)
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["OMP_NUM_THREADS"] = "1"
    preload()
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder, "world")
        world.mkdir()
        make_world(world)
        cases = config_cases(options.configs, options.seed)
        cases += file_cases(options.files, options.seed, world)
        if options.only is not None:
            _use_one_core(0)
            if needs_compiler(cases[options.only]):
                build_extension(world)
            found = outcome(cases[options.only], world, options.limit)
            for name, content in cases[options.only].files.items():
                if name == "run.json" or len(content) < 3000:
                    print(f"--- {name}\n{content!r}")
            print(f"--- printed\n{found.output}\n--- {found.verdict}, {found.seconds:.1f} s")
            return found.verdict not in GOOD
        if options.without_compiler:
            cases = [case for case in cases if not needs_compiler(case)]
        elif any(map(needs_compiler, cases)):
            build_extension(world)
        outcomes = run_all(cases, world, options)
    found = {"benchmark": "fuzz", "commit": git_commit(), "versions": versions()}
    found |= {key: getattr(options, key) for key in ("configs", "files", "seed", "limit")}
    result = summary(cases, outcomes)
    found |= result
    print(f"{table(result['cases'])}\n{result['different_messages']} different messages")
    for failure in result["failures"]:
        print(f"case {failure['case']}, {failure['kind']}: {failure['verdict']}")
        if options.failures:
            for name, content in cases[failure["case"]].files.items():
                path = options.failures / str(failure["case"]) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {options.out}")
    return bool(result["failures"])


if __name__ == "__main__":
    sys.exit(main())
