"""The tables, the sentences and the plot of `quality`, from its runs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bootstrap import Interval, interval, share, spread
from .quality_arms import ARMS, BATCH, R
from .report import describe, markdown

NAMES = {"minilm": "MiniLM", "smollm2": "SmolLM2-135M", "smollm2-text": "SmolLM2-135M, next token"}
CONTRASTS = (  # arm, what it is compared with, what that shows
    ("cola-3", "lora-restarts", "the merge, with the schedule the same"),
    ("cola-3", "lora-24", "three links, or one of their summed rank"),
    ("cola-3", "rac-lora", "training A, too"),
    ("gelora-8", "lora", "GeLoRA's ranks, or uniform ones of the same mean"),
    ("gelora", "lora-1", "GeLoRA's own ranks, or R = 1"),
)


@dataclass(frozen=True)
class Tested:
    """One arm on the test set, with the learning rate that its sweep chose."""

    lr: float
    correct: Tensor | None  # [seeds, items], 0 or 1; None where there is no label
    losses: Tensor  # [seeds, items], nats

    def accuracy_over(self, other: Tested) -> Interval | None:
        """In points."""
        if self.correct is None or other.correct is None:
            return None
        return interval(100 * (self.correct - other.correct))

    def loss_over(self, other: Tested) -> Interval:
        return interval(self.losses - other.losses)


def tested(result: Mapping[str, Any], setting: Mapping[str, Any]) -> dict[str, Tested]:
    """Arm -> its tests, for the arms that have all seeds."""
    found = {}
    name = f"{setting['model']}-{setting['task']}"
    for arm in (arm for arm in ARMS if arm in setting["arms"]):
        runs = [r for r in result["runs"] if (r["setting"], r["arm"], r["split"]) == (name, arm, "test")]
        runs = sorted((r for r in runs if r["loss"] is not None), key=lambda r: r["seed"])
        if len(runs) == setting["seeds"]:
            correct = None
            if "correct" in runs[0]:
                correct = torch.tensor([[int(c) for c in run["correct"]] for run in runs], dtype=torch.float64)
            losses = torch.tensor([[int(x) / 1000 for x in run["losses"].split()] for run in runs], dtype=torch.float64)
            found[arm] = Tested(runs[0]["lr"], correct, losses)
    return found


def quality_tables(result: Mapping[str, Any]) -> dict[str, str]:
    settings = [(setting, tested(result, setting)) for setting in result["settings"]]
    settings = [(setting, arms) for setting, arms in settings if "lora" in arms]
    blocks = {"quality-teacher": _teacher(result["teacher"])}
    if settings:
        parts = [f"{_title(setting, arms)}\n\n{_table(arms)}" for setting, arms in settings]
        blocks["quality"] = "\n\n".join([*parts, _note(result)])
        blocks["quality-contrasts"] = _contrasts(settings)
        blocks["quality-verdict"] = _verdict(settings)
        blocks["quality-summary"] = f"{_count(settings)}."
    if result["left"]:
        left = f"At least {result['left']} runs are left: the same command goes on."
        blocks["quality"] = f"{blocks['quality']} {left}" if settings else left
    return blocks


# --- each arm beside LoRA ---------------------------------------------------------------------------------------------


def _title(setting: Mapping[str, Any], arms: Mapping[str, Tested]) -> str:
    seeds, items = arms["lora"].losses.shape
    return f"{_short(setting)}: {setting['steps']} steps of {BATCH}, {seeds} seeds, {items} test sentences."


def _table(arms: Mapping[str, Tested]) -> str:
    lora, full = arms["lora"], arms.get("full")
    full_correct, full_gain = (None, None) if full is None else (full.correct, -full.losses)
    rows = []
    for name, arm in arms.items():
        rows.append([ARMS[name].label, f"{arm.lr:g}" if arm.lr else ""])
        between = name not in ("frozen", "lora", "full")
        if arm.correct is not None:
            rows[-1] += [_mean(arm.correct), _signed(arm.accuracy_over(lora), 1) if arm is not lora else ""]
        rows[-1] += [_mean(arm.losses), _signed(arm.loss_over(lora), 3) if arm is not lora else ""]
        if arm.correct is not None:
            rows[-1].append(_closed(arm.correct, lora.correct, full_correct) if between else "")
        rows[-1].append(_closed(-arm.losses, -lora.losses, full_gain) if between else "")
    accuracy = lora.correct is not None
    header = ["", "LR", *(["accuracy", "over LoRA, points"] if accuracy else []), "loss", "over LoRA"]
    return markdown([*header, *(["gap closed"] if accuracy else []), "of the loss"], rows)


def _closed(arm: Tensor, lora: Tensor | None, full: Tensor | None) -> str:
    """The arm's gain over LoRA as a share of full fine-tuning's; larger scores are better ones."""
    return "" if lora is None or full is None else _share(share(arm - lora, full - lora))


def _mean(scores: Tensor) -> str:
    return f"{float(scores.mean()):.3f} ± {spread(scores.mean(1).tolist()):.3f}"


def _signed(found: Interval | None, digits: int) -> str:
    if found is None:
        return ""
    text = f"{found.mean:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"
    return f"**{text}**" if found.excludes(0) else text


def _share(found: Interval | None) -> str:
    return "no gap" if found is None else f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})"


def _note(result: Mapping[str, Any]) -> str:
    ranks = "".join(
        f"GeLoRA's ranks by block, {setting}, {ARMS[arm].label}: {' '.join(map(str, found))}. "
        for setting, arms in result["ranks"].items()
        for arm, found in arms.items()
    )
    return (
        "± is the standard deviation over seeds; in brackets the 95 % bootstrap interval of the paired difference, "
        "over seeds and sentences, bold where it leaves out 0, not corrected for the number of arms. Gap closed: the "
        "arm's gain over LoRA as a share of full fine-tuning's; no gap: the interval of full fine-tuning's gain does "
        f"not lie above 0. {ranks}{describe(result)}"
    )


def _contrasts(settings: Sequence[tuple[Mapping[str, Any], Mapping[str, Tested]]]) -> str:
    rows = []
    for setting, arms in settings:
        for name, other, shows in CONTRASTS:
            if name in arms and other in arms:
                sides = f"{ARMS[name].label} − {ARMS[other].label}"
                accuracy, loss = arms[name].accuracy_over(arms[other]), arms[name].loss_over(arms[other])
                rows.append([_short(setting), sides, shows, _signed(accuracy, 1), _signed(loss, 3)])
    return markdown(["", "difference", "shows", "accuracy, points", "loss"], rows)


def _short(setting: Mapping[str, Any]) -> str:
    return f"{NAMES[setting['model']]}, {setting['task']}"


# --- in words ---------------------------------------------------------------------------------------------------------


Settings = Sequence[tuple[Mapping[str, Any], Mapping[str, Tested]]]


def _count(settings: Settings) -> str:
    """COLA with three links against LoRA, over all settings."""
    gains = [_gain(arms["cola-3"], arms["lora"]) for _, arms in settings if "cola-3" in arms]
    better, worse = sum(gain.low > 0 for gain in gains), sum(gain.high < 0 for gain in gains)
    return (
        f"In {better} of {len(gains)} settings COLA (K = 3) is shown to be better than LoRA of the same rank (in "
        f"accuracy; where there are no labels, in loss), in {worse} to be worse"
    )


def _verdict(settings: Settings) -> str:
    """The same, and one line a setting."""
    lines = [f"{_count(settings)}:", ""]
    for setting, arms in settings:
        if "cola-3" not in arms:
            continue
        accuracy, loss = arms["cola-3"].accuracy_over(arms["lora"]), arms["cola-3"].loss_over(arms["lora"])
        points = ""
        if accuracy is not None:
            points = f"{_plain(accuracy, 1)} points of test accuracy, {_word(accuracy.low, accuracy.high)}, and "
        lines.append(
            f"- {_short(setting)}: COLA (K = 3) − LoRA (R = {R}) is {points}{_plain(loss, 3)} nats of test loss, "
            f"{_word(-loss.high, -loss.low)}. {_gap(arms)}"
        )
    return "\n".join(lines)


def _gain(arm: Tested, other: Tested) -> Interval:
    return arm.accuracy_over(other) or interval(other.losses - arm.losses)


def _gap(arms: Mapping[str, Tested]) -> str:
    if "full" not in arms:
        return "Full fine-tuning: not measured."
    lora, cola, full = arms["lora"], arms["cola-3"], arms["full"]
    if lora.correct is None or cola.correct is None or full.correct is None:
        closed = share(lora.losses - cola.losses, lora.losses - full.losses)
        gap = f"{_plain(full.loss_over(lora), 3)} nats"
    else:
        closed = share(cola.correct - lora.correct, full.correct - lora.correct)
        gap = f"{_plain(interval(100 * (full.correct - lora.correct)), 1)} points"
    rest = "no gap to close" if closed is None else f"COLA closes {_share(closed)} of it"
    return f"Full fine-tuning − LoRA is {gap}: {rest}."


def _plain(found: Interval, digits: int) -> str:
    return _signed(found, digits).strip("*")


def _word(low: float, high: float) -> str:
    return "a gain" if low > 0 else "worse than LoRA" if high < 0 else "no gain shown"


def _teacher(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [[row["arm"], ", ".join(f"{left:.3g}" for left in row["left"])] for row in rows]
    return markdown(["a teacher at a distance of rank 32", "share of the distance² left, by seed"], lines)


# --- the plot ---------------------------------------------------------------------------------------------------------


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Every arm's difference to LoRA, with its interval: a row a setting, accuracy on the left, loss on the right."""
    from matplotlib.figure import Figure

    settings = [(setting, tested(result, setting)) for setting in result["settings"]]
    settings = [(setting, arms) for setting, arms in settings if len(arms.keys() - {"frozen"}) > 1 and "lora" in arms]
    if not settings:
        return
    heights = [len(arms.keys() - {"frozen", "lora"}) + 3 for _, arms in settings]
    figure = Figure(figsize=(9, 0.27 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(settings), 2, squeeze=False, height_ratios=heights)
    for row, (setting, arms) in zip(axes, settings, strict=True):
        shown = [name for name in arms if name not in ("frozen", "lora")][::-1]
        found: list[list[Interval | None]] = [
            [arms[name].accuracy_over(arms["lora"]) for name in shown],
            [arms[name].loss_over(arms["lora"]) for name in shown],
        ]
        for axis, intervals, label in zip(row, found, ("accuracy, points", "loss, nats"), strict=True):
            known = [i for i in intervals if i is not None]
            if not known:
                axis.set_axis_off()
                continue
            ends = [[i.mean - i.low for i in known], [i.high - i.mean for i in known]]
            axis.errorbar([i.mean for i in known], range(len(shown)), xerr=ends, fmt="o", capsize=3)
            axis.axvline(0, color="0.6", linewidth=0.8)
            axis.set_yticks(range(len(shown)), [ARMS[name].label for name in shown])
            axis.set_ylim(-0.7, len(shown) - 0.3)
            axis.set_xlabel(f"{label}, minus LoRA's")
            axis.set_title(_short(setting), loc="right")
    figure.savefig(path, dpi=120)
