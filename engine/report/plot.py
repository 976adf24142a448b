"""The picture of a run, or of several: loss, gradient norm, routing and BLEU over its steps."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from magnetar.data.atomic import atomic_file
from magnetar.data.errors import UserError, missing_package
from magnetar.engine import metrics

Record = metrics.Record
Runs = dict[Path, tuple[list[Record], list[Record]]]  # training and validation records


def read_records(run_dir: Path) -> tuple[list[Record], list[Record]]:
    """The training records and the validation records of metrics.jsonl.

    Raises:
        UserError: the run has not written any training record.
    """
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{file} does not exist: name the folder of a run that has begun to train")
    lines, _, words = metrics.read_records(file)
    if words:
        print(f"warning: {words}", file=sys.stderr, flush=True)
    records = [record for _, record in lines]
    train = [record for record in records if "loss" in record]
    if not train:
        raise UserError(f"{file} has no training record yet: wait for the first logged step")
    return train, [record for record in records if "valid_loss" in record]


def plot(run_dirs: Sequence[Path], out: Path) -> None:
    """Draw losses and gradient norms, BLEU where a run translates, and the routing of a single run.

    Args:
        run_dirs: the runs' folders; their names label the curves of several.
        out: file of the picture; its suffix chooses the format.

    Raises:
        UserError: a run has not written any training record, or the suffix is no picture's.
    """
    runs = {run_dir: read_records(run_dir) for run_dir in run_dirs}
    drawers = [_draw_losses, _draw_gradient_norms]
    ((train, _), *others) = runs.values()
    if not others and any(name.endswith("/load_max") for name in train[0]):
        drawers += [_draw_entropy, _draw_load]
    if any(_translated(valid) for _, valid in runs.values()):
        drawers.append(_draw_bleu)
    figure, panels = _figure(len(drawers))
    suffix, known = out.suffix[1:].lower() or "png", figure.canvas.get_supported_filetypes()
    if suffix not in known:
        raise UserError(f"--out {out}: no picture is called .{suffix}: use {', '.join(known)}")
    for draw, panel in zip(drawers, panels, strict=True):
        draw(panel, runs)
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlim(left=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as file:
        figure.savefig(file, dpi=110, format=suffix)


def _figure(num_panels: int) -> tuple[Any, Any]:
    """A figure, and its panels in rows of two or three."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise missing_package("a picture", "matplotlib", "plot") from error

    columns = 2 + num_panels % 2
    rows = -(-num_panels // columns)
    figure = matplotlib.figure.Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in panels[num_panels:]:
        unused.remove()
    return figure, panels[:num_panels]


def _curve(panel: Any, records: Iterable[Record], name: str, style: str = "-", **how: Any) -> None:
    points = [(record["step"], record.get(name, math.nan)) for record in records]
    panel.plot(*zip(*points, strict=True) if points else ([], []), style, **how)


def _draw_losses(panel: Any, runs: Runs) -> None:
    for index, (run_dir, (train, valid)) in enumerate(runs.items()):
        if len(runs) == 1:
            _curve(panel, train, "loss", label="training", color="C0")
            _curve(panel, valid, "valid_loss", "o-", label="validation", color="C1")
        else:
            _curve(panel, train, "loss", label=run_dir.name, color=f"C{index}")
            _curve(panel, valid, "valid_loss", "o", color=f"C{index}")
    unigram_losses = {loss for loss in map(_unigram_loss, runs) if loss is not None}
    for loss in unigram_losses if len(unigram_losses) == 1 else ():
        panel.axhline(loss, color="gray", linestyle="--", label="unigram model")
    has_dots = len(runs) > 1 and any(valid for _, valid in runs.values())
    panel.set_title(f"loss (nats a token){', dots: validation' if has_dots else ''}")
    panel.legend(frameon=False)


def _draw_gradient_norms(panel: Any, runs: Runs) -> None:
    if len(runs) > 1:
        for index, (run_dir, (train, _)) in enumerate(runs.items()):
            _curve(panel, train, "grad_norm", label=run_dir.name, color=f"C{index}")
        panel.set_title("gradient norm before clipping")
        panel.set_yscale("log")
        return
    ((run_dir, (train, _)),) = runs.items()
    _curve(panel, train, "grad_norm", label="before clipping", color="C2")
    if threshold := _number(run_dir, "config.json", "gradient_clipping"):
        panel.axhline(threshold, color="gray", linestyle="--", label="threshold")
    panel.set_title("gradient norm")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False)


def _translated(valid: list[Record]) -> list[Record]:
    """The validation records that have translation scores."""
    return [record for record in valid if "valid_bleu" in record]


def _draw_bleu(panel: Any, runs: Runs) -> None:
    for index, (run_dir, (_, valid)) in enumerate(runs.items()):
        color = f"C{index}" if len(runs) > 1 else "C1"
        _curve(panel, _translated(valid), "valid_bleu", "o-", label=run_dir.name, color=color)
    panel.set_title("greedy BLEU of the validation sample")
    panel.set_ylim(bottom=0)
    if len(runs) > 1:
        panel.legend(frameon=False)


def _draw_entropy(panel: Any, runs: Runs) -> None:
    ((train, _),) = runs.values()
    names = [name for name in train[0] if name.endswith("/routing_entropy")]
    for name in names:
        _curve(panel, train, name, label=name.split("/")[0].replace("_", " "))
    panel.set_title("routing entropy (nats)")
    if 1 < len(names) <= 8:
        panel.legend(frameon=False)


def _draw_load(panel: Any, runs: Runs) -> None:
    ((train, _),) = runs.values()
    curves = (
        ("/load_max", max, "busiest expert", "C3"),
        ("/load_min", min, "idlest expert", "C0"),
    )
    for suffix, extreme, label, color in curves:
        for record in train:
            shares = [value for name, value in record.items() if name.endswith(suffix)]
            record[suffix] = extreme(shares, default=math.nan)
        _curve(panel, train, suffix, label=label, color=color)
    panel.axhline(1.0, color="gray", linestyle="--", label="even")
    panel.set_title("load of an expert, in even shares")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False)


def _number(run_dir: Path, name: str, key: str) -> float | None:
    """A positive number of one of a run's JSON files; None without one, which is said.

    A curve needs neither file, so a damaged one does not keep it from being drawn.
    """
    file = run_dir / name
    if not file.exists():
        return None
    try:
        value = json.loads(file.read_bytes())[key]
        if isinstance(value, int | float) and 0 <= value < math.inf:
            return float(value)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, OverflowError):
        pass
    print(f"warning: {file} has no {key}, so its line is not drawn", file=sys.stderr, flush=True)
    return None


def _unigram_loss(run_dir: Path) -> float | None:
    """Loss of the unigram model from summary.json; None before the run has ended."""
    perplexity = _number(run_dir, "summary.json", "unigram_perplexity")
    return math.log(perplexity) if perplexity else None
