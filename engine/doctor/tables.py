"""How an examination is printed."""

import rich.box
import rich.table
from rich.console import Console
from rich.markup import escape

from magnetar.engine.doctor.checks import CHECKS
from magnetar.engine.doctor.run import Examination

_COLOURS = {"problem": "bold red", "warning": "yellow", "": "green"}
_CELLS = {"problem": "fail", "warning": "warn", "": "ok"}


def _table(*columns: str) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True, min_width=len(column))
    return table


def overview(examination: Examination) -> rich.table.Table:
    """A table of machines and checks: the worst finding in each cell."""
    table = _table("", *CHECKS)
    for answer in examination.answers:
        name, cells = answer.node.name, []
        for check in CHECKS:
            found = {
                finding.severity
                for finding in examination.findings
                if finding.check == check and finding.node in (name, "")
            }
            worst = next((word for word in ("problem", "warning") if word in found), "")
            if answer.problem and check != "reach":
                cells.append("?")
            else:
                cells.append(f"[{_COLOURS[worst]}]{_CELLS[worst]}[/]")
        table.add_row(escape(name), *cells)
    return table


def machines(examination: Examination) -> rich.table.Table:
    """A table of the machines: devices, cores and versions."""
    table = _table("", "slots", "devices", "cores", "Python", "torch", "commit")
    table.columns[0].min_width = max(len(one.node.name) for one in examination.answers)
    for answer in examination.answers:
        report = answer.report
        gpus = (report.get("gpus") or {}).get("found") or []
        versions, machine = report.get("versions") or {}, report.get("machine") or {}
        names = sorted({gpu["name"].removeprefix("NVIDIA ") for gpu in gpus})
        table.add_row(
            escape(answer.node.name),
            str(answer.node.slots),
            f"{len(gpus)} {', '.join(names)}" if gpus else "CPU" if report else "?",
            str(machine.get("cores", "?")),
            *(versions.get(name, "?") for name in ("python", "torch")),
            ((report.get("code") or {}).get("commit") or "?")[:8],
        )
    return table


def collectives(examination: Examination) -> rich.table.Table:
    """A table of what the ranks have measured: collectives and links."""
    measured = examination.measured
    assert measured is not None
    num_ranks = measured["num_ranks"]
    table = _table(f"{measured['backend']}, {num_ranks} ranks")
    for column in ("size", "time", "bandwidth"):
        table.add_column(column, justify="right")
    size, seconds = measured["all_reduce"]
    _add_collective(table, "all-reduce of gradients", size, seconds, 2, num_ranks)
    size, seconds, ep_size = measured["all_to_all"]
    _add_collective(table, f"all-to-all of {ep_size} ranks", size, seconds, 1, ep_size)
    for is_inside, words in ((False, "between machines"), (True, "inside a machine")):
        speeds = [link.bandwidth for link in measured["links"] if link.is_inside == is_inside]
        if speeds:
            span = f"{min(speeds) / 1e9:.2f} to {max(speeds) / 1e9:.2f} GB/s"
            pairs = "1 pair" if len(speeds) == 1 else f"{len(speeds)} pairs"
            table.add_row(f"{pairs} {words}, each way", "", "", span)
    return table


def _add_collective(
    table: rich.table.Table, name: str, size: int, seconds: float, passes: int, num_ranks: int
) -> None:
    """Add a row. A rank's link carries passes * (n - 1) / n of the bytes."""
    carried = passes * (num_ranks - 1) / num_ranks * size / seconds
    table.add_row(
        name, f"{size / 2**20:.2f} MiB", f"{1e3 * seconds:.2f} ms", f"{carried / 1e9:.2f} GB/s"
    )


def print_findings(console: Console, examination: Examination) -> None:
    """Print each finding, with what to do about it."""
    for finding in examination.findings:
        colour = _COLOURS[finding.severity]
        where = f"{finding.node}, " if finding.node else ""
        console.print(
            f"[{colour}]{finding.severity}[/]  {escape(where)}{finding.check}: "
            f"{escape(finding.text)}",
            soft_wrap=True,
        )
        console.print(f"         -> {escape(finding.remedy)}", soft_wrap=True)


def print_environment(console: Console, examination: Examination) -> None:
    """Print the variables that each machine gets, and the command that starts the ranks."""
    exports = examination.exports
    console.print("Environment\n")
    if any(answer.node.is_remote for answer in examination.answers):
        read = f", and by {', '.join(map(str, exports.files))}" if exports.files else ""
        console.print(f"On every machine, set from here{read}:", soft_wrap=True)
        for name, text in sorted(exports.variables.items()):
            console.print(f"  {name}={text}", soft_wrap=True, markup=False)
        if exports.left_behind:
            console.print(
                f"Set here and not handed on: {', '.join(exports.left_behind)} (a line NAME=value "
                "in .deepspeed_env does that)",
                soft_wrap=True,
            )
    else:
        console.print("All that is set here, and")
    for answer, added in zip(examination.answers, examination.added, strict=True):
        words = " ".join(f"{name}={text}" for name, text in added.items())
        console.print(f"  {answer.node.name}: {words}", soft_wrap=True, markup=False)
    console.print(f"\nStarted by\n  {examination.command}", soft_wrap=True, markup=False)
