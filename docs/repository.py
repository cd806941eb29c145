"""A hook of MkDocs: files of the repository that lie outside docs/ are pages of the site, too.

Links are written as the repository needs them, from file to file; on the site README.md is index.md, and docs/ is the
root.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/*.md", "benchmarks/results/*.png")
LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        files.append(File.generated(config, _on_the_site(path.relative_to(ROOT).as_posix()), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    place = os.path.relpath(page.file.abs_src_path, ROOT)
    here = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link[2]))
        return link[1] + posixpath.relpath(_on_the_site(target), here or ".")

    return LINK.sub(moved, markdown)


def _on_the_site(path: str) -> str:
    """A file of the repository -> its place on the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")
