"""The step benchmark's results summed up, as a Markdown table and as a picture."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.chart import ACCENT, DENSE, GIB, GRAY

# FLOP/s of dense bf16 matrix products by the data sheet, by a part of the card's name.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
YARDSTICKS = ("dense_compiled", "dense_compiled_whole", "dense")  # the first that was measured
OURS = "ours"


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


def heading(found: dict[str, Any]) -> str:
    """Where and what."""
    where = found["hardware"].get("gpu", f"CPU with {found['hardware']['cpu_threads']} thread(s)")
    model = ", ".join(f"{key} {value:,}" for key, value in found["model"].items())
    return (
        f"{where}, torch {found['versions']['torch']}, {found['dtype']}; {model}; a step of "
        f"{found['batch']:,} x {found['seq_len']} tokens; {found['rounds']} rounds of "
        f"{found['steps_a_round']} steps, {found['date'][:10]}"
    )


def table(found: dict[str, Any]) -> str:
    """Markdown: a table for each number of experts, and the notes."""
    parts = [heading(found)]
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
    notes = {r["name"]: r["note"] for r in found["results"] if r.get("note")}
    parts += [f"{found['contenders'][name]['label']}: {note}" for name, note in notes.items()]
    return "\n\n".join(parts) + "\n"


def _row(contender: dict[str, Any], record: dict[str, Any]) -> str:
    label = f"**{contender['label']}**" if contender["is_ours"] else contender["label"]
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


def draw(found: dict[str, Any], out: Path) -> None:
    """Bars of tokens/s, a panel for each number of experts.

    Args:
        found: results of the benchmark.
        out: path of the picture; its suffix chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contenders = found["contenders"]
    figure, axes = pyplot.subplots(
        1,
        len(found["experts"]),
        figsize=(4.6 + 4.4 * len(found["experts"]), 2.2 + 0.42 * len(contenders)),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    speeds = [record["fastest"] for record in found["results"] if "fastest" in record]
    for panel, experts in zip(axes[0], found["experts"], strict=True):
        records = {r["name"]: r for r in found["results"] if r["experts"] == experts}
        _draw_panel(panel, contenders, records)
        panel.set_title(f"{experts} experts", fontsize=10)
        panel.set_xlabel("thousand tokens/s (line: slowest to fastest round)", fontsize=9)
    axes[0, 0].set_xlim(0, 1.6 * max(speeds, default=1000) / 1000)
    lines = "A whole training step. " + heading(found).replace("; ", "\n")
    figure.suptitle(lines, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def _draw_panel(
    panel: Any, contenders: dict[str, dict[str, Any]], records: dict[str, dict[str, Any]]
) -> None:
    ticks = [f"▸ {c['label']}" if c["is_ours"] else c["label"] for c in contenders.values()]
    panel.set_yticks(range(len(contenders)), ticks, fontsize=9)
    panel.set_ylim(len(contenders) - 0.4, -0.6)
    panel.grid(axis="x", alpha=0.25)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    for place, (name, contender) in enumerate(contenders.items()):
        record = records.get(name, {"status": "not yet measured"})
        if "tokens_per_second" not in record:
            words = " " + record["status"].split(":")[0]
            panel.text(0, place, words, va="center", fontsize=8, color=GRAY, style="italic")
            continue
        color = ACCENT if contender["is_ours"] else DENSE if contender["is_dense"] else GRAY
        speed, fastest = record["tokens_per_second"] / 1000, record["fastest"] / 1000
        panel.barh(place, speed, color=color, height=0.65)
        panel.hlines(place, record["slowest"] / 1000, fastest, color="black", linewidth=1)
        words = f" {speed:.3g}"
        if "over_dense" in record:
            words += f"; {record['over_dense']:.2f}x dense"
        if "mfu" in record:
            words += f"; MFU {record['mfu']:.1%}"
        panel.text(max(speed, fastest), place, words, va="center", fontsize=8)
