"""The layer benchmark's results as a Markdown table and as a picture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from magnetar.data.errors import UserError

ACCENT, GRAY, DENSE = "#d9480f", "#9aa5b1", "#52606d"
GIB = 2**30


def read_results(
    file: Path, benchmark: str = "moe_layer", needed: tuple[str, ...] = ("results", "contenders")
) -> dict[str, Any]:
    """The results of a benchmark, in which the `needed` parts may not be missing or empty.

    Raises:
        UserError: if the file is missing, or is not a result of this benchmark.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist: name a file that --out has written")
    try:
        found = json.loads(file.read_text())
    except ValueError:
        found = None
    is_whole = isinstance(found, dict) and all(found.get(part) for part in needed)
    if not is_whole or found.get("benchmark") != benchmark:
        raise UserError(
            f"{file} is no result of this benchmark: name a file that --out has written"
        )
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown: one table of times for each routing, one of memory, and the notes."""
    routings = list(dict.fromkeys(record["routing"] for record in found["results"]))
    parts = [_heading(found)]
    for routing in routings:
        parts.append(
            f"Routing {routing}: median milliseconds, forward and backward (10th to 90th "
            "percentile); time over the dense layer's; TFLOP/s\n\n"
            + _table(found, routing, _time, "")
        )
    parts.append(
        "Busiest expert over the mean, as routing falls\n\n"
        + _table(found, routings[0], _load, "busiest_expert")
    )
    if found["device"] == "cuda":
        parts.append(
            "GiB at the peak without weights and gradients (and with gradients)\n\n"
            + _table(found, routings[0], _memory, "peak_bytes")
        )
    notes = {r["name"]: r["note"] for r in found["results"] if r.get("note")}
    parts += [f"{found['contenders'][name]['label']}: {note}" for name, note in notes.items()]
    return "\n\n".join(parts) + "\n"


def _heading(found: dict[str, Any]) -> str:
    where = found["hardware"].get("gpu", f"CPU with {found['hardware']['cpu_threads']} thread(s)")
    sizes = ", ".join(f"{key} {found[key]:,}" for key in ("tokens", "d_model", "d_ff", "top_k"))
    return (
        f"{where}, torch {found['versions']['torch']}, {found['dtype']}, {sizes}; "
        f"{found['rounds']} rounds of {found['steps_a_round']}, {found['date'][:10]}"
    )


def _table(
    found: dict[str, Any], routing: str, cell: Callable[[dict[str, Any]], str], key: str
) -> str:
    """The table of one routing; with a key, only of contenders that have it."""
    records = {(r["name"], r["experts"]): r for r in found["results"] if r["routing"] == routing}
    columns = found["experts"]
    lines = [
        "| | " + " | ".join(f"E = {count}" for count in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name, contender in found["contenders"].items():
        if key and not any(key in records[name, count] for count in columns):
            continue
        cells = [
            cell(record) if record["status"] == "measured" else record["status"].replace("|", "/")
            for record in (records[name, count] for count in columns)
        ]
        label = f"**{contender['label']}**" if contender["is_ours"] else contender["label"]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _time(record: dict[str, Any]) -> str:
    spread = f"{record['p10_ms']:.3g} to {record['p90_ms']:.3g}"
    ratio = f"; {record['ratio']:.2f}x" if "ratio" in record else ""
    speed = record["tflops_per_second"]
    return f"{record['median_ms']:.3g} ({spread}){ratio}; {speed:.3g}"


def _load(record: dict[str, Any]) -> str:
    return f"{record['busiest_expert']:.2f}"


def _memory(record: dict[str, Any]) -> str:
    without, whole = record["peak_activation_bytes"], record["peak_bytes"]
    return f"{without / GIB:.2f} ({whole / GIB:.2f})"


def draw(found: dict[str, Any], out: Path) -> None:
    """Bars of time over the dense layer's, a panel for each routing and number of experts.

    Args:
        found: results of the benchmark.
        out: path of the picture; its suffix chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    routings = list(dict.fromkeys(record["routing"] for record in found["results"]))
    has_bar = {record["name"] for record in found["results"] if "ratio" in record}
    contenders = {name: c for name, c in found["contenders"].items() if name in has_bar}
    figure, axes = pyplot.subplots(
        len(routings),
        len(found["experts"]),
        figsize=(
            3.2 + 3.4 * len(found["experts"]),
            (0.9 + 0.3 * len(contenders)) * len(routings) + 1.0,
        ),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    ratios = [record["ratio"] for record in found["results"] if "ratio" in record]
    for row, routing in enumerate(routings):
        for column, count in enumerate(found["experts"]):
            records = {
                r["name"]: r
                for r in found["results"]
                if (r["routing"], r["experts"]) == (routing, count)
            }
            _draw_panel(axes[row, column], contenders, records)
            axes[row, column].set_title(f"{count} experts, routing {routing}", fontsize=10)
    low, high = min([1.0, *ratios]), max([1.0, *ratios])
    # Room for the words after the longest bar, on a log scale.
    axes[0, 0].set_xlim(0.85 * low, 1.2 * high * (high / low) ** 0.5)
    for panel in axes[-1]:
        panel.set_xlabel("time / time of the dense layer (log scale)", fontsize=9)
    figure.suptitle(
        "A sparse feed-forward layer, forward and backward, beside the dense layer of equal useful "
        "FLOPs\n" + _heading(found),
        fontsize=11,
    )
    if absent := _absent(found, has_bar):
        figure.supxlabel(absent, fontsize=8, color=DENSE)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def _absent(found: dict[str, Any], has_bar: set[str]) -> str:
    """The contenders without a bar and the reasons, in one line."""
    reasons: dict[str, list[str]] = {}
    for name, contender in found["contenders"].items():
        if name not in has_bar:
            status = next(r["status"] for r in found["results"] if r["name"] == name)
            reasons.setdefault(status.split(":")[0], []).append(contender["label"])
    return "; ".join(f"{reason}: {', '.join(labels)}" for reason, labels in reasons.items())


def _draw_panel(
    panel: Any, contenders: dict[str, dict[str, Any]], records: dict[str, dict[str, Any]]
) -> None:
    from matplotlib.ticker import LogLocator

    ticks = [f"▸ {c['label']}" if c["is_ours"] else c["label"] for c in contenders.values()]
    panel.set_xscale("log")
    panel.set_yticks(range(len(contenders)), ticks, fontsize=9)
    panel.set_ylim(len(contenders) - 0.4, -0.6)
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.xaxis.set_minor_formatter(lambda value, _: "")
    panel.axvline(1.0, color=DENSE, linestyle="--", linewidth=1, zorder=0)
    panel.grid(axis="x", alpha=0.25)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    for place, (name, contender) in enumerate(contenders.items()):
        record = records[name]
        if "ratio" not in record:
            words = record["status"].split(":")[0]
            panel.text(1.03, place, words, va="center", fontsize=8, color=GRAY, style="italic")
            continue
        color = ACCENT if contender["is_ours"] else DENSE if contender["is_dense"] else GRAY
        panel.barh(place, record["ratio"], color=color, height=0.65)
        words = f"{record['ratio']:.2f}x  {record['median_ms']:.3g} ms"
        panel.text(record["ratio"] * 1.05, place, words, va="center", fontsize=8)
