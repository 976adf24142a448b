"""Findings in the machines' reports, each with its remedy."""

import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from magnetar.engine.doctor.ssh_probe import Machine

GIB = 2**30
_CLOCK_WARNING, _CLOCK_PROBLEM = 1.0, 60.0  # seconds
_USED_GPU = GIB  # bytes; more than this in use means that another process works there
_SHARED_MEMORY = GIB  # NCCL's buffers between the GPUs of a machine lie there


class Finding(NamedTuple):
    """A defect of a machine, or a difference between machines.

    Attributes:
        severity: "problem" if it stops or spoils a run, "warning" if it may.
        node: name of the machine, "" for all of them.
        check: one of CHECKS.
        text: the finding in words.
        remedy: advice to the user.
    """

    severity: str
    node: str
    check: str
    text: str
    remedy: str


@dataclass(frozen=True)
class Wanted:
    """The needs of the run.

    Attributes:
        config: path of its JSON; None: nothing is known of the run.
        data: path of the prepared data.
        run_dir: the run's folder.
        checkpoint_bytes: largest size of one checkpoint.
        compiles: op that DeepSpeed compiles for the optimizer, or "".
        address: address at which rank 0 will listen.
        port: port at which rank 0 will listen.
    """

    config: str | None = None
    data: str | None = None
    run_dir: str | None = None
    checkpoint_bytes: int = 0
    compiles: str = ""
    address: str = "127.0.0.1"
    port: int = 29500


# What a check yields: machine, severity, text, remedy.
_Found = Iterator[tuple[Machine, str, str, str]]


def findings(machines: Sequence[Machine], wanted: Wanted) -> list[Finding]:
    """The findings about all machines, in the order of CHECKS and of the machines."""
    told = [machine for machine in machines if not machine.problem]
    found: list[Finding] = []
    for name, check in CHECKS.items():
        failed = [
            (machine, "warning", error, "mend what the message names; the check was left out")
            for machine in told
            for part, error in machine.report["failed"].items()
            if _CHECK_OF_PART[part] == name
        ]
        all_found = [*failed, *check(machines if name == "reach" else told, wanted)]
        all_found.sort(key=lambda one: machines.index(one[0]))
        found += [Finding(severity, m.name, name, *words) for m, severity, *words in all_found]
    return found


def _reach(machines: Sequence[Machine], _: Wanted) -> _Found:
    for machine in machines:
        remedy = "start the interpreter of this command there, in the same folder"
        if machine.command:
            remedy = (
                f"try `{machine.command}`; it must print a name without asking anything, and this "
                "folder and Python must be there under the same paths"
            )
        if machine.problem:
            yield machine, "problem", machine.problem, remedy


def _clock(machines: Sequence[Machine], _: Wanted) -> _Found:
    for machine in machines:
        seconds = abs(machine.clock)
        text = f"its clock is {seconds:.1f} s {'ahead of' if machine.clock > 0 else 'behind'} this"
        remedy = "set it: systemctl restart chronyd, or systemd-timesyncd"
        if seconds > _CLOCK_WARNING:
            severity = "problem" if seconds > _CLOCK_PROBLEM else "warning"
            yield machine, severity, f"{text} machine's", remedy


def _deviating(
    machines: Sequence[Machine], value_of: Callable[[Mapping[str, Any]], Any]
) -> Iterator[tuple[Machine, Any, Any, Machine]]:
    """Each deviation from the majority: (machine, its value, majority value, machine with that).

    In a tie the first machine's value is the majority.
    """
    values = [value_of(machine.report) for machine in machines]
    told = [value for value in values if value is not None]
    if not told:
        return
    usual = Counter(told).most_common(1)[0][0]
    example = machines[values.index(usual)]
    for machine, value in zip(machines, values, strict=True):
        if value is not None and value != usual:
            yield machine, value, usual, example


