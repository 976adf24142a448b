"""Look at every machine before a run starts, and say what to do about what is wrong.

magnetar doctor --hostfile hosts --deepspeed_config ds_configs/lm_xmoe.json

Machines are asked side by side over ssh: whether they answer, clock, code, versions, JSON, data,
disk, GPUs, locks of compilations, the port. If nothing speaks against it, the deepspeed launcher
then starts all ranks, which measure their collectives and links. Without --hostfile: this machine.
Status 0: a run can start; 1: something must be mended first; 2: bad input.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import rich.box
import rich.table
from rich.console import Console
from rich.markup import escape

from magnetar.engine.doctor.bandwidth import Sizes, measure
from magnetar.engine.doctor.checks import CHECKS
from magnetar.engine.doctor.run import Examination, Options, examine
from magnetar.launchers.user_errors import user_errors

_COLOURS = {"problem": "bold red", "warning": "yellow", "": "green"}
_CELLS = {"problem": "fail", "warning": "warn", "": "ok"}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="magnetar doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-H", "--hostfile", type=Path, help="of the machines, as for the deepspeed launcher")
    add("--deepspeed_config", type=Path, metavar="JSON", help="the run's JSON")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override any key of it")
    add("--num_gpus", "--num_accelerators", type=int, help="ranks of this machine, no hostfile")
    add("--master_addr", help="of the first machine; default: found, as the launcher does it")
    add("--master_port", type=int, default=29500, help="of the rendezvous (29500)")
    add("--force_multi", action="store_true", help="reach a hostfile's only machine over ssh")
    add("--measure", help=argparse.SUPPRESS)  # what the ranks do
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.hostfile is not None and given.num_gpus is not None:
        parser.error("--num_gpus is for this machine alone: slots are in the hostfile")
    if given.num_gpus is not None and given.num_gpus < 1:
        parser.error(f"--num_gpus={given.num_gpus} must be at least 1")
    if not 0 < given.master_port < 2**16:
        parser.error(f"--master_port={given.master_port} must be from 1 to 65535")
    if given.set and given.deepspeed_config is None:
        parser.error("--set overrides keys of a JSON: give --deepspeed_config, too")
    return given


def _table(*columns: str) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True, min_width=len(column))
    return table


def overview(examination: Examination) -> rich.table.Table:
    """Machines x checks: the worst of what was found."""
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
    """What each machine is."""
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
    """What the ranks have measured."""
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
    """With the bandwidth that a rank's link carries: passes * (n - 1) / n of the bytes."""
    carried = passes * (num_ranks - 1) / num_ranks * size / seconds
    table.add_row(
        name, f"{size / 2**20:.2f} MiB", f"{1e3 * seconds:.2f} ms", f"{carried / 1e9:.2f} GB/s"
    )


def print_findings(console: Console, examination: Examination) -> None:
    """Each with what to do."""
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
    """Exactly what every machine gets."""
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


@user_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Examine and print; 1 if something must be mended before a run starts."""
    given = parse_arguments(arguments)
    if given.measure is not None:
        *sizes, seconds = map(int, given.measure.split(","))
        measure(Sizes(*sizes), seconds)
        from magnetar.engine.cluster.process_groups import leave_distributed

        leave_distributed()
        return 0
    console = Console(highlight=False)
    options = Options(
        hostfile=given.hostfile,
        config=given.deepspeed_config,
        settings=tuple(given.set),
        num_gpus=given.num_gpus,
        master_addr=given.master_addr,
        master_port=given.master_port,
        force_multi=given.force_multi,
    )
    with Console(stderr=True).status("asking the machines, then measuring: up to 3 minutes"):
        examination = examine(options)
    console.print(overview(examination))
    console.print(machines(examination))
    if examination.measured is not None:
        console.print(collectives(examination))
    else:
        console.print(f"Collectives were not measured: {examination.skipped}.\n")
    print_environment(console, examination)
    console.print()
    print_findings(console, examination)
    num_problems = sum(finding.severity == "problem" for finding in examination.findings)
    if num_problems:
        console.print(f"\n{num_problems} to mend before a run starts")
        return 1
    console.print("A run can start." if examination.findings else "All well: a run can start.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
