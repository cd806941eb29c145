"""Tables in the README, between `<!-- benchmark:NAME -->` and `<!-- end -->`, always written from the results
(`methods`: from the registry of methods)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_BLOCK = re.compile(r"(<!-- benchmark:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, blocks: Mapping[str, str]) -> str:
    """`text` with every marked block replaced. Filling twice changes nothing.

    Raises ValueError for a block that no result fills: a number in it would be one that nobody measured.
    """

    def replaced(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        if name not in blocks:
            raise ValueError(
                f"There is no result for benchmark:{name} (there is {', '.join(blocks) or 'none at all'})."
            )
        return f"{opening}{blocks[name].strip()}\n{closing}"

    return _BLOCK.sub(replaced, text)


def names(text: str) -> list[str]:
    """Of the marked blocks."""
    return [name for _, name, _ in _BLOCK.findall(text)]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Mapping[str, float]) -> str:
    """A ratio's median and quartiles, from JSON."""
    return f"{values['median']:.2f} ({values['q1']:.2f} to {values['q3']:.2f})"


def describe(result: Mapping[str, Any]) -> str:
    """One line under a table: on what, with what, from which source."""
    env = result["environment"]
    versions = ", ".join(f"{name} {env[name]}" for name in ("torch", "transformers", "peft") if env[name])
    commit = f"{(env['commit'] or 'unknown')[:10]}{' with changes' if env['dirty'] else ''}"
    quick = " A quick run: not for publication." if result["quick"] else ""
    return (
        f"{env['device']}, {env['threads']} threads ({env['instructions']}); {versions}; "
        f"commit {commit}, {env['date'][:10]}.{quick}"
    )
