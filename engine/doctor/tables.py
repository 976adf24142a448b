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
    for machine in examination.machines:
        cells = []
        for check in CHECKS:
            found = {
                finding.severity
                for finding in examination.findings
                if finding.check == check and finding.node in (machine.name, "")
            }
            worst = next((word for word in ("problem", "warning") if word in found), "")
            is_known = check == "reach" or not machine.problem
            cells.append(f"[{_COLOURS[worst]}]{_CELLS[worst]}[/]" if is_known else "?")
        table.add_row(escape(machine.name), *cells)
    return table


def machines(examination: Examination) -> rich.table.Table:
    """A table of the machines: devices, cores and versions."""
    table = _table("", "slots", "devices", "cores", "Python", "torch", "commit")
    table.columns[0].min_width = max(len(one.name) for one in examination.machines)
    for machine in examination.machines:
        report = machine.report
        gpus = (report.get("gpus") or {}).get("found") or []
        versions, hardware = report.get("versions") or {}, report.get("machine") or {}
        names = sorted({gpu["name"].removeprefix("NVIDIA ") for gpu in gpus})
        table.add_row(
            escape(machine.name),
            str(machine.slots),
            f"{len(gpus)} {', '.join(names)}" if gpus else "CPU" if report else "?",
            str(hardware.get("cores", "?")),
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
    rows = [("all-reduce of gradients", 2, *measured["all_reduce"], num_ranks)]
    rows += [(f"all-to-all of {measured['all_to_all'][2]} ranks", 1, *measured["all_to_all"])]
    for name, passes, size, seconds, count in rows:
        # A rank's link carries passes * (n - 1) / n of the bytes.
        speed = passes * (count - 1) / count * size / seconds
        texts = (f"{size / 2**20:.2f} MiB", f"{1e3 * seconds:.2f} ms", f"{speed / 1e9:.2f} GB/s")
        table.add_row(name, *texts)
    for is_inside, words in ((False, "between machines"), (True, "inside a machine")):
        speeds = [link.bandwidth for link in measured["links"] if link.is_inside == is_inside]
        if speeds:
            span = f"{min(speeds) / 1e9:.2f} to {max(speeds) / 1e9:.2f} GB/s"
            pairs = "1 pair" if len(speeds) == 1 else f"{len(speeds)} pairs"
            table.add_row(f"{pairs} {words}, each way", "", "", span)
    return table


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
    if any(machine.is_remote for machine in examination.machines):
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
    for machine, added in zip(examination.machines, examination.added, strict=True):
        words = " ".join(f"{name}={text}" for name, text in added.items())
        console.print(f"  {machine.name}: {words}", soft_wrap=True, markup=False)
    console.print(f"\nStarted by\n  {examination.command}", soft_wrap=True, markup=False)
