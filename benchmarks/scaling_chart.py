"""The scaling benchmark's results summed up, as Markdown tables and as a picture."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.chart import ACCENT, DENSE, GIB, GRAY, peak_flops, picture

GOALS = {"scaling": 0.92, "paper": 0.85}
BOUND = 5e-5  # relative, of losses and gradient norms in fp32


def speed(record: dict[str, Any], hardware: dict[str, Any]) -> dict[str, Any]:
    """The known numbers of a measured run: tokens/s a GPU, MFU, exposed share."""
    tokens = 1000 * record["sequences"] * record["seq_len"]
    speeds = [tokens / one for one in record["step_ms"]]
    found = {"tokens_per_second_per_gpu": statistics.median(speeds)}
    found |= {"slowest": min(speeds), "fastest": max(speeds)}
    if "balanced_ms" in record:
        found["balanced"] = statistics.median(tokens / one for one in record["balanced_ms"])
    if peak := peak_flops({"hardware": hardware, "dtype": record["dtype"]}):
        found["mfu"] = found["tokens_per_second_per_gpu"] * record["flops_per_token"] / peak
    if record["profile"]:
        shares = [one["exposed_ms"] / one["step_ms"] for one in record["profile"]]
        found |= {"exposed_share": statistics.fmean(shares), "largest_exposed_share": max(shares)}
    return found


def apart(one: list[float], other: list[float]) -> list[float]:
    """Relative differences, step by step."""
    return [abs(a / b - 1) for a, b in zip(one, other, strict=True)]


def curves_apart(found: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """The lines of each part that compares curves, by name."""
    numbers, losses = found.get("numbers", {}), found.get("checkpoint", {})
    lines: dict[str, dict[str, list[float]]] = {"numbers": {}, "checkpoint": {}}
    for name, curve in numbers.items():
        if name != "1" and "1" in numbers:
            for key in ("loss", "norm"):
                lines["numbers"][f"EP {name}, {key}"] = apart(curve[key], numbers["1"][key])
    whole = losses.get(str(found["gpus"]))
    for name, continued in losses.items():
        if whole and continued is not whole:
            lines["checkpoint"][f"EP {name}, loss"] = apart(continued, whole)
    return lines


def runs_of_paper(found: dict[str, Any]) -> dict[str, Any]:
    """By name; none where the part was not begun."""
    return found.get("paper", {}).get("runs", {})


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """What each part comes to, by its name."""
    hardware = found["hardware"]
    records = sorted(found.get("scaling", {}).items(), key=lambda item: int(item[0]))
    scaling = {name: speed(one, hardware) for name, one in records}
    beside = {name: speed(one, hardware) for name, one in runs_of_paper(found).items()}
    key = "tokens_per_second_per_gpu"
    for one in scaling.values():
        if "1" in scaling:
            one["over_one_gpu"] = one[key] / scaling["1"][key]
            if "balanced" in one and "balanced" in scaling["1"]:
                one["balanced_over_one_gpu"] = one["balanced"] / scaling["1"]["balanced"]
    for name, one in beside.items():
        if (dense := name.replace("sparse", "dense")) != name and dense in beside:
            one["over_dense"] = one[key] / beside[dense][key]
    largest = {
        part: {name: max(line) for name, line in lines.items()}
        for part, lines in curves_apart(found).items()
    }
    return {"scaling": scaling, "paper": beside} | largest


def heading(found: dict[str, Any]) -> str:
    """Where and when."""
    hardware = found["hardware"]
    where = hardware.get("gpu", f"processes of a CPU, {hardware['machine']}")
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "deepspeed"))
    return f"{found['gpus']} x {where}; {versions}; {found['date'][:10]}"


def table(found: dict[str, Any]) -> str:
    """Markdown: tables of speeds, a line for each comparison, and what is missing."""
    about = summary(found)
    parts = [heading(found)]
    for part, first, over in (
        ("scaling", "EP = GPUs", "over_one_gpu"),
        ("paper", "all GPUs", "over_dense"),
    ):
        records = found.get("scaling", {}) if part == "scaling" else runs_of_paper(found)
        if rows := [_row(name, records[name], one, over) for name, one in about[part].items()]:
            words = over.replace("_", " ")
            parts.append(
                f"| {first} | experts | parameters, M | tokens/s a GPU, median (slowest to "
                f"fastest) | {words} (goal {GOALS[part]}) | MFU | all-to-all exposed, mean "
                "(largest) | peak GiB |\n" + "|---" * 8 + "|\n" + "\n".join(rows)
            )
    for part, what in (("numbers", "EP 1"), ("checkpoint", "the run that went on")):
        for name, largest in about[part].items():
            verdict = "within" if largest <= BOUND else "BEYOND"
            parts.append(f"{part}: {name}: {largest:.1e} from {what}, {verdict} {BOUND:.0e}")
    if found.get("paper") and found["paper"]["num_experts"] < found["paper"]["asked_experts"]:
        parts.append(
            "paper: {asked_experts} experts do not fit, {num_experts} do".format_map(found["paper"])
        )
    if found["skipped"]:
        parts.append(f"skipped for lack of time: {'; '.join(found['skipped'])}")
    if found["failed"]:
        parts.append(f"failed: {'; '.join(found['failed'])}")
    return "\n\n".join(parts) + "\n"


def _row(name: str, record: dict[str, Any], one: dict[str, Any], over: str) -> str:
    def cell(key: str, words: Callable[[float], str], own: dict[str, Any] = one) -> str:
        return words(own[key]) if key in own else ""

    exposed = cell("exposed_share", lambda share: f"{share:.1%}")
    exposed += cell("largest_exposed_share", lambda share: f" ({share:.1%})")
    spread = f"({one['slowest']:,.0f} to {one['fastest']:,.0f})"
    cells = [name, str(record["num_experts"]), f"{record['num_parameters'] / 1e6:,.1f}"]
    cells += [f"{one['tokens_per_second_per_gpu']:,.0f} {spread}"]
    ratio = cell(over, lambda ratio: f"{ratio:.3f}")
    ratio += cell(f"balanced_{over}", lambda ratio: f"; rows balanced {ratio:.3f}")
    cells += [ratio, cell("mfu", lambda mfu: f"{mfu:.1%}")]
    cells += [exposed, cell("peak_bytes", lambda peak: f"{peak / GIB:.1f}", record)]
    return f"| {' | '.join(cells)} |"


def draw(found: dict[str, Any], out: Path) -> None:
    """Four panels, one for each part."""
    about = summary(found)
    with picture(out, 2, 2, figsize=(11, 7.5)) as (figure, axes):
        _draw_scaling(axes[0, 0], about["scaling"])
        _draw_paper(axes[0, 1], about["paper"])
        words = {
            "numbers": ("fp32, every EP beside EP 1", "step"),
            "checkpoint": ("a checkpoint, continued by fewer GPUs", "step after the checkpoint"),
        }
        for panel, (part, lines) in zip(axes[1], curves_apart(found).items(), strict=True):
            for name, line in lines.items():
                floor = [
                    max(value, 1e-9) for value in line
                ]  # no difference at all has no logarithm
                style = "--" if name.endswith("norm") else "-"
                panel.plot(range(1, len(line) + 1), floor, style, label=name)
            panel.axhline(BOUND, color=GRAY, linewidth=1, label="bound")
            title, label = words[part]
            panel.set(title=title, yscale="log", xlabel=label, ylabel="relative difference")
            panel.xaxis.get_major_locator().set_params(integer=True)
            largest = max((max(line) for line in lines.values()), default=0)
            panel.set_ylim(5e-10, max(1e-2, 100 * largest))  # room for the legend
            panel.legend(fontsize=8, loc="upper right", ncols=2)
        for panel in axes.flat:
            panel.title.set_fontsize(10)
        figure.suptitle(heading(found), fontsize=11)


def _draw_scaling(panel: Any, speeds: dict[str, Any]) -> None:
    """Tokens/s a GPU over EP, with the spread and the goal."""
    sizes = sorted(map(int, speeds))
    ordered = [speeds[str(size)] for size in sizes]
    places = range(len(sizes))
    middle = [one["tokens_per_second_per_gpu"] / 1000 for one in ordered]
    panel.bar(places, middle, color=ACCENT, width=0.7)
    for place, value, one in zip(places, middle, ordered, strict=True):
        panel.vlines(place, one["slowest"] / 1000, one["fastest"] / 1000, color="black")
        words = f"{value:.3g}"
        words += f"\n{one['over_one_gpu']:.3f}x" if "over_one_gpu" in one else ""
        words += f"\n{one['exposed_share']:.1%}\nexposed" if "exposed_share" in one else ""
        panel.text(place, 0.5 * value, words, ha="center", va="center", color="white", fontsize=9)
    if "1" in speeds:
        goal = GOALS["scaling"] * speeds["1"]["tokens_per_second_per_gpu"] / 1000
        panel.axhline(goal, color=DENSE, linestyle="--", linewidth=1)
    panel.set_xticks(places, [str(size) for size in sizes])
    panel.set(
        title=f"weak scaling (dashed: goal, {GOALS['scaling']}x)",
        xlabel="EP = GPUs",
        ylabel="thousand tokens/s a GPU",
    )


def _draw_paper(panel: Any, speeds: dict[str, Any]) -> None:
    """Bars, sparse beside dense."""
    panel.set_yticks(range(len(speeds)), list(speeds), fontsize=9)
    panel.invert_yaxis()
    for place, (name, one) in enumerate(speeds.items()):
        value = one["tokens_per_second_per_gpu"] / 1000
        panel.barh(place, value, color=ACCENT if name.startswith("sparse") else DENSE)
        panel.hlines(place, one["slowest"] / 1000, one["fastest"] / 1000, color="black")
        words = f"{value:.3g}"
        words += f"; {one['over_dense']:.3f}x dense" if "over_dense" in one else ""
        words += f"; MFU {one['mfu']:.1%}" if "mfu" in one else ""
        panel.text(one["fastest"] / 1000, place, f" {words}", va="center", fontsize=9)
    fastest = max((one["fastest"] for one in speeds.values()), default=1000)
    panel.set_xlim(0, 1.6 * fastest / 1000)
    panel.set(title="many experts beside dense", xlabel="thousand tokens/s a GPU (the same FLOPs)")
