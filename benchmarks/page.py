"""The page of `python -m benchmarks report`: pictures and tables of all results, nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from . import harness
from .charts import Chart, draw
from .report import describe

STYLE = """
:root { color-scheme: light dark; --back: #fdfdfc; --text: #1c1c1a; --faint: #6b6b66; --line: #dddcd6; --floor: #b3261e;
  --s0: #1668a8; --s1: #d9822b; --s2: #4f9d58; --s3: #8a63b8; --s4: #b8505f; --s5: #7a7f87; --s6: #2aa1a1; }
@media (prefers-color-scheme: dark) { :root { --back: #15171a; --text: #e7e6e2; --faint: #a2a19b; --line: #33363b;
  --floor: #ff8a80; --s0: #64b0ec; --s1: #f0a860; --s2: #83cc8b; --s3: #bd9ceb; --s4: #ec8a98; --s5: #aab0b9;
  --s6: #66d4d4; } }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 64rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.8rem 0 .2rem; border-top: 1px solid
  var(--line); padding-top: 1.4rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p, figcaption { color: var(--faint); margin: .2rem 0; font-size: .86rem; } figure { margin: 0; }
img { max-width: 100%; background: #fff; }
svg { width: 100%; height: auto; display: block; font: 12px system-ui, "DejaVu Sans", sans-serif; }
svg text { fill: var(--text); } svg .tick, svg .unit { fill: var(--faint); } svg .unit { text-anchor: middle; }
svg .label { text-anchor: end; } svg .value { font-variant-numeric: tabular-nums; } svg .grid { stroke: var(--line); }
svg .floor { stroke: var(--floor); stroke-width: 1.5; stroke-dasharray: 5 3; } svg .says { fill: var(--floor); }
svg .whisker { stroke: var(--text); stroke-width: 1.2; fill: none; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .86rem; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--faint); font-size: .86rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .82rem; margin: .5rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { color: var(--faint); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
code { font-size: .92em; } nav { font-size: .9rem; } nav a { margin-right: 1rem; } a { color: var(--s0); }
""" + "".join(f".s{i} {{ fill: var(--s{i}); background: var(--s{i}); }}\n" for i in range(7))


def page(
    sections: Sequence[tuple[str, str, Sequence[tuple[Mapping[str, Any], Sequence[Chart], Mapping[str, str]]]]],
) -> str:
    """HTML of (suite, its question, (result, charts, tables) of each device); a suite without results says so."""
    parts, links = [], []
    for name, question, results in sections:
        links.append(f'<a href="#{name}">{name}</a>')
        parts.append(f'<h2 id="{name}">{_inline(question)}</h2>')
        if not results:
            parts.append("<p>Not measured.</p>")
        for result, charts, tables in results:
            parts.append(f"<p>{escape(describe(result))}</p>")
            drawn = [draw(chart) for chart in charts if chart.rows] or [_picture(name, result)]
            blocks = "".join(_block(text) for text in tables.values())
            shown = "" if any(drawn) else " open"  # where there is no picture, the tables are all there is
            parts += [*drawn, f"<details{shown}><summary>the figures</summary>{blocks}</details>"]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>cola_fast, measured</title><style>{STYLE}</style></head><body><h1>cola_fast, measured</h1>"
        "<p>Drawn by <code>python -m benchmarks report</code> from <code>benchmarks/results/</code>. Every figure was "
        "measured on the machine named above it; what was not measured says so.</p>"
        f"<nav>{' '.join(links)}</nav>{''.join(parts)}</body></html>\n"
    )


def _picture(suite: str, result: Mapping[str, Any]) -> str:
    """What the suite has drawn itself beside its result, if it has."""
    own = harness.result_path(suite, result["environment"]).with_suffix(".png")
    path = next((path for path in (own, harness.RESULTS / f"{suite}.png") if path.is_file()), None)
    if path is None:
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{escape(suite)}" src="data:image/png;base64,{data}"></figure>'


def _block(text: str) -> str:
    """A block of the README: tables, sentences and lists of Markdown."""
    return "".join(_paragraph(part) for part in text.strip().split("\n\n"))


def _paragraph(text: str) -> str:
    lines = text.split("\n")
    if not lines[0].startswith("|"):
        return f"<p>{'<br>'.join(_inline(line) for line in lines)}</p>"
    header, rows = _cells(lines[0]), [_cells(line) for line in lines[2:]]
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(line: str) -> list[str]:
    return [_inline(cell.strip()) for cell in line.strip().strip("|").split("|")]


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text, quote=False))
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)
