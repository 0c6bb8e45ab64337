"""The documentation site: `make docs` reads the repository's Markdown where it lies and writes build/docs.

The source folder is the root of the repository, so that a relative link means the same on the site and wherever the
repository is browsed. Only the pages below are read. A link to a file that is no page becomes a download; a link to a
folder, which has no page, becomes plain text.

Refused: a source folder of its own, filled with copies or with pages that include others; every relative link in them
would need another target.
"""

from __future__ import annotations

import gc
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from docstrings import to_rst  # noqa: E402
from docutils import nodes  # noqa: E402
from sphinx import addnodes  # noqa: E402

import fp8moe  # noqa: E402

gc.disable()  # pages are trees that stay to the end: looking through them for garbage takes a quarter of the time

project = "fp8moe"
author = "the fp8moe contributors"
release = version = fp8moe.__version__

root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    *(f"{folder}/README.md" for folder in ("benchmarks", "docker", "kernels", "launch", "launch/*")),
    "benchmarks/LOG.md",
]
exclude_patterns = [".*", "build", "runs", "fp8moe"]  # fp8moe/kernels is kernels once more

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
highlight_language = "none"  # blocks are shell lines, tables and what a program says

autodoc_inherit_docstrings = False  # torch's own are written for its site
autodoc_member_order = "bysource"
autodoc_use_type_comments = False  # there are none, and to look for them parses every function again
add_module_names = False
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "fp8moe"
html_copy_source = False
html_show_sphinx = False
templates_path = ["templates"]
html_additional_pages = {"index": "start.html"}  # build/docs/index.html leads to the first page

_MODULES = re.compile(r"^<!-- modules: (.+) -->$", re.MULTILINE)
_PATTERN = re.compile(r"^\S*\*\S*\n", re.MULTILINE)


def _docstring(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = to_rst(lines)


def _source(app: Any, page: str, source: list[str]) -> None:
    """Write the modules that a page of docs/api asks for; leave out a pattern of the index that has no page yet."""
    source[0] = _MODULES.sub(lambda found: "\n\n".join(_modules(found[1])), source[0])
    if page == root_doc:
        folder = ROOT / Path(page).parent
        source[0] = _PATTERN.sub(lambda one: one[0] if any(folder.glob(f"{one[0].strip()}.md")) else "", source[0])


def _modules(names: str) -> Iterator[str]:
    """The public modules of packages, without their folders, and modules given by name, as sections."""
    for name in names.split():
        folder = getattr(importlib.import_module(name), "__path__", None)
        inside = [one.name for one in pkgutil.iter_modules(folder) if not one.ispkg] if folder else [""]
        for module in (f"{name}.{one}".rstrip(".") for one in inside if not one.startswith("_")):
            yield f"## {module}\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n```"


def _folders(app: Any, tree: nodes.document) -> None:
    """Make plain text of links to folders of the repository."""
    for link in list(tree.findall(addnodes.pending_xref)):
        page = Path(str(tree["source"]))
        if link["reftype"] == "myst" and (page.parent / str(link["reftarget"])).is_dir():
            link.replace_self(link.children)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("source-read", _source)
    app.connect("doctree-read", _folders)
