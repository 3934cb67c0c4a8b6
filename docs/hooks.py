"""What the site needs beside the pages: the sources that they link to, and the reference.

On GitHub a page links to a source by its place in the repository. The site holds a copy of each
file that is linked to, under ``source/``, and the links lead there.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")
ROLE = re.compile(r":(?:class|func|meth|attr|mod|data):(?=<code>)")
ROOMS = {
    "host": "Hosts",
    "core": "Sites, side inputs, compositions, errors",
    "computation": "Methods",
    "aggregation": "Aggregations",
    "routing": "Mixtures and routers",
    "training": "Training",
    "recipes": "Sweeps and ladders",
    "store": "Storing, sharing, merging",
    "testing": "Testing a method",
}


def _outside(page: File) -> list[str]:
    """List the places in the repository, outside docs/, of the files that a page links to."""
    text = (ROOT / "docs" / page.src_uri).read_text("utf-8")
    places = [os.path.normpath(f"docs/{page.src_uri}/../{target}") for target in LINK.findall(text)]
    return [p for p in places if not p.startswith("docs/") and (ROOT / p).is_file()]


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages link to, under ``source/``, as plain text."""
    linked = {place for page in files.documentation_pages() for place in _outside(page)}
    for place in sorted(linked):
        content = (ROOT / place).read_text("utf-8")
        files.append(File.generated(config, f"source/{place}.txt", content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files outside docs/ to their copies; write out the reference."""
    here = PurePosixPath("docs", page.file.src_uri).parent
    up = "../" * (len(here.parts) - 1)

    def moved(link: re.Match[str]) -> str:
        place = os.path.normpath(here / link[1])
        return link[0] if place.startswith("docs/") else f"]({up}source/{place}.txt"

    markdown = LINK.sub(moved, markdown)
    # of a copy of plain text no heading can be linked to
    markdown = re.sub(r"(\]\([./]*source/[^)#]*)#[^)]*\)", r"\1)", markdown)
    return f"{markdown}\n{_reference()}" if page.file.src_uri == "api.md" else markdown


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Drop the roles of Sphinx, which docstrings have before a name in backquotes."""
    return ROLE.sub("", html)


def _reference() -> str:
    """Write a heading for each room, and a directive for each public name that is from there."""
    stub = ast.parse((ROOT / "src" / "modgraft" / "__init__.pyi").read_text("utf-8"))
    names: dict[str, list[str]] = {room: [] for room in ROOMS}
    for node in stub.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names[node.module.split(".")[0]] += [
                f"modgraft.{node.module}.{alias.name}" for alias in node.names
            ]
    names["testing"] = ["modgraft.testing.contract.check", "modgraft.testing.contract.Report"]
    parts = [
        f"## {ROOMS[room]}\n\n" + "\n\n".join(f"::: {n}" for n in some)
        for room, some in names.items()
    ]
    return "\n\n".join(parts)
