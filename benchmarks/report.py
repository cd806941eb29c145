"""Tables in the README and the pages of docs/ and benchmarks/, between `<!-- benchmark:NAME -->` and `<!-- end -->`,
always written from the results (`methods`: from the registry of methods)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


def kind(result: Mapping[str, Any]) -> str:
    """The kind of machine: its name, threads and instructions, and the dtype that it multiplies natively, which is
    meant where none is named."""
    env = result["environment"]
    before = "bf16" if env.get("gpu") or "AMX" in env["instructions"] else "fp32"  # it was written down
    return f"{env['device']}, {env['threads']} threads ({env['instructions']}), natively {env.get('dtype', before)}"


def describe(result: Mapping[str, Any]) -> str:
    """One line under a table: on what, with what, from which source."""
    env = result["environment"]
    versions = ", ".join(f"{name} {env[name]}" for name in ("torch", "transformers", "peft") if env[name])
    commit = f"{(env['commit'] or 'unknown')[:10]}{' with changes' if env['dirty'] else ''}"
    quick = " A quick run: not for publication." if result["quick"] else ""
    return f"{kind(result)}; {versions}; commit {commit}, {env['date'][:10]}.{quick}"


# --- several kinds of machine -----------------------------------------------------------------------------------------


class Quoted(NamedTuple):
    """The ratios that a block may be quoted by. More is worse."""

    what: str  # is over what
    values: Sequence[float]  # a case each


def beside(results: Sequence[tuple[Mapping[str, Any], str, Quoted | None]]) -> str:
    """A block: (result, table, its ratios) of each kind of machine, one below the other, and which kind does worst.

    Of one kind, its table alone. Seconds of two kinds are not to be compared, ratios are: they stand first.
    """
    if len(results) == 1:
        return results[0][1]
    quoted = [(kind(result), ratios) for result, _, ratios in results if ratios is not None and ratios.values]
    parts = [_quote(quoted)] if quoted else []
    for result, table, _ in results:
        parts += [f"**{kind(result)}**", table]
    return "\n\n".join(parts)


def _quote(quoted: Sequence[tuple[str, Quoted]]) -> str:
    spans = [
        f"{_span(ratios.values)} on {name}" for name, ratios in sorted(quoted, key=lambda one: -max(one[1].values))
    ]
    return f"{quoted[0][1].what}, the worst kind of machine first: {'; '.join(spans)}."


def _span(values: Sequence[float]) -> str:
    low, high = (f"{end:.2f}" for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
