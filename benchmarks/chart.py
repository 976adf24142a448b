"""The results of the layer and the step benchmark as Markdown tables and as pictures."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ACCENT, GRAY, DENSE = "#d9480f", "#9aa5b1", "#52606d"
GIB = 2**30


@contextmanager
def picture(out: Path, rows: int, columns: int, **keys: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its panels, a (rows, columns) array; it is written at the end of the block.

    Args:
        out: path of the picture; its suffix chooses the format.
        rows: number of rows of panels.
        columns: number of columns of panels.
        keys: further arguments of pyplot.subplots.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, layout="constrained", squeeze=False, **keys)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    yield figure, axes
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def _bar_panel(panel: Any, contenders: dict[str, dict[str, Any]]) -> None:
    """Prepare a panel for a horizontal bar of each contender."""
    ticks = [f"▸ {c['label']}" if c["is_ours"] else c["label"] for c in contenders.values()]
    panel.set_yticks(range(len(contenders)), ticks, fontsize=9)
    panel.set_ylim(len(contenders) - 0.4, -0.6)
    panel.grid(axis="x", alpha=0.25)
    panel.set_axisbelow(True)


def _color(contender: dict[str, Any]) -> str:
    return ACCENT if contender["is_ours"] else DENSE if contender["is_dense"] else GRAY


def _label(contender: dict[str, Any]) -> str:
    return f"**{contender['label']}**" if contender["is_ours"] else contender["label"]


def _notes(found: dict[str, Any]) -> list[str]:
    notes = {r["name"]: r["note"] for r in found["results"] if r.get("note")}
    return [f"{found['contenders'][name]['label']}: {note}" for name, note in notes.items()]


def _where(found: dict[str, Any]) -> str:
    where = found["hardware"].get("gpu", f"CPU with {found['hardware']['cpu_threads']} thread(s)")
    return f"{where}, torch {found['versions']['torch']}, {found['dtype']}"


# FLOP/s of dense bf16 matrix products by the data sheet, by a part of the card's name.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
YARDSTICKS = ("dense_compiled", "dense")  # the first that was measured
OURS = "ours"


def layer_table(found: dict[str, Any]) -> str:
    """Markdown: one table of times for each routing, one of memory, and the notes."""
    routings = list(dict.fromkeys(record["routing"] for record in found["results"]))
    parts = [layer_heading(found)]
    for routing in routings:
        parts.append(
            f"Routing {routing}: median milliseconds, forward and backward (10th to 90th "
            "percentile); time over the dense layer's; TFLOP/s\n\n"
            + _layer_table(found, routing, _time, "")
        )
    parts.append(
        "Busiest expert over the mean, as routing falls\n\n"
        + _layer_table(found, routings[0], _load, "busiest_expert")
    )
    if found["device"] == "cuda":
        parts.append(
            "GiB at the peak without weights and gradients (and with gradients)\n\n"
            + _layer_table(found, routings[0], _memory, "peak_bytes")
        )
    return "\n\n".join([*parts, *_notes(found)]) + "\n"


def layer_heading(found: dict[str, Any]) -> str:
    """Where and what, of the layer benchmark."""
    sizes = ", ".join(f"{key} {found[key]:,}" for key in ("tokens", "d_model", "d_ff", "top_k"))
    return (
        f"{_where(found)}, {sizes}; "
        f"{found['rounds']} rounds of {found['steps_a_round']}, {found['date'][:10]}"
    )


def _layer_table(
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
        lines.append(f"| {_label(contender)} | " + " | ".join(cells) + " |")
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


def draw_layer(found: dict[str, Any], out: Path) -> None:
    """Bars of time over the dense layer's, a panel for each routing and number of experts."""
    routings = list(dict.fromkeys(record["routing"] for record in found["results"]))
    has_bar = {record["name"] for record in found["results"] if "ratio" in record}
    contenders = {name: c for name, c in found["contenders"].items() if name in has_bar}
    size = (
        3.2 + 3.4 * len(found["experts"]),
        (0.9 + 0.3 * len(contenders)) * len(routings) + 1.0,
    )
    grid = (len(routings), len(found["experts"]))
    ratios = [record["ratio"] for record in found["results"] if "ratio" in record]
    with picture(out, *grid, figsize=size, sharex=True, sharey=True) as (figure, axes):
        for row, routing in enumerate(routings):
            for column, count in enumerate(found["experts"]):
                records = {
                    r["name"]: r
                    for r in found["results"]
                    if (r["routing"], r["experts"]) == (routing, count)
                }
                _draw_layer_panel(axes[row, column], contenders, records)
                axes[row, column].set_title(f"{count} experts, routing {routing}", fontsize=10)
        low, high = min([1.0, *ratios]), max([1.0, *ratios])
        # Room for the words after the longest bar, on a log scale.
        axes[0, 0].set_xlim(0.85 * low, 1.2 * high * (high / low) ** 0.5)
        for panel in axes[-1]:
            panel.set_xlabel("time / time of the dense layer (log scale)", fontsize=9)
        figure.suptitle(
            "A sparse feed-forward layer, forward and backward, beside the dense layer of equal "
            "useful FLOPs\n" + layer_heading(found),
            fontsize=11,
        )
        if absent := _absent(found, has_bar):
            figure.supxlabel(absent, fontsize=8, color=DENSE)


