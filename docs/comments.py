"""An extension of Griffe: the comment behind a key of the configuration is its text in the reference."""

from __future__ import annotations

import io
import tokenize
from typing import Any

import griffe

SECTIONS = ("cola_fast.config", "cola_fast.methods.options")


class Comments(griffe.Extension):
    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if attr.docstring is not None or attr.module.path not in SECTIONS or attr.lineno is None:
            return
        lines = attr.lines_collection[attr.filepath][attr.lineno - 1 : attr.endlineno]
        tokens = tokenize.generate_tokens(io.StringIO("\n".join(lines).strip() + "\n").readline)
        text = " ".join(token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT)
        if text:
            attr.docstring = griffe.Docstring(text, lineno=attr.lineno, parent=attr)
