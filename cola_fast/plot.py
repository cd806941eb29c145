"""RUN/curves.png: loss and accuracy over the chain, with the knots marked. Drawn from metrics.jsonl alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from . import metrics, store

FILE = "curves.png"
_TRAIN, _EVAL, _ACCURACY, _KNOT = "#9aa5b1", "#1f5fa8", "#c2571a", "#444444"


def draw(run: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = metrics.read(run)
    train = [r for r in rows if r["event"] == "train"]
    evals = [r for r in rows if r["event"] == "eval"]
    with_accuracy = any(r.get("accuracy") is not None for r in evals)

    figure = Figure(figsize=(8, 6 if with_accuracy else 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if with_accuracy else 1, 1, sharex=True, squeeze=False)[:, 0]
    _line(axes[0], train, "loss", _TRAIN, "training loss", linewidth=1)
    _line(axes[0], evals, "loss", _EVAL, "validation loss", marker="o")
    axes[0].set_ylabel("loss (nats per token)")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False, loc="upper right")
    if with_accuracy:
        _line(axes[1], evals, "accuracy", _ACCURACY, "validation accuracy", marker="o")
        axes[1].set_ylabel("accuracy")
        axes[1].legend(frameon=False, loc="lower right")
    for axis in axes:
        for row in (r for r in rows if r["event"] == "knot"):
            axis.axvline(row["step"], color=_KNOT, linestyle=":", linewidth=1)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    for row in (r for r in rows if r["event"] == "knot"):
        axes[0].annotate(
            f"link {row['link'] + 1} tied", (row["step"], 1), xycoords=("data", "axes fraction"), rotation=90,
            ha="right", va="top", fontsize=8, color=_KNOT, xytext=(-2, -2), textcoords="offset points",
        )  # fmt: skip
    axes[-1].set_xlabel("optimizer step")
    figure.suptitle(run.name, fontsize=10)
    image = io.BytesIO()
    figure.savefig(image, dpi=150)
    store.write_file(run / FILE, image.getvalue())
    return run / FILE


def _line(axis: Any, rows: list[dict[str, Any]], key: str, color: str, label: str, **style: Any) -> None:
    points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), color=color, label=label, **style)
