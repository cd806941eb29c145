"""RUN/curves.png: loss and accuracy over the chain, with the knots marked. Drawn from metrics.jsonl alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from .. import store
from . import metrics

FILE = "curves.png"
_TRAIN, _EVAL, _ACCURACY, _KNOT = "#9aa5b1", "#1f5fa8", "#c2571a", "#444444"


def draw(run: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = metrics.read(run)
    train = [r for r in rows if r["event"] == "train"]
    evals = [r for r in rows if r["event"] == "eval"]
    knots = [r for r in rows if r["event"] == "knot"]
    with_accuracy = any(r.get("accuracy") is not None for r in evals)

    figure = Figure(figsize=(8, 6 if with_accuracy else 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if with_accuracy else 1, 1, sharex=True, squeeze=False)[:, 0]
    _line(axes[0], train, "loss", _TRAIN, "training loss", linewidth=1)
    _line(axes[0], evals, "loss", _EVAL, "validation loss", marker="o")
    axes[0].set_ylabel("loss (nats per token)")
    losses = [r["loss"] for r in (*train, *evals)]
    if losses and min(losses) > 0 and max(losses) > 10 * min(losses):
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].yaxis.set_minor_formatter(NullFormatter())
    else:
        axes[0].set_ylim(bottom=0)
    if with_accuracy:
        _line(axes[1], evals, "accuracy", _ACCURACY, "validation accuracy", marker="o")
        axes[1].set_ylabel("validation accuracy")
    axes[0].legend(frameon=False)
    for axis in axes:
        for row in knots:
            axis.axvline(row["step"], color=_KNOT, linestyle=":", linewidth=1)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    if len(knots) <= 10:
        for row in knots:
            place = {"xycoords": axes[0].get_xaxis_transform(), "ha": "center", "va": "bottom"}
            axes[0].annotate(f"link {row['link'] + 1} tied", (row["step"], 1.01), fontsize=8, color=_KNOT, **place)
    axes[-1].set_xlabel("optimizer step")
    figure.suptitle(run.name, fontsize=10, parse_math=False)
    image = io.BytesIO()
    figure.savefig(image, dpi=150)
    store.write_file(run / FILE, image.getvalue())
    return run / FILE


def _line(axis: Any, rows: list[dict[str, Any]], key: str, color: str, label: str, **style: Any) -> None:
    points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), color=color, label=label, **style)
