"""The site made of these pages: `scripts/docs` builds it."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from converter import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "dsocr-convert"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# Links to a page's headings are written as GitHub makes them.
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"dsocr-convert {release}"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["wide.css"]
# Editors read the schema at this address.
html_extra_path = ["../converter/layouts/mapping.schema.json"]
# The console's lines, with their `$ `, are no language's.
highlight_language = "none"

# Docstrings are written as the pages are: single backquotes for code.
default_role = "code"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
# One argument a line: a verb has twenty.
maximum_signature_line_length = 88
# Types of others, whose pages no build asks the network for, and our own that have no page.
nitpick_ignore_regex = [
    (r"py:.*", r"(pathlib|collections|typing|torch|enum)\..*|Path|Any|Tensor|Callable|Mapping|Sequence|Module|None"),
    (r"py:.*", r"(?:converter\.)?(?:\w+\.)*(Progress|Shapes|Contents|Storage|SourceFile|Picture|Range|DType|Self)"),
    (r"py:.*", r"(?:converter\.)?(?:\w+\.)*(OnProgress|FolderFiles|TracePoint)"),
]


def _literal_blocks(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Indented lines of a docstring are code, as in Markdown; docutils would make a quotation of them."""
    text = re.sub(r"(?m)^(\S.*\n)\n(?=    \S)", r"\1\n::\n\n", "\n".join(lines))
    lines[:] = text.split("\n")


def _options(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Describe a class's options by their help texts, unless its docstring does."""
    fields = dataclasses.fields(thing) if what == "class" and dataclasses.is_dataclass(thing) else ()
    for field in fields:
        if "help" in field.metadata and not any(f".. attribute:: {field.name}" in line for line in lines):
            lines += ["", f".. attribute:: {field.name}", "", f"   {field.metadata['help']}"]


def _plain_outside(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to files of the repository that are no pages of the site stay as text."""
    out = r"\.\./" * (page.count("/") + 1)
    source[0] = re.sub(rf"\[([^]]+)\]\({out}[^)]+\)", lambda link: link[1], source[0])


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", _literal_blocks)
    app.connect("autodoc-process-docstring", _options)
    app.connect("source-read", _plain_outside)
