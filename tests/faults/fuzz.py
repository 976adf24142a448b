"""Broken JSONs and broken data, fed to the launchers: a clear message and status 2, or a run.

    python -m tests.faults.fuzz --configs 2000 --files 500 --out benchmarks/results/fuzz.json
    python -m tests.faults.fuzz --configs 2000 --files 500 --only 17  # a case again
    python -m tests.faults.fuzz --configs 0 --files 0 --field 3000  # what users' machines do

Each JSON of ds_configs/, cut down to two steps of a tiny model, is changed in one to three places
or damaged as text. Files of prepared folders and raw text are damaged too. A launcher's real `main`
gets the result, in a process forked from one that has imported everything. A case fails if it ends
with a traceback, with a status other than 0 and 2, or without a message or a step. It also fails
after --limit seconds without a step, or if a file that existed before has changed. Runs that would
compile something are left out: a case that is killed meanwhile leaves half of it behind.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
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
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from benchmarks.measurement import argument_parser, git_commit, versions, write_json
from magnetar.data.errors import UserError
from magnetar.launchers.terminal.user_errors import user_errors
from tests.faults.field_cases import field_cases
from tests.faults.fuzz_cases import TRAIN, Case, config_cases, file_cases, make_world

PRELOADED = (
    *("magnetar.launchers.train", "magnetar.launchers.prepare_data", "rich.progress", "deepspeed"),
    *("magnetar.launchers.prepare_pairs", "magnetar.engine.trainer", "torch.utils.tensorboard"),
    *("torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer", "magnetar.launchers.plot"),
    *("magnetar.launchers.generate", "magnetar.launchers.evaluate", "magnetar.launchers.convert"),
    *("matplotlib.pyplot", "tokenizers", "magnetar.convert.export"),
)
GOOD = ("message", "trained", "prepared", "done")
MAX_MEMORY = 12 * 2**30  # bytes of address space of a case
MAX_MESSAGE = 20_000  # characters that somebody may still read


class Outcome(NamedTuple):
    """How a case ended: one of GOOD, or what is wrong; and what it printed."""

    verdict: str
    output: str
    seconds: float


def must(module: str, arguments: list[str], folder: Path) -> None:
    """Run a launcher on sound input.

    Raises:
        UserError: if it fails.
    """
    status, output = run(Case("", module, arguments, {}), folder, 120, lambda: False)
    if status != 0:
        raise UserError(f"{module} fails on sound input with {status}:\n{output[-4000:]}")


def run(
    case: Case, folder: Path, limit: float, is_enough: Callable[[], bool]
) -> tuple[int | None, str]:
    """A launcher's exit status and what it prints; None: it was killed after `limit` seconds.

    Afterwards, once in a while, `is_enough` is asked whether it may be killed before.
    """
    log = folder / "output.txt"
    pid = os.fork()
    if pid == 0:
        _child(case, folder, log)
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
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # also what a case has left behind
    if status is None:
        os.waitpid(pid, 0)
    return status, log.read_text(errors="replace")


def _child(case: Case, folder: Path, log: Path) -> NoReturn:
    """Be a process that was started with a launcher."""
    status = 1
    try:
        os.setsid()
        target = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, stream in ((nothing, 0), (target, 1), (target, 2)):
            os.dup2(source, stream)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for name, value in case.environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        sys.argv = [case.module, *case.arguments]
        status = importlib.import_module(case.module).main() or 0
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


def digest(path: Path) -> str:
    """The sha256 of a file; "" if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def files_of(world: Path) -> list[Path]:
    """Everything that cases share, and none of them may change."""
    shared = [world / "sentinel.txt", world / "other.json"]
    return [*shared, *(world / "inputs").rglob("*"), *(world / "runs").rglob("*")]


def steps_done(folder: Path, since: float) -> int:
    """Records with a loss that were written since then in any run below a folder."""
    return sum(
        path.read_text(errors="replace").count('"loss":')
        for path in folder.rglob("metrics.jsonl")
        if path.stat().st_mtime >= since
    )


def steps_in(run_dir: Path) -> set[int]:
    """Steps of the records with a loss in a run's metrics; lines that are no records are passed."""
    found = set()
    with suppress(OSError):
        for line in (run_dir / "metrics.jsonl").read_bytes().splitlines():
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                record = json.loads(line)
                found |= {record["step"]} if "loss" in record else set()
    return {step for step in found if step in (1, 2)}  # that the run has trained


def needs_compiler(case: Case) -> bool:
    """Whether a run has DeepSpeed's Adam, compiled when first used, or torch's compiler."""
    content = case.files.get("run.json", b"")
    if b'"compile": true' in content:
        return True
    try:
        return json.loads(content)["optimizer"]["params"].get("torch_adam") is False
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return False


def outcome(case: Case, world: Path, limit: float) -> Outcome:
    """Run a case in a folder of its own beside the inputs, and judge it."""
    folder = world / "case"
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else path.symlink_to(content)
    # A run that goes on writes into its own folder.
    own = [folder / name for name in case.files if case.module != TRAIN or "run/" not in name]
    steps = steps_in(folder / "run")
    before = {path: digest(path) for path in [*files_of(world), *own] if path.is_file()}
    begin, since = time.monotonic(), time.time() - 0.05
    status, output = run(case, folder, limit, lambda: steps_done(world, since) >= 2)
    seconds = time.monotonic() - begin
    changed = [str(p.relative_to(world)) for p, content in before.items() if digest(p) != content]
    changed += [f"step {step}" for step in sorted(steps - steps_in(folder / "run"))]
    return Outcome(_verdict(case, status, output, changed, world, since), output, seconds)


