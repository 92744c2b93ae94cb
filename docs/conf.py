"""Sphinx configuration: `make docs` builds the site with warnings as errors, unresolved references included."""

import re
import shutil
from importlib.metadata import version as installed_version
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

project = "streamnorm"
author = "The streamnorm authors"
copyright = author
release = version = installed_version("streamnorm")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",  # formulas that a browser without a network draws
]
exclude_patterns = ["_build", "tutorials", "generated/gallery.md"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"streamnorm {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["attrs_inline", "dollarmath"]
myst_heading_anchors = 3
myst_url_schemes = {"http": None, "https": None, "mailto": None, "results": "results/{{path}}"}

nitpicky = True
nitpick_ignore_regex = [
    # Other projects' names: their inventories are on the network.
    ("py:class", r"(torch|collections|contextlib|pathlib)\..*"),
    # Type variables and aliases of this package, and values that pass between layers and engines.
    ("py:class", r"(streamnorm\.[a-z.]+\.)?(Module|Batch|Factory|NormOptions|Reader)"),
    ("py:class", r"streamnorm\.core\.spec\.(View|State|Formula)"),
]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autosummary_ignore_module_all = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "_tutorials",
    "filename_pattern": r"/plot_",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "write_computation_times": False,
}

RESULTS = Path(__file__).parents[1] / "results"
HOSTED = {".html", ".svg", ".csv", ".txt"}
"""The files of results that the site holds, beside its pages."""


def make_gallery(app: Sphinx) -> None:
    if not (RESULTS / "report.html").exists():
        raise ExtensionError(f"{RESULTS} has no report.html: build the reports with `make reports`")
    from streamnorm_lab.reports.gallery import gallery

    place = Path(app.srcdir) / "generated" / "gallery.md"
    place.parent.mkdir(exist_ok=True)
    place.write_text(gallery(RESULTS, "results"), encoding="utf-8")


def lead_to_reports(app: Sphinx, name: str, source: list[str]) -> None:
    """Links to a folder of results lead to its report, and those to the claims to the page over all results."""

    def hosted(link: re.Match[str]) -> str:
        place = link[1].rstrip("/")
        if place in ("", "claims.csv"):
            return "](results:report.html)"
        return f"](results:{place}/report.html)" if (RESULTS / place).is_dir() else f"](results:{place})"

    source[0] = re.sub(r"\]\(\.\./results/([^)#\s]*(?<!\.svg))\)", hosted, source[0])


def host_results(app: Sphinx, error: Exception | None) -> None:
    """Copy reports, figures and tables beside the pages; reports get a way back."""
    if error is not None or app.builder.format != "html":
        return
    for source in sorted(path for path in RESULTS.rglob("*") if path.suffix in HOSTED and "watch" not in path.parts):
        place = source.relative_to(RESULTS)
        target = Path(app.outdir) / "results" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".html":
            up = "../" * len(place.parts)
            back = f'<a href="{up}index.html">streamnorm</a><a href="{up}results/report.html">All results</a>'
            text = source.read_text(encoding="utf-8")
            bar = '<nav class="menu">'
            page = (
                text.replace(bar, bar + back, 1)
                if bar in text
                else text.replace("<body>", f"<body>{bar}{back}</nav>", 1)
            )
            target.write_text(page, encoding="utf-8")
        else:
            shutil.copyfile(source, target)


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", make_gallery)
    app.connect("source-read", lead_to_reports)
    app.connect("build-finished", host_results)
