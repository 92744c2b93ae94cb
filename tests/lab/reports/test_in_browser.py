"""Reports and the page over all results in a real browser, at the widths of a desk and of a phone, light and dark."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import CHROMIUM, Browser
from support.lab import set_scores

from streamnorm_lab.commands.main import main

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

CLIPPED = """[...document.querySelectorAll('table')].filter(table => table.getBoundingClientRect().width
    > table.parentElement.clientWidth + 1).map(table => table.textContent.slice(0, 80))"""
OUTSIDE = """[...document.querySelectorAll('.plot text')].filter(text => { const box = text.getBoundingClientRect();
    return box.width && (box.left < 0 || box.right > innerWidth); }).map(text => text.textContent)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as made:
        yield made


@pytest.fixture(scope="module")
def root(_finished_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with one folder, and a page over them."""
    made = tmp_path_factory.mktemp("browsed") / "all"
    folder = Path(shutil.copytree(_finished_once, made / "online-fc-digits"))
    set_scores(folder, {"layer": (0.9, 0.91, 0.92), "streaming-l1": (0.5, 0.51, 0.52)})
    assert main(["report", str(folder), str(made)]) == 0
    return made


DRAWN = "document.querySelectorAll('figure.chart .plot .line').length > 0"
"""The script of a page draws its figures once it is there."""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_report_is_readable(browser: Browser, root: Path, width: int, dark: bool) -> None:
    browser.look(width, dark=dark)
    browser.open(root / "online-fc-digits" / "report.html")
    assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.value(CLIPPED) == []
    assert browser.value(OUTSIDE) == []
    assert browser.value("document.querySelectorAll('.plot').length") == 1 + 2 * 2 + 2
    grounds = browser.value(
        "[document.body, document.querySelector('.sheet')].map(e => getComputedStyle(e).backgroundColor)"
    )
    assert all((max(map(int, ground[4:-1].split(","))) < 60) == dark for ground in grounds)
    assert not browser.errors
    assert not [request for request in browser.requests if not request.startswith(("file:", "about:"))]


def test_a_figure_says_its_values_and_hides_methods(browser: Browser, root: Path) -> None:
    browser.look(1280)
    browser.open(root / "online-fc-digits" / "report.html")
    browser.wait(DRAWN)
    browser.value("document.querySelector('figure.chart .plot').scrollIntoView({block: 'center'})")
    browser.wait("scrollY > 0")
    browser.hover("figure.chart .plot")
    browser.wait("document.querySelector('#tip').style.visibility === 'visible'")
    shown = browser.value("[...document.querySelectorAll('#tip tr')].map(row => row.textContent)")
    assert any(row.startswith("Layer91.0%") for row in shown)
    assert any(row.startswith("Batchcannot train") for row in shown) or len(shown) == 4
    before = browser.value("document.querySelectorAll('figure.chart')[0].querySelectorAll('.plot .line').length")
    browser.click("figure.chart .key:nth-child(3)")
    after = browser.value("document.querySelectorAll('figure.chart')[0].querySelectorAll('.plot .line').length")
    assert (before, after) == (5, 4), "four methods, and the cross where Batch Normalization cannot train"


def test_an_axis_becomes_logarithmic(browser: Browser, root: Path) -> None:
    browser.look(1280)
    browser.open(root / "online-fc-digits" / "report.html")
    browser.wait(DRAWN)
    curves = "document.querySelectorAll('figure.chart')[1]"
    path = f"{curves}.querySelector('.plot .line path:not(.area)').getAttribute('d')"
    before = browser.value(path)
    assert browser.value(f"{curves}.querySelector('input').checked") is False
    browser.value(f"{curves}.querySelector('input').click()")
    linear, logarithmic = ([float(x) for x in re.findall(r"[ML]([0-9.]+)", d)] for d in (before, browser.value(path)))
    assert len(linear) == len(logarithmic) == 4
    assert linear[0] == logarithmic[0]
    assert linear[1] < logarithmic[1]


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_over_all_results_is_short_and_filters(browser: Browser, root: Path, width: int) -> None:
    browser.look(width)
    browser.open(root / "report.html")
    assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.value("document.documentElement.scrollHeight") < 6 * 900
    shown = "[...document.querySelectorAll('.claim')].filter(claim => claim.offsetParent).length"
    everything = browser.value(shown)
    browser.click(".filter.does-not-hold")
    assert 0 < browser.value(shown) < everything
    assert browser.value("document.querySelector('.filters output').textContent").endswith(f"of {everything} claims")
    browser.click(".filter.does-not-hold")
    assert browser.value(shown) == everything
    order = (
        "(claim => [claim.querySelector('.badge'), claim.querySelector('.what')].map(e => e.getBoundingClientRect()))"
    )
    badge, text = browser.value(f"{order}(document.querySelector('.claim')).map(box => [box.x, box.y])")
    assert badge[0] < text[0] or badge[1] < text[1], "the verdict comes first"
    assert not browser.errors


def test_a_link_opens_the_claim_that_it_leads_to(browser: Browser, root: Path) -> None:
    browser.look(1280)
    browser.open(root / "report.html")
    browser.value("document.querySelector('.strip a').click()")
    browser.wait("document.querySelector(location.hash).open")
    browser.value("document.querySelector('details.group').open = true")
    browser.wait("document.querySelector('details.group .plot') !== null")
    assert not browser.errors