def _verdict(
    case: Case, status: int | None, output: str, changed: list[str], world: Path, since: float
) -> str:
    """One of GOOD, or what is wrong."""
    if changed:
        return f"overwrote {', '.join(changed)}"
    if "Traceback (most recent call last)" in output or "is a defect of Magnetar" in output:
        return "traceback"
    prepares = case.module in (
        "magnetar.launchers.prepare_data",
        "magnetar.launchers.prepare_pairs",
    )
    if status is None:
        return "trained" if case.module == TRAIN and steps_done(world, since) else "hang"
    if status == 2:
        said = output.partition("error: ")[2]
        if not said.strip():
            return "status 2 without a message"
        return "message" if len(said) <= MAX_MESSAGE else "a message too long to read"
    if status != 0:
        return f"status {status}"
    if prepares:
        manifest = world / "case/out/manifest.json"
        if not manifest.is_file():
            return "status 0 and nothing prepared"
        splits = json.loads(manifest.read_text())["splits"].values()
        found = sum(split.get("num_documents", 0) for split in splits)
        is_whole = case.documents in (None, found)
        return "prepared" if is_whole else f"{found} documents in place of {case.documents}"
    if case.module == TRAIN:
        return "trained" if steps_done(world, since) else "status 0 and no step"
    return "done"


def outcome_of_worker(case: Case, world: Path, limit: float) -> Outcome:
    """The outcome of a case in a copy of the world that this process has for itself."""
    own = world.with_name(f"worker-{os.getpid()}")
    if not own.exists():
        shutil.copytree(world, own)
    found = outcome(case, own, limit)
    if found.verdict.startswith("overwrote"):
        shutil.rmtree(own)
    return found


def summary(cases: Sequence[Case], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts by kind of case, and the failures."""
    kinds: dict[str, Counter[str]] = {}
    failures, said = [], set()
    for number, (case, found) in enumerate(zip(cases, outcomes, strict=True)):
        is_good = found.verdict in GOOD
        kinds.setdefault(case.kind, Counter())[found.verdict if is_good else "failed"] += 1
        if found.verdict == "message":
            message = found.output.partition("error: ")[2]
            said.add(re.sub(r"[\d.e+-]+", "N", message)[:80])
        if not is_good:
            about = {"case": number, "kind": case.kind, "verdict": found.verdict}
            failures.append(about | {"output": found.output[-3000:]})
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
    parser = argument_parser("tests.faults.fuzz", __doc__)
    parser.add_argument("--configs", type=int, default=2000, help="broken JSONs: 2000")
    parser.add_argument("--files", type=int, default=500, help="broken data files: 500")
    parser.add_argument(
        "--field", type=int, default=0, help="environments, tokenizers, runs, compressed text: 0"
    )
    parser.add_argument("--seed", type=int, default=1, help="of all of them: 1")
    parser.add_argument("--workers", type=int, default=2, help="cases at once: 2")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds of a case: 30")
    parser.add_argument("--only", type=int, help="run this case alone and print what it prints")
    parser.add_argument("--out", type=Path, help="results, a .json file")
    return parser.parse_args(arguments)


@user_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases, print a table, write the results; 1 if any failed."""
    options = parse(arguments)
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    for name in PRELOADED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder, "world")
        make_world(world, must)
        cases = config_cases(options.configs, options.seed)
        cases += file_cases(options.files, options.seed, world)
        cases += field_cases(options.field, options.seed, world)
        cases = [case for case in cases if not needs_compiler(case)]
        if options.only is not None:
            found = outcome(cases[options.only], world, options.limit)
            print(cases[options.only].module, *cases[options.only].arguments)
            print(cases[options.only].environment)
            for name, content in cases[options.only].files.items():
                if name == "run.json" or len(content) < 3000:
                    print(f"--- {name}\n{content!r}")
            print(f"--- printed\n{found.output}\n--- {found.verdict}, {found.seconds:.1f} s")
            return found.verdict not in GOOD
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(options.workers, fork) as pool:
            judge = partial(outcome_of_worker, world=world, limit=options.limit)
            outcomes = []
            for number, found in enumerate(pool.map(judge, cases)):
                outcomes.append(found)
                if found.verdict not in GOOD:
                    print(f"case {number}, {cases[number].kind}: {found.verdict}", flush=True)
    result = summary(cases, outcomes)
    print(f"{table(result['cases'])}\n{result['different_messages']} different messages")
    if options.out:
        about = {"benchmark": "fuzz", "commit": git_commit(), "versions": versions()}
        about |= {
            key: getattr(options, key) for key in ("configs", "files", "field", "seed", "limit")
        }
        write_json(options.out, about | result)
        print(f"wrote {options.out}")
    return bool(result["failures"])


if __name__ == "__main__":
    sys.exit(main())
