"""Findings in the machines' reports, each with its remedy."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from magnetar.engine.doctor.ssh_probe import Answer

GIB = 2**30
CHECKS = ("reach", "clock", "code", "versions", "JSON", "data", "disk", "GPUs", "JIT", "port")
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

    severity: Literal["problem", "warning"]
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


def findings(answers: Sequence[Answer], wanted: Wanted) -> list[Finding]:
    """The findings about all machines, in the order of CHECKS and of the machines."""
    checks = (_reach, _clock, _code, _versions, _json, _data, _disk, _gpus, _jit, _port)
    reports = [answer for answer in answers if not answer.problem]
    found = [*_reach(answers), *_untold(reports)]
    for check in checks[1:]:
        found += check(reports, wanted)
    places = {answer.node.name: index for index, answer in enumerate(answers)}
    return sorted(found, key=lambda one: (CHECKS.index(one.check), places.get(one.node, -1)))


def _reach(answers: Sequence[Answer]) -> Iterator[Finding]:
    for answer in answers:
        if not answer.problem:
            continue
        remedy = "start the interpreter of this command there, in the same folder"
        if answer.command:
            remedy = (
                f"try `{answer.command}`; it must print a name without asking anything, and this "
                "folder and Python must be there under the same paths"
            )
        yield Finding("problem", answer.node.name, "reach", answer.problem, remedy)


def _untold(reports: Sequence[Answer]) -> Iterator[Finding]:
    checks = {"versions": "versions", "code": "code", "config": "JSON", "data": "data"}
    checks |= {"disk": "disk", "gpus": "GPUs", "machine": "GPUs", "locks": "JIT", "port": "port"}
    for answer in reports:
        for part, error in answer.report["failed"].items():
            remedy = "mend what the message names; the check was left out"
            yield Finding("warning", answer.node.name, checks[part], error, remedy)


def _clock(reports: Sequence[Answer], _: Wanted) -> Iterator[Finding]:
    for answer in reports:
        seconds = abs(answer.clock)
        if seconds > _CLOCK_WARNING:
            severity: Literal["problem", "warning"] = "warning"
            if seconds > _CLOCK_PROBLEM:
                severity = "problem"
            where = "ahead of" if answer.clock > 0 else "behind"
            text = f"its clock is {seconds:.1f} s {where} this machine's"
            remedy = "set it: systemctl restart chronyd, or systemd-timesyncd"
            yield Finding(severity, answer.node.name, "clock", text, remedy)


def _deviating(
    reports: Sequence[Answer], value_of: Callable[[Mapping[str, Any]], Any]
) -> Iterator[tuple[Answer, Any, Any, str]]:
    """Each deviation from the majority: (answer, its value, majority value, a machine with that).

    In a tie the first machine's value is the majority.
    """
    values = [value_of(answer.report) for answer in reports]
    told = [value for value in values if value is not None]
    if not told:
        return
    usual = Counter(told).most_common(1)[0][0]
    example = reports[values.index(usual)].node.name
    for answer, value in zip(reports, values, strict=True):
        if value is not None and value != usual:
            yield answer, value, usual, example


def _code(reports: Sequence[Answer], _: Wanted) -> Iterator[Finding]:
    for answer in reports:
        told = answer.report["code"]
        if told is not None and told["files"] == 0:
            text = f"no Magnetar in {told['folder']}"
            remedy = "put the same checkout there, or start in a folder that all machines have"
            yield Finding("problem", answer.node.name, "code", text, remedy)
    with_code = [answer for answer in reports if (answer.report["code"] or {}).get("files")]
    for answer, _own, _usual, example in _deviating(
        with_code, lambda report: report["code"]["sha256"]
    ):
        own, others = answer.report["code"], _of(reports, example)["code"]
        text = f"other sources than on {example}"
        if own["commit"] != others["commit"]:
            text += f": commit {own['commit'] or 'unknown'} against {others['commit'] or 'unknown'}"
        else:
            text += ", of the same commit: files were changed, added or removed"
        remedy = f"check out the same commit, or copy {own['folder']} from {example}"
        yield Finding("problem", answer.node.name, "code", text, remedy)


def _of(reports: Sequence[Answer], name: str) -> dict[str, Any]:
    return next(answer.report for answer in reports if answer.node.name == name)


def _versions(reports: Sequence[Answer], _: Wanted) -> Iterator[Finding]:
    told = [answer for answer in reports if answer.report["versions"] is not None]
    names = dict.fromkeys(name for answer in told for name in answer.report["versions"])

    def version(name: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda report: report["versions"].get(name, "none")

    for name in names:
        for answer, own, usual, example in _deviating(told, version(name)):
            remedy = f"pip install {name}=={usual}"
            if name == "python":
                remedy = f"start with Python {usual} everywhere, from the same path"
            elif name == "nccl":
                remedy = "install the same torch as there, which brings it"
            elif usual == "none":
                remedy = f"pip uninstall {name}, or install it everywhere"
            text = f"{name} {own}, and {usual} on {example}"
            yield Finding("problem", answer.node.name, "versions", text, remedy)
    for answer, own, usual, example in _deviating(reports, _driver):
        text = f"driver {own}, and {usual} on {example}"
        remedy = "install the same driver, if ranks fail or hang in NCCL"
        yield Finding("warning", answer.node.name, "versions", text, remedy)


def _driver(report: Mapping[str, Any]) -> str | None:
    return (report["gpus"] or {}).get("driver") or None


def _same(
    reports: Sequence[Answer], part: str, check: str, path: str, what: str
) -> Iterator[Finding]:
    for answer in reports:
        if answer.report[part] == "":
            remedy = f"copy it there, or put {path} on a disk that all machines share"
            yield Finding("problem", answer.node.name, check, f"{path} is not there", remedy)
    for answer, _own, _usual, example in _deviating(reports, lambda report: report[part] or None):
        text, remedy = f"{path} {what} than on {example}", f"copy it from {example}"
        yield Finding("problem", answer.node.name, check, text, remedy)


def _json(reports: Sequence[Answer], wanted: Wanted) -> Iterator[Finding]:
    if wanted.config is not None:
        yield from _same(reports, "config", "JSON", wanted.config, "has other content")


def _data(reports: Sequence[Answer], wanted: Wanted) -> Iterator[Finding]:
    if wanted.data is not None:
        yield from _same(reports, "data", "data", wanted.data, "holds other data")


def _disk(reports: Sequence[Answer], wanted: Wanted) -> Iterator[Finding]:
    marks = {answer.mark: answer.node.name for answer in reports}
    for answer in reports:
        told = answer.report["disk"]
        if told is None:
            continue
        name, folder = answer.node.name, told["folder"]
        if told["problem"]:
            text = f"{folder} cannot be written to: {told['problem']}"
            remedy = "choose another training.run_dir, or change who may write there"
            yield Finding("problem", name, "disk", text, remedy)
            continue
        missing = [marks[mark] for mark in marks if mark not in answer.marks]
        missing = [
            other for other in missing if not (_of(reports, other)["disk"] or {}).get("problem")
        ]
        if missing:
            text = f"{folder} is not the folder of that name on {', '.join(missing)}"
            remedy = "training.run_dir must lie on a disk that all machines share (NFS, Lustre)"
            yield Finding("problem", name, "disk", text, remedy)
        # The next checkpoint is written before the oldest is deleted, so space for two is needed.
        if told["free"] < 2 * wanted.checkpoint_bytes:
            text = (
                f"{told['free'] / GIB:.1f} GiB are free at {folder}, and a checkpoint takes "
                f"{wanted.checkpoint_bytes / GIB:.1f} GiB"
            )
            remedy = "free space, or choose another training.run_dir"
            yield Finding("problem", name, "disk", text, remedy)


def _gpus(reports: Sequence[Answer], _: Wanted) -> Iterator[Finding]:
    have_some = any(answer.report["gpus"]["found"] for answer in reports if answer.report["gpus"])
    for answer in reports:
        name, told = answer.node.name, answer.report["gpus"]
        if told is None or not have_some:
            continue
        found, slots = told["found"], answer.node.slots
        if len(found) < slots:
            text = f"slots={slots}, and {len(found)} GPUs"
            remedy = (
                f"write slots={len(found)} in the hostfile, or find out why nvidia-smi lists fewer"
            )
            yield Finding("problem", name, "GPUs", text, remedy)
        used = {index: gpu for index, gpu in enumerate(found[:slots]) if gpu["used"] > _USED_GPU}
        for index, gpu in used.items():
            owners = [f"{pid} ({what})" for id_, pid, what in told["processes"] if id_ == gpu["id"]]
            text = f"GPU {index} has {gpu['used'] / GIB:.1f} of {gpu['total'] / GIB:.0f} GiB in use"
            text += f" by process {', '.join(owners)}" if owners else ""
            remedy = "end what is left of another run there, or leave this GPU out with --exclude"
            yield Finding("warning", name, "GPUs", text, remedy)
        shared = (answer.report["machine"] or {}).get("shared_memory", _SHARED_MEMORY)
        if slots > 1 and shared < _SHARED_MEMORY:
            text = f"{shared / 2**20:.0f} MiB are free in /dev/shm, where NCCL has its buffers"
            remedy = "docker run --shm-size=8g, or remount /dev/shm larger"
            yield Finding("warning", name, "GPUs", text, remedy)
    for answer, own, usual, example in _deviating(reports, _models):
        text = f"{own or 'no GPUs'}, and {usual} on {example}"
        remedy = "the slowest sets the pace: leave the machine out, or accept that"
        yield Finding("warning", answer.node.name, "GPUs", text, remedy)


def _models(report: Mapping[str, Any]) -> str | None:
    if report["gpus"] is None:
        return None
    return ", ".join(sorted({gpu["name"] for gpu in report["gpus"]["found"]}))


def _jit(reports: Sequence[Answer], wanted: Wanted) -> Iterator[Finding]:
    # If the home folder is shared, the process that holds the lock may be on another machine.
    held = {
        lock["path"]
        for answer in reports
        for lock in answer.report["locks"] or ()
        if lock["holder"] is not None
    }
    for answer in reports:
        for lock in answer.report["locks"] or ():
            if lock["path"] in held:
                text = f"{lock['path']}: process {lock['holder'] or 'of another machine'} compiles"
                remedy = "wait until it is done: a run would wait for it, too"
                yield Finding("warning", answer.node.name, "JIT", text, remedy)
                continue
            text = (
                f"{lock['path']} is {lock['seconds'] / 60:.0f} minutes old and no process holds "
                "it: every run that compiles this waits forever"
            )
            yield Finding("problem", answer.node.name, "JIT", text, f"rm {lock['path']}")
        told = answer.report["machine"]
        if told is None or not wanted.compiles:
            continue
        for program, package in (("ninja", "pip install ninja"), ("c++", "apt install g++")):
            if told["programs"][program] is None:
                text = f"no {program}, with which DeepSpeed compiles {wanted.compiles}"
                remedy = f"{package}, or remove optimizer.params.torch_adam=false"
                yield Finding("problem", answer.node.name, "JIT", text, remedy)
        architectures = told["variables"].get("TORCH_CUDA_ARCH_LIST", "")
        if any(letter in architectures for letter in "af"):
            text = f"TORCH_CUDA_ARCH_LIST={architectures}, which DeepSpeed cannot read"
            remedy = "export it without letters: TORCH_CUDA_ARCH_LIST=9.0"
            yield Finding("problem", answer.node.name, "JIT", text, remedy)


def _port(reports: Sequence[Answer], wanted: Wanted) -> Iterator[Finding]:
    for answer in reports:
        if problem := answer.report["port"]:
            text = f"{wanted.address}, port {wanted.port}: {problem}"
            remedy = "another --master_port"
            if "address" in problem:
                remedy = "--master_addr with an address of this machine, which `hostname -I` prints"
            yield Finding("problem", answer.node.name, "port", text, remedy)
