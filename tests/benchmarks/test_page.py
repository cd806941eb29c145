"""The page: everything that a chart was given is on it, and nothing comes from elsewhere."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from benchmarks import harness, scaling
from benchmarks.charts import Bar, Chart, draw
from benchmarks.page import page
from benchmarks.scaling import Model

BARS = Chart(
    "A & B",
    "ms (lower is better)",
    [
        ("first < second", [Bar("ours", 1.0, 0.9, 1.2), Bar("peer", 250.0)]),
        ("x" * 30 + " " + "y" * 30, [Bar("ours", 2.0)]),
    ],
    floor=(1.0, "the floor"),
)


def svg(chart: Chart) -> ElementTree.Element:
    found = re.search(r"<svg.*</svg>", draw(chart), re.DOTALL)
    assert found
    return ElementTree.fromstring(found[0])


def test_a_chart_has_its_bars_unit_floor_and_whiskers() -> None:
    root = svg(BARS)
    widths = [float(rect.get("width", 0)) for rect in root.iter("rect")]
    assert len(widths) == 3
    assert widths[1] > 100 * widths[2] > 0
    texts = " ".join("".join(text.itertext()) for text in root.iter("text"))
    assert all(word in texts for word in ("ms (lower is better)", "the floor", "first < second", "250.00"))
    assert len([path for path in root.iter("path") if path.get("class") == "whisker"]) == 1
    assert len([line for line in root.iter("line") if line.get("class") == "floor"]) == 1


def test_nothing_is_cut() -> None:
    root = svg(BARS)
    width, height = map(float, root.get("viewBox", "").split()[2:])
    for rect in root.iter("rect"):
        assert float(rect.get("x", 0)) + float(rect.get("width", 0)) <= width
    for text in root.iter("text"):
        assert 0 <= float(text.get("y", 0)) <= height
    long = next(text for text in root.iter("text") if len(list(text)) == 2)
    assert [span.text for span in long] == ["x" * 30, "y" * 30]


def test_signed_charts_show_points_on_both_sides_of_zero() -> None:
    root = svg(
        Chart("d", "points", [("a", [Bar("d", -1.0, -2.0, 0.5)]), ("b", [Bar("d", 1.0, 0.5, 1.5)])], signed=True)
    )
    left, right = (float(circle.get("cx", 0)) for circle in root.iter("circle"))
    assert left < right
    assert not list(root.iter("rect"))
    assert "+1.00" in "".join(root.itertext())


def test_the_page_is_whole_by_itself() -> None:
    result = {"environment": harness.environment(), "quick": False}
    tables = {"t": "| a | b |\n| --- | ---: |\n| `x` | **1** |\n\nA note."}
    text = page([("one", "How fast?", [(result, [BARS], tables)]), ("two", "On a GPU?", [])])
    assert not re.search(r"(src|href)=\"(?!#)|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text
    assert "<td><code>x</code></td><td><b>1</b></td>" in text
    assert text.count("Not measured.") == 1
    assert "&amp; B" in text


@pytest.mark.parametrize(("name", "billions"), [("Llama-1B", 1.24), ("Llama-8B", 8.03), ("Llama-70B", 70.6)])
def test_computed_sizes_are_those_of_the_models(name: str, billions: float) -> None:
    model = Model.named(name)
    assert (model.weights + model.embeddings) / 1e9 == pytest.approx(billions, rel=0.01)
    assert model.link(16) == 16 * model.link(1)


def test_every_computed_table_says_so() -> None:
    assert all("Computed" in table for table in scaling.tables().values())