def _code(machines: Sequence[Machine], _: Wanted) -> _Found:
    told = [machine for machine in machines if machine.report["code"] is not None]
    for machine in told:
        if machine.report["code"]["files"] == 0:
            text = f"no Magnetar in {machine.report['code']['folder']}"
            remedy = "put the same checkout there, or start in a folder that all machines have"
            yield machine, "problem", text, remedy
    with_code = [machine for machine in told if machine.report["code"]["files"]]
    for machine, _own, _usual, example in _deviating(
        with_code, lambda report: report["code"]["sha256"]
    ):
        own, others = machine.report["code"], example.report["code"]
        text = f"other sources than on {example.name}"
        if own["commit"] != others["commit"]:
            text += f": commit {own['commit'] or 'unknown'} against {others['commit'] or 'unknown'}"
        else:
            text += ", of the same commit: files were changed, added or removed"
        remedy = f"check out the same commit, or copy {own['folder']} from {example.name}"
        yield machine, "problem", text, remedy


def _versions(machines: Sequence[Machine], _: Wanted) -> _Found:
    told = [machine for machine in machines if machine.report["versions"] is not None]
    for name in dict.fromkeys(name for machine in told for name in machine.report["versions"]):
        for machine, own, usual, example in _deviating(told, _version_of(name)):
            remedy = f"pip install {name}=={usual}"
            if name == "python":
                remedy = f"start with Python {usual} everywhere, from the same path"
            elif name == "nccl":
                remedy = "install the same torch as there, which brings it"
            elif usual == "none":
                remedy = f"pip uninstall {name}, or install it everywhere"
            yield machine, "problem", f"{name} {own}, and {usual} on {example.name}", remedy
    for machine, own, usual, example in _deviating(
        machines, lambda report: (report["gpus"] or {}).get("driver") or None
    ):
        text = f"driver {own}, and {usual} on {example.name}"
        yield machine, "warning", text, "install the same driver, if ranks fail or hang in NCCL"


