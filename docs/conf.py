"""Sphinx configuration: `make docs` builds it with warnings as errors."""

from importlib.metadata import version as installed_version

project = "streamnorm"
author = "The streamnorm authors"
copyright = author
release = version = installed_version("streamnorm")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"streamnorm {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# The README links to files outside docs/. That links between files lead somewhere is tested (tests/test_docs.py).
suppress_warnings = ["myst.xref_missing"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
