"""The built documentation has no dead link: every file and every anchor that a page names is there.

`make docs` builds the site and runs this; without a site the test is skipped by name.
"""

from __future__ import annotations

from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest

SITE = Path(__file__).parents[1] / "docs" / "_build" / "html"
PAGES = sorted(SITE.rglob("*.html"))
pytestmark = pytest.mark.skipif(not PAGES, reason="no site is built: make docs")


class Page(HTMLParser):
    """What a page links to, and the anchors that it offers."""

    def __init__(self) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if value and name in ("href", "src"):
                self.links.add(value)
            elif value and name in ("id", "name"):
                self.anchors.add(value)


@cache
def parsed(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def is_dead(link: str, page: Path) -> bool:
    address, anchor = urldefrag(link)
    if urlparse(link).scheme:  # the network, or data in the page itself
        return False
    target = (page.parent / unquote(urlparse(address).path)).resolve() if address else page
    if target.is_dir():
        target /= "index.html"
    if not target.exists():
        return True
    return bool(anchor) and target.suffix == ".html" and unquote(anchor) not in parsed(target).anchors


def test_no_link_is_dead() -> None:
    dead = {str(page.relative_to(SITE)): sorted(bad) for page in PAGES if (bad := {
        link for link in parsed(page).links if is_dead(link, page)
    })}  # fmt: skip
    assert not dead


def test_reports_are_pages_of_the_site() -> None:
    reports = [page for page in PAGES if page.name == "report.html"]
    assert len(reports) > 20
    assert not list((SITE / "_downloads").rglob("*.html")), "a link downloads a report"
    for page in (*reports, SITE / "gallery.html"):
        assert "index.html" in {link.rpartition("/")[2] for link in parsed(page).links}
    assert {link for link in parsed(SITE / "gallery.html").links if link.endswith("report.html")}


def test_the_crawl_sees_links() -> None:
    home = parsed(SITE / "index.html")
    assert "start.html" in home.links
    assert is_dead("no-such-page.html", SITE / "index.html")
    assert is_dead("index.html#no-such-anchor", SITE / "start.html")
