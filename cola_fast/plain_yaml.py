"""YAML without its surprises: mappings, lists, text, numbers, truth values and null, each key once, of bounded size.

PyYAML's SafeLoader runs no code, but it takes the last of two equal keys, reads 2024-01-01 as a date, and shares what
an alias stands for, so that nine lines can mean a billion values ("billion laughs") or a list that holds itself. All
of that is refused here while the document is composed, before a value is made.
"""

from __future__ import annotations

from typing import Any

import yaml

NODES = 100_000  # values of a document, each alias counted as all that it stands for
DEPTH = 50  # of mappings and lists in each other
NUMBER = 400  # characters of a number
TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")}
MERGE = "tag:yaml.org,2002:merge"


def parse(text: str) -> Any:
    """Raises yaml.YAMLError; `problem` says why."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        raise yaml.MarkedYAMLError(problem=f"the character {chr(error.character)!a} is not allowed") from None


def problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error)


class _Loader(yaml.SafeLoader):
    # without dates: a folder may be called 2024-01-01
    yaml_implicit_resolvers = {  # noqa: RUF012  as PyYAML types it
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.sizes: dict[int, tuple[int, int]] = {}  # id of a node -> values in it, and how deep they go

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        alias = isinstance(event, yaml.AliasEvent)
        self.depth += 1
        self._refuse_large(event, 1, 1)
        node = super().compose_node(parent, index)
        if not alias:
            self._check(node)
        elif id(node) not in self.sizes:
            raise _wrong(event, f"*{event.anchor} stands for something that holds it")
        self._refuse_large(event, *self.sizes[id(node)])
        self.depth -= 1
        return node

    def _refuse_large(self, where: Any, values: int, height: int) -> None:
        if self.depth + height - 1 > DEPTH:
            raise _wrong(where, f"mappings and lists are more than {DEPTH} deep in each other")
        if values > NODES:
            raise _wrong(where, f"there are more than {NODES} values")

    def _check(self, node: Any) -> None:
        inner: list[Any] = []
        if node.tag not in TAGS and node.tag != MERGE:
            raise _wrong(node, f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is not for a configuration")
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
            self._check_keys([key for key, _ in node.value])
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif node.tag != "tag:yaml.org,2002:str" and len(node.value) > NUMBER:
            raise _wrong(node, f"a number has {len(node.value)} characters")
        values, heights = zip((0, 0), *(self.sizes[id(part)] for part in inner), strict=True)
        self.sizes[id(node)] = 1 + sum(values), 1 + max(heights)

    def _check_keys(self, keys: list[Any]) -> None:
        """Refuses equal keys, of which YAML would take the last. To Python, 1 and true are equal, too."""
        seen = set()
        for key in keys:
            if not isinstance(key, yaml.ScalarNode):
                raise _wrong(key, "a key is a list or a mapping")
            if key.tag != MERGE:
                name = self.construct_object(key)
                if name in seen:
                    raise _wrong(key, f"{key.value[:60]!r} is there twice")
                seen.add(name)

    def flatten_mapping(self, node: Any) -> None:
        """Merge keys: `<<: *a` brings what the mapping does not have itself. PyYAML's own compares by identity."""
        merged: dict[tuple[str, str], Any] = {}
        for key, value in node.value:
            if key.tag == MERGE:
                for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(source, yaml.MappingNode):
                        raise _wrong(key, "<< merges mappings, but this is none")
                    self.flatten_mapping(source)
                    for pair in source.value:
                        merged.setdefault((pair[0].tag, pair[0].value), pair)
        own = {(key.tag, key.value): (key, value) for key, value in node.value if key.tag != MERGE}
        node.value = list((merged | own).values())

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Of a number that is none (!!int x), PyYAML raises what comes."""
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception:
            kind = node.tag.rpartition(":")[2]
            raise _wrong(node, f"{node.value[:60]!r} cannot be read as {kind}") from None


def _wrong(where: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)
