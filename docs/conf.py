"""Sphinx: the markdown pages of the repository and the docstrings, as they are. In `make docs` warnings are errors."""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = "lightning-graphon"
author = "The lightning-graphon developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# The sources begin at the root of the repository, so that links between pages, README and examples work in both places.
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "docs/**/*.md",
    "examples/README.md",
    "benchmarks/README.md",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]

html_theme = "furo"
html_title = "lightning-graphon"
html_copy_source = False

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # hooks are Lightning's; only what is described here is shown
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "code"

_PLAIN = re.compile(r"(`[^`]*`|^\s*\* )|([|*]+|_+(?!\w))")  # code, bullets and underscores inside a name stay


def _as_text(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with code in backticks: |w| is an absolute value, not a name of reStructuredText."""
    lines[:] = [line if line.lstrip().startswith((">>>", "...")) else _PLAIN.sub(_escaped, line) for line in lines]


def _escaped(match: "re.Match[str]") -> str:
    return match[1] or "".join("\\" + sign for sign in match[2])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _as_text, priority=400)  # before napoleon's 500