def _absent(found: dict[str, Any], has_bar: set[str]) -> str:
    """The contenders without a bar and the reasons, in one line."""
    reasons: dict[str, list[str]] = {}
    for name, contender in found["contenders"].items():
        if name not in has_bar:
            status = next(r["status"] for r in found["results"] if r["name"] == name)
            reasons.setdefault(status.split(":")[0], []).append(contender["label"])
    return "; ".join(f"{reason}: {', '.join(labels)}" for reason, labels in reasons.items())


def _draw_layer_panel(
    panel: Any, contenders: dict[str, dict[str, Any]], records: dict[str, dict[str, Any]]
) -> None:
    from matplotlib.ticker import LogLocator

    _bar_panel(panel, contenders)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.xaxis.set_minor_formatter(lambda value, _: "")
    panel.axvline(1.0, color=DENSE, linestyle="--", linewidth=1, zorder=0)
    for place, (name, contender) in enumerate(contenders.items()):
        record = records[name]
        if "ratio" not in record:
            words = record["status"].split(":")[0]
            panel.text(1.03, place, words, va="center", fontsize=8, color=GRAY, style="italic")
            continue
        panel.barh(place, record["ratio"], color=_color(contender), height=0.65)
        words = f"{record['ratio']:.2f}x  {record['median_ms']:.3g} ms"
        panel.text(record["ratio"] * 1.05, place, words, va="center", fontsize=8)


