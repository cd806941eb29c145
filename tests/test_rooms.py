"""The rooms of `cola_fast`: who may import whom. Imports go downward only, and in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cola_fast"
# From the ground up. A floor is a room, or files of the top level.
FLOORS = (
    ("__init__", "console", "config_tree", "errors", "plain_yaml", "seeds", "store", "versions", "world"),
    ("layers",),
    ("ranks",),
    ("methods",),
    ("config",),
    ("data",),
    ("chain",),
    ("training",),
    ("commands",),
    ("cli",),
)
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file; a room's own name is its __init__."""
    files = {path.relative_to(PACKAGE).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in files.items()}


MODULES = modules()


def imports(name: str, *, typed: bool = False) -> Iterator[str]:
    """The modules of the package that a module imports, wherever in it; those for types alone only if `typed`."""
    tree = ast.parse(MODULES[name].read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    parts = name.split(".")
    here = parts if MODULES[name].name == "__init__.py" and name != "__init__" else parts[:-1]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or (id(node) in for_types and not typed):
            continue
        base = here[: len(here) - node.level + 1] if node.level else []
        if not node.level:
            if (node.module or "").split(".")[0] != PACKAGE.name:
                continue
            base = (node.module or "").split(".")[1:]
        elif node.module:
            base = [*base, *node.module.split(".")]
        for alias in node.names:
            full, outer = ".".join([*base, alias.name]), ".".join(base)
            yield full if full in MODULES else outer


def room(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name: str) -> None:
    for other in imports(name):
        if other and room(other) != room(name):
            assert FLOOR[room(other)] <= FLOOR[room(name)], f"{name} imports {other}, which is on a floor above"


def test_no_circle() -> None:
    edges = {name: {other for other in imports(name) if other in MODULES and other != name} for name in MODULES}
    edges.pop("__init__")  # it names its exports' homes, and loads them when they are asked for
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' > '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in edges.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_the_ground_floor_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 12
    assert {room(name) for name in MODULES} == set(FLOOR)
