"""The documentation site: `make docs` builds it into build/docs, without a network; warnings are errors."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _site import docstrings, pages

import headwater

project = "Headwater"
author = "The Headwater authors"
copyright = "The Headwater authors, MIT licence"
version = release = headwater.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_site"]
smartquotes = False  # they would change the strings in the text

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries = False

html_theme = "furo"
html_title = f"Headwater {release}"
html_static_path = ["_site/static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sphinx = False


def setup(app) -> None:
    """Docstrings become reStructuredText, and some pages get what is made from the source."""
    app.connect("autodoc-process-docstring", docstrings.process)
    app.connect("source-read", pages.complete)