def summarised(found: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with medians over the rounds.

    A ratio of speeds is the median of the ratios of the rounds, each of which is one turn of all.
    """
    tokens = found["batch"] * found["seq_len"]
    done = []
    for record in records:
        summary = dict(record)
        done.append(summary)
        rounds = record["rounds"]
        if not rounds:
            continue
        speeds = [1000 * tokens / one["step_ms"] for one in rounds]
        median = statistics.median(speeds)
        summary |= {
            "tokens_per_second": median,
            "slowest": min(speeds),
            "fastest": max(speeds),
            "peak_bytes": max(one["peak_bytes"] for one in rounds),
        }
        if peak := peak_flops(found):
            summary["mfu"] = median * record["flops_per_token"] / peak
        for key in ("clip_ms", "deepspeed_clip_ms"):
            if all(key in one for one in rounds):
                shares = [one[key] / one["step_ms"] for one in rounds]
                summary[key.replace("_ms", "_share")] = statistics.median(shares)
    by_place = {(one["experts"], one["name"]): one for one in done}
    for summary in done:
        if "tokens_per_second" not in summary:
            continue
        beside = [by_place.get((summary["experts"], name), {}) for name in (*YARDSTICKS, OURS)]
        yardstick = next((one for one in beside[:-1] if one.get("rounds")), None)
        if yardstick:
            summary["over_dense"] = _speed_ratio(summary, yardstick)
        if beside[-1].get("rounds"):
            summary["ours_over"] = _speed_ratio(beside[-1], summary)
    return done


def _speed_ratio(one: dict[str, Any], other: dict[str, Any]) -> float:
    pairs = zip(one["rounds"], other["rounds"], strict=False)
    return statistics.median(b["step_ms"] / a["step_ms"] for a, b in pairs)


def peak_flops(found: dict[str, Any]) -> float | None:
    """The peak of the device in the type of the run; None if it is unknown."""
    gpu = found["hardware"].get("gpu", "")
    if found["dtype"] == "fp32":
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in gpu), None)


def step_heading(found: dict[str, Any]) -> str:
    """Where and what, of the step benchmark."""
    model = ", ".join(f"{key} {value:,}" for key, value in found["model"].items())
    return (
        f"{_where(found)}; {model}; a step of "
        f"{found['batch']:,} x {found['seq_len']} tokens; {found['rounds']} rounds of "
        f"{found['steps_a_round']} steps, {found['date'][:10]}"
    )


def step_table(found: dict[str, Any]) -> str:
    """Markdown: a table for each number of experts, and the notes."""
    parts = [step_heading(found)]
    for experts in found["experts"]:
        records = [record for record in found["results"] if record["experts"] == experts]
        lines = [
            f"{experts} experts\n",
            "| | tokens/s, median (slowest to fastest round) | over the dense model's | ours over "
            "its | MFU | peak GiB | clipping, DeepSpeed's own | micro-batch |",
            "|---" * 8 + "|",
        ]
        lines += [_row(found["contenders"][record["name"]], record) for record in records]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *_notes(found)]) + "\n"


def _row(contender: dict[str, Any], record: dict[str, Any]) -> str:
    label = _label(contender)
    status = record["status"].replace("|", "/")
    if "tokens_per_second" not in record:
        waiting = "not yet measured" if status == "measured" else status
        return f"| {label} | {waiting} |" + " |" * 6
    speed = (
        f"{record['tokens_per_second']:,.0f} ({record['slowest']:,.0f} to {record['fastest']:,.0f})"
    )
    if status != "measured":
        speed += f"; then {status}"

    def ratio(key: str) -> str:
        return f"{record[key]:.2f}x" if key in record else ""

    def share(key: str) -> str:
        return f"{record[key]:.2%}" if key in record else ""

    clipping = ", ".join(filter(None, [share("clip_share"), share("deepspeed_clip_share")]))
    mfu = f"{record['mfu']:.1%}" if "mfu" in record else ""
    cells = [speed, ratio("over_dense"), ratio("ours_over"), mfu]
    cells += [f"{record['peak_bytes'] / GIB:.2f}", clipping, str(record["micro_batch"])]
    return f"| {label} | " + " | ".join(cells) + " |"


def draw_step(found: dict[str, Any], out: Path) -> None:
    """Bars of tokens/s, a panel for each number of experts."""
    contenders, num_panels = found["contenders"], len(found["experts"])
    size = (4.6 + 4.4 * num_panels, 2.2 + 0.42 * len(contenders))
    speeds = [record["fastest"] for record in found["results"] if "fastest" in record]
    with picture(out, 1, num_panels, figsize=size, sharex=True, sharey=True) as (figure, axes):
        for panel, experts in zip(axes[0], found["experts"], strict=True):
            records = {r["name"]: r for r in found["results"] if r["experts"] == experts}
            _draw_step_panel(panel, contenders, records)
            panel.set_title(f"{experts} experts", fontsize=10)
            panel.set_xlabel("thousand tokens/s (line: slowest to fastest round)", fontsize=9)
        axes[0, 0].set_xlim(0, 1.6 * max(speeds, default=1000) / 1000)
        lines = "A whole training step. " + step_heading(found).replace("; ", "\n")
        figure.suptitle(lines, fontsize=9)


def _draw_step_panel(
    panel: Any, contenders: dict[str, dict[str, Any]], records: dict[str, dict[str, Any]]
) -> None:
    _bar_panel(panel, contenders)
    for place, (name, contender) in enumerate(contenders.items()):
        record = records.get(name, {"status": "not yet measured"})
        if "tokens_per_second" not in record:
            words = " " + record["status"].split(":")[0]
            panel.text(0, place, words, va="center", fontsize=8, color=GRAY, style="italic")
            continue
        speed, fastest = record["tokens_per_second"] / 1000, record["fastest"] / 1000
        panel.barh(place, speed, color=_color(contender), height=0.65)
        panel.hlines(place, record["slowest"] / 1000, fastest, color="black", linewidth=1)
        words = f" {speed:.3g}"
        if "over_dense" in record:
            words += f"; {record['over_dense']:.2f}x dense"
        if "mfu" in record:
            words += f"; MFU {record['mfu']:.1%}"
        panel.text(max(speed, fastest), place, words, va="center", fontsize=8)
