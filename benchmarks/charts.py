"""Bars as SVG: what a suite wants drawn, as data, and the drawing of it. Colours are the page's, by CSS class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

LABELS, AREA, VALUES = 330, 470, 120  # px: names to the left, bars, and room for the figures behind them
BAR, GAP, ROW_GAP, TOP, BOTTOM = 15, 3, 14, 22, 44


@dataclass(frozen=True)
class Bar:
    series: str
    value: float
    low: float | None = None  # an interval, drawn as a whisker
    high: float | None = None


@dataclass(frozen=True)
class Chart:
    """Rows of bars over one axis.

    unit: what the axis counts. floor: a line at a value, and what it says. signed: points with their intervals instead
    of bars from 0.
    """

    title: str
    unit: str
    rows: Sequence[tuple[str, Sequence[Bar]]]
    floor: tuple[float, str] | None = None
    digits: int = 2
    signed: bool = False
    note: str = ""
    series: list[str] = field(init=False)

    def __post_init__(self) -> None:
        names = dict.fromkeys(bar.series for _, bars in self.rows for bar in bars)
        object.__setattr__(self, "series", list(names))


def draw(chart: Chart) -> str:
    """HTML of a figure: its title, a legend, the SVG and the note."""
    ends = [end for _, bars in chart.rows for bar in bars for end in (bar.value, bar.low, bar.high) if end is not None]
    ends += [0.0, *([chart.floor[0]] if chart.floor else [])]
    ticks = _ticks(min(ends), max(ends))
    first, last = ticks[0], ticks[-1]

    def x(value: float) -> float:
        return LABELS + AREA * (value - first) / (last - first)

    heights = [len(bars) * (BAR + GAP) + ROW_GAP for _, bars in chart.rows]
    bottom = TOP + sum(heights)
    parts = [
        f'<line class="grid" x1="{x(t):.1f}" y1="{TOP}" x2="{x(t):.1f}" y2="{bottom}"/>'
        f'<text class="tick" x="{x(t):.1f}" y="{bottom + 16}" text-anchor="middle">{_number(t, ticks)}</text>'
        for t in ticks
    ]
    parts.append(f'<text class="unit" x="{LABELS + AREA / 2}" y="{bottom + 36}">{escape(chart.unit)}</text>')
    top = float(TOP)
    for (label, bars), height in zip(chart.rows, heights, strict=True):
        middle = top + len(bars) * (BAR + GAP) / 2 + 4
        parts.append(f'<text class="label" x="{LABELS - 10}" y="{middle:.1f}">{_fitted(label)}</text>')
        for i, bar in enumerate(bars):
            parts.append(_bar(chart, bar, x, top + i * (BAR + GAP)))
        top += height
    if chart.floor:
        at, says = chart.floor
        parts.append(f'<line class="floor" x1="{x(at):.1f}" y1="{TOP - 4}" x2="{x(at):.1f}" y2="{bottom}"/>')
        parts.append(f'<text class="says" x="{x(at) + 4:.1f}" y="{TOP - 8}">{escape(says)}</text>')
    width, height = LABELS + AREA + VALUES, bottom + BOTTOM
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(chart.title)}">{"".join(parts)}</svg>'
    legend = "".join(
        f'<span class="key"><i class="s{i}"></i>{escape(name)}</span>' for i, name in enumerate(chart.series)
    )
    legend = f'<div class="legend">{legend}</div>' if len(chart.series) > 1 else ""
    note = f"<figcaption>{escape(chart.note)}</figcaption>" if chart.note else ""
    return f"<figure><h3>{escape(chart.title)}</h3>{legend}{svg}{note}</figure>"


def _bar(chart: Chart, bar: Bar, place: Callable[[float], float], y: float) -> str:
    """`place`: value -> px."""
    colour = f"s{chart.series.index(bar.series)}"
    zero, end, middle = place(0.0), place(bar.value), y + BAR / 2
    parts = []
    if chart.signed:
        parts.append(f'<circle class="{colour}" cx="{end:.1f}" cy="{middle:.1f}" r="4.5"/>')
    else:
        left, width = min(zero, end), max(1.0, abs(end - zero))
        parts.append(f'<rect class="{colour}" x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BAR}" rx="2"/>')
    right = max(zero, end)
    if bar.low is not None and bar.high is not None:
        a, b = place(bar.low), place(bar.high)
        right = max(right, b)
        parts.append(
            f'<path class="whisker" d="M{a:.1f} {middle:.1f}H{b:.1f}M{a:.1f} {y + 4:.1f}v7M{b:.1f} {y + 4:.1f}v7"/>'
        )
    text = f"{bar.value:{'+' if chart.signed else ''},.{chart.digits}f}"
    parts.append(f'<text class="value" x="{right + 6:.1f}" y="{middle + 4:.1f}">{text}</text>')
    return "".join(parts)


def _fitted(label: str, letters: int = 46) -> str:
    """On one line, or on two, broken at a comma if there is one."""
    if len(label) <= letters:
        return escape(label)
    cut = label.rfind(", ", 0, letters) + 1 or label.rfind(" ", 0, letters)
    rest = label[cut + 1 :]
    first, second = label[:cut], rest if len(rest) <= letters else f"{rest[: letters - 1]}…"
    lines = f'<tspan x="{LABELS - 10}" dy="-0.55em">{escape(first)}</tspan>'
    return lines + f'<tspan x="{LABELS - 10}" dy="1.15em">{escape(second)}</tspan>'


def _ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    size = (high - low) / about or 1.0
    power = 10 ** math.floor(math.log10(size))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= size)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _number(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    digits = next((d for d in range(6) if abs(round(step, d) - step) < 1e-9 * abs(step)), 6)
    return f"{value:,.{digits}f}"