def _version_of(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda report: report["versions"].get(name, "none")


def _same(part: str, what: str) -> Callable[[Sequence[Machine], Wanted], _Found]:
    """The check that a file or folder is on all machines, and the same."""

    def check(machines: Sequence[Machine], wanted: Wanted) -> _Found:
        path = getattr(wanted, part)
        for machine in machines:
            if machine.report[part] == "":
                remedy = f"copy it there, or put {path} on a disk that all machines share"
                yield machine, "problem", f"{path} is not there", remedy
        for machine, _own, _usual, example in _deviating(
            machines, lambda report: report[part] or None
        ):
            text = f"{path} {what} than on {example.name}"
            yield machine, "problem", text, f"copy it from {example.name}"

    return check


def _disk(machines: Sequence[Machine], wanted: Wanted) -> _Found:
    told = [machine for machine in machines if machine.report["disk"] is not None]
    writable = [machine for machine in told if not machine.report["disk"]["problem"]]
    for machine in told:
        disk = machine.report["disk"]
        if machine not in writable:
            text = f"{disk['folder']} cannot be written to: {disk['problem']}"
            remedy = "choose another training.run_dir, or change who may write there"
            yield machine, "problem", text, remedy
            continue
        missing = [other.name for other in writable if other.mark not in machine.marks]
        if missing:
            text = f"{disk['folder']} is not the folder of that name on {', '.join(missing)}"
            remedy = "training.run_dir must lie on a disk that all machines share (NFS, Lustre)"
            yield machine, "problem", text, remedy
        # The next checkpoint is written before the oldest is deleted, so space for two is needed.
        if disk["free"] < 2 * wanted.checkpoint_bytes:
            text = (
                f"{disk['free'] / GIB:.1f} GiB are free at {disk['folder']}, and a checkpoint "
                f"takes {wanted.checkpoint_bytes / GIB:.1f} GiB"
            )
            yield machine, "problem", text, "free space, or choose another training.run_dir"


def _gpus(machines: Sequence[Machine], _: Wanted) -> _Found:
    told = [machine for machine in machines if machine.report["gpus"] is not None]
    if not any(machine.report["gpus"]["found"] for machine in told):
        return
    for machine in told:
        gpus, slots = machine.report["gpus"], machine.slots
        found = gpus["found"]
        if len(found) < slots:
            remedy = (
                f"write slots={len(found)} in the hostfile, or find out why nvidia-smi lists fewer"
            )
            yield machine, "problem", f"slots={slots}, and {len(found)} GPUs", remedy
        used = [(index, gpu) for index, gpu in enumerate(found[:slots]) if gpu["used"] > _USED_GPU]
        for index, gpu in used:
            owners = [f"{pid} ({what})" for id_, pid, what in gpus["processes"] if id_ == gpu["id"]]
            text = f"GPU {index} has {gpu['used'] / GIB:.1f} of {gpu['total'] / GIB:.0f} GiB in use"
            text += f" by process {', '.join(owners)}" if owners else ""
            remedy = "end what is left of another run there, or leave this GPU out with --exclude"
            yield machine, "warning", text, remedy
        shared = (machine.report["machine"] or {}).get("shared_memory", _SHARED_MEMORY)
        if slots > 1 and shared < _SHARED_MEMORY:
            text = f"{shared / 2**20:.0f} MiB are free in /dev/shm, where NCCL has its buffers"
            yield machine, "warning", text, "docker run --shm-size=8g, or remount /dev/shm larger"
    for machine, own, usual, example in _deviating(
        told, lambda report: ", ".join(sorted({gpu["name"] for gpu in report["gpus"]["found"]}))
    ):
        text = f"{own or 'no GPUs'}, and {usual} on {example.name}"
        remedy = "the slowest sets the pace: leave the machine out, or accept that"
        yield machine, "warning", text, remedy


def _jit(machines: Sequence[Machine], wanted: Wanted) -> _Found:
    locks = [(machine, lock) for machine in machines for lock in machine.report["locks"] or ()]
    # If the home folder is shared, the process that holds the lock may be on another machine.
    held = {lock["path"] for _, lock in locks if lock["holder"] is not None}
    for machine, lock in locks:
        path = lock["path"]
        if path in held:
            text = f"{path}: process {lock['holder'] or 'of another machine'} compiles"
            yield machine, "warning", text, "wait until it is done: a run would wait for it, too"
            continue
        text = (
            f"{path} is {lock['seconds'] / 60:.0f} minutes old and no process holds it: every run "
            "that compiles this waits forever"
        )
        yield machine, "problem", text, f"rm {shlex.quote(path)}"
    for machine in machines if wanted.compiles else ():
        told = machine.report["machine"] or {"programs": {}, "variables": {}}
        for program, package in (("ninja", "pip install ninja"), ("c++", "apt install g++")):
            if told["programs"].get(program, "") is None:
                text = f"no {program}, with which DeepSpeed compiles {wanted.compiles}"
                remedy = f"{package}, or remove optimizer.params.torch_adam=false"
                yield machine, "problem", text, remedy
        architectures = told["variables"].get("TORCH_CUDA_ARCH_LIST", "")
        if any(letter in architectures for letter in "af"):
            text = f"TORCH_CUDA_ARCH_LIST={architectures}, which DeepSpeed cannot read"
            remedy = "export it without letters: TORCH_CUDA_ARCH_LIST=9.0"
            yield machine, "problem", text, remedy


def _port(machines: Sequence[Machine], wanted: Wanted) -> _Found:
    for machine in machines:
        if problem := machine.report["port"]:
            remedy = "another --master_port"
            if "address" in problem:
                remedy = "--master_addr with an address of this machine, which `hostname -I` prints"
            text = f"{wanted.address}, port {wanted.port}: {problem}"
            yield machine, "problem", text, remedy


CHECKS: dict[str, Callable[[Sequence[Machine], Wanted], _Found]] = {
    "reach": _reach,
    "clock": _clock,
    "code": _code,
    "versions": _versions,
    "JSON": _same("config", "has other content"),
    "data": _same("data", "holds other data"),
    "disk": _disk,
    "GPUs": _gpus,
    "JIT": _jit,
    "port": _port,
}
_CHECK_OF_PART = {name: name for name in CHECKS}
_CHECK_OF_PART |= {"config": "JSON", "gpus": "GPUs", "machine": "GPUs", "locks": "JIT"}
