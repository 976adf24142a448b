"""The picture of a run, or of several: loss, gradient norm, routing and BLEU over its steps."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from magnetar.data.errors import UserError, missing_package
from magnetar.engine import metrics

Record = metrics.Record


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


def layer_extremes(record: Record) -> tuple[float, float] | None:
    """Loads of the busiest and of the idlest expert of all MoE layers; None for a dense model."""
    highest = [value for name, value in record.items() if name.endswith("/load_max")]
    lowest = [value for name, value in record.items() if name.endswith("/load_min")]
    return (max(highest), min(lowest)) if highest and lowest else None


def plot_runs(run_dirs: Sequence[Path], out: Path) -> None:
    """Draw several runs side by side: losses, gradient norms, and BLEU if one of them translates.

    Args:
        run_dirs: the runs' folders; their names label the curves.
        out: file of the picture; its suffix chooses the format.

    Raises:
        UserError: a run has not written any training record.
    """
    runs = {run_dir: read_records(run_dir) for run_dir in run_dirs}
    translate = any(_translated(valid) for _, valid in runs.values())
    figure, (losses, norms, *bleu) = _figure(3 if translate else 2)
    for index, (run_dir, (train, valid)) in enumerate(runs.items()):
        name, color = run_dir.name, f"C{index}"
        losses.plot(_steps(train), [r["loss"] for r in train], label=name, color=color)
        losses.plot(_steps(valid), [r["valid_loss"] for r in valid], "o", color=color)
        norms.plot(
            _steps(train), [r.get("grad_norm", math.nan) for r in train], label=name, color=color
        )
        for panel in bleu:
            _draw_bleu(panel, valid, name, color)
    unigram_losses = {loss for loss in map(_unigram_loss, run_dirs) if loss is not None}
    for loss in unigram_losses if len(unigram_losses) == 1 else ():
        losses.axhline(loss, color="gray", linestyle="--", label="unigram model")
    validated = any(valid for _, valid in runs.values())
    losses.set_title(f"loss (nats a token){', dots: validation' if validated else ''}")
    losses.legend(frameon=False)
    norms.set_title("gradient norm before clipping")
    norms.set_yscale("log")
    _save(figure, (losses, norms, *bleu), out)


def plot_run(run_dir: Path, out: Path) -> None:
    """Draw a run's metrics.jsonl, with the threshold of its config and the unigram loss if known.

    Args:
        run_dir: the run's folder.
        out: file of the picture; its suffix chooses the format.

    Raises:
        UserError: a run has not written any training record.
    """
    train, valid = read_records(run_dir)
    is_sparse = layer_extremes(train[0]) is not None
    translates = bool(_translated(valid))
    figure, panels = _figure(2 + 2 * is_sparse + translates)
    _draw_loss(panels[0], train, valid, _unigram_loss(run_dir))
    _draw_gradient_norm(panels[1], train, _threshold(run_dir))
    if is_sparse:
        _draw_entropy(panels[2], train)
        _draw_load(panels[3], train)
    if translates:
        _draw_bleu(panels[-1], valid, "", "C1")
    _save(figure, panels, out)


def _figure(num_panels: int) -> tuple[Any, Any]:
    """A figure, and its panels in rows of two or three."""
    try:
        import matplotlib
    except ImportError as error:
        raise missing_package("a picture", "matplotlib", "plot") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 2 + num_panels % 2
    rows = -(-num_panels // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 3.2 * rows), layout="constrained", squeeze=False
    )
    panels = axes.flatten()
    for unused in panels[num_panels:]:
        unused.remove()
    return figure, panels[:num_panels]


def _save(figure: Any, panels: Iterable[Any], out: Path) -> None:
    from matplotlib import pyplot

    for panel in panels:
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlim(left=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _steps(records: list[Record]) -> list[float]:
    return [record["step"] for record in records]


def _draw_loss(
    panel: Any, train: list[Record], valid: list[Record], unigram_loss: float | None
) -> None:
    panel.plot(_steps(train), [r["loss"] for r in train], label="training", color="C0")
    panel.plot(
        _steps(valid), [r["valid_loss"] for r in valid], "o-", label="validation", color="C1"
    )
    if unigram_loss is not None:
        panel.axhline(unigram_loss, color="gray", linestyle="--", label="unigram model")
    panel.set_title("loss (nats a token)")
    panel.legend(frameon=False)


def _translated(valid: list[Record]) -> list[Record]:
    """The validation records that have translation scores."""
    return [record for record in valid if "valid_bleu" in record]


def _draw_bleu(panel: Any, valid: list[Record], name: str, color: str) -> None:
    records = _translated(valid)
    panel.plot(_steps(records), [r["valid_bleu"] for r in records], "o-", label=name, color=color)
    panel.set_title("greedy BLEU of the validation sample")
    panel.set_ylim(bottom=0, auto=None)  # the top still grows with the next run
    if name:
        panel.legend(frameon=False)


def _draw_gradient_norm(panel: Any, train: list[Record], threshold: float) -> None:
    panel.plot(
        _steps(train),
        [r.get("grad_norm", math.nan) for r in train],
        color="C2",
        label="before clipping",
    )
    if threshold:
        panel.axhline(threshold, color="gray", linestyle="--", label="threshold")
    panel.set_title("gradient norm")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False)


def _draw_entropy(panel: Any, train: list[Record]) -> None:
    names = [name for name in train[0] if name.endswith("/routing_entropy")]
    for name in names:
        layer = name.split("/")[0].replace("_", " ")
        panel.plot(_steps(train), [r.get(name, math.nan) for r in train], label=layer)
    panel.set_title("routing entropy (nats)")
    if 1 < len(names) <= 8:
        panel.legend(frameon=False)


def _draw_load(panel: Any, train: list[Record]) -> None:
    loads = [layer_extremes(record) or (math.nan, math.nan) for record in train]
    panel.plot(_steps(train), [most for most, _ in loads], color="C3", label="busiest expert")
    panel.plot(_steps(train), [least for _, least in loads], color="C0", label="idlest expert")
    panel.axhline(1.0, color="gray", linestyle="--", label="even")
    panel.set_title("load of an expert, in even shares")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False)


def _unigram_loss(run_dir: Path) -> float | None:
    """Loss of the unigram model from summary.json; None before the run has ended."""
    file = run_dir / "summary.json"
    return math.log(json.loads(file.read_text())["unigram_perplexity"]) if file.is_file() else None


def _threshold(run_dir: Path) -> float:
    """Threshold of gradient clipping from config.json; 0 for none."""
    file = run_dir / "config.json"
    return json.loads(file.read_text())["gradient_clipping"] if file.is_file() else 0.0
