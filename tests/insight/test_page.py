"""The page, in a real browser: at the widths of a desk and of a phone, in light and in dark."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.browser import CHROMIUM, Browser
from torch import nn

import streamnorm as sn
from streamnorm.insight import page
from streamnorm.insight.readings import Reading
from streamnorm.insight.record import Event, LayerFacts, Record, Sample

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


def reading(**values: float) -> Reading:
    return Reading(*[0.0] * len(Reading._fields))._replace(**{"scale": 1.0, "samples": 4.0, **values})


def record(layers: int = 5, samples: int = 30, status: str = "running") -> Record:
    names = [f"body.{i}.norm" for i in range(layers)]
    made = Record("Net<b>", 10, [LayerFacts(name, "StreamingNorm2d", 16, "window=50") for name in names], 0, status)
    made.updates, made.seconds = 10 * samples, 2.0 * samples
    for n in range(1, samples + 1):
        readings = {
            name: reading(drift=i + n / samples, drift_worst=2.0 * i + 1, location_low=-0.42, location_high=0.38)
            for i, name in enumerate(names)
        }
        made.add(Sample(10 * n, 2.0 * n, 0.1, readings))
    made.note(Event(1, 0.1, "update", "SGD: 5 of 5 layers commit"))
    made.note(Event(120, 5.1, "warning", "body.1.norm: </script> & more"))
    return made


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


# What is written


def test_the_file_is_complete_in_itself() -> None:
    text = page.render(record())
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|<link|src=|@import|url\(", text)
    data = data_of(text)
    assert data["at"] == [10 * n for n in range(1, 31)]
    assert data["layers"][2]["drift"][-1] == 3
    assert data["layers"][2]["samples"] == 4, "one number for a series that does not change"
    assert "Net&lt;b&gt;" in text


def test_numbers_that_are_not_finite_are_null() -> None:
    made = record(layers=1)
    made.add(Sample(310, 70.0, float("nan"), {"body.0.norm": reading(drift=float("nan"), scale=float("inf"))}))
    layer = data_of(page.render(made))["layers"][0]
    assert layer["drift"][-1] is None
    assert layer["scale"][-1] is None


@pytest.mark.parametrize(("layers", "columns", "most"), [(3, 240, 150), (50, 80, 500), (200, 40, 900)])
def test_the_file_stays_small(layers: int, columns: int, most: int) -> None:
    """However long the training, and with hundreds of layers: at most so many KiB."""
    made = record(layers, samples=1)
    for n in range(2, 1500):
        readings = {
            facts.name: Reading._make(torch.rand(len(Reading._fields)).tolist()) if n > 1000 else reading()
            for facts in made.layers
        }
        made.add(Sample(10 * n, 2.0 * n, 0.1, readings))
    text = page.render(made)
    data = data_of(text)
    assert columns / 2 <= len(data["at"]) <= columns
    assert data["at"][-1] == 14990, "the newest is there"
    assert len(text) < most * 1024


def test_writing_replaces_the_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "monitor.html"
    page.write(record(), target)
    before = target.read_text()

    def fail(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="full"):
        page.write(record(samples=2), target)
    assert target.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["monitor.html"]


# What a browser makes of it


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as running:
        yield running


@pytest.fixture
def written(tmp_path: Path) -> Path:
    target = tmp_path / "monitor.html"
    page.write(record(status="finished"), target)
    return target


LOOKS = [(1280, False), (1280, True), (390, False), (390, True)]


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_the_page_is_drawn(width: int, dark: bool, browser: Browser, written: Path) -> None:
    browser.errors.clear()
    browser.requests.clear()
    browser.look(width, dark=dark)
    browser.open(written)
    assert browser.value("document.querySelector('h1').textContent") == "Net<b>"
    assert browser.value("[...document.querySelectorAll('.row .name')].map(e => e.textContent)") == [
        f"body.{i}.norm" for i in range(5)
    ]
    assert browser.value("[...document.querySelectorAll('.row .now')].map(e => e.textContent)") == list("12345")
    assert browser.value("document.documentElement.scrollWidth") <= width, "nothing to scroll sideways"
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 120) == dark
    assert "</script> & more" in browser.value("document.querySelector('#events').textContent")
    assert browser.errors == []
    assert {request for request in browser.requests if not request.startswith("about:")} == {written.as_uri()}


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_text_is_readable(width: int, dark: bool, browser: Browser, written: Path) -> None:
    """Contrast of at least 4.5 (WCAG AA) for the colours of text, and no text smaller than 11 pixels."""
    browser.look(width, dark=dark)
    browser.open(written, "#layer=body.1.norm")
    contrasts = browser.value(
        """(() => {
        const style = getComputedStyle(document.documentElement), canvas = document.createElement("canvas");
        const paint = canvas.getContext("2d", { willReadFrequently: true });
        const light = name => {
            paint.fillStyle = style.getPropertyValue(name);
            paint.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].map(v => v / 255)
                .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
            return .2126 * r + .7152 * g + .0722 * b;
        };
        return ["--card", "--ground"].flatMap(back => ["--ink", "--soft", "--accent", "--bad"].map(front => {
            const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
            return [front + " on " + back, (a + .05) / (b + .05)];
        }));
        })()"""
    )
    assert {name: contrast for name, contrast in contrasts if contrast < 4.5} == {}
    sizes = browser.value(
        "[...document.querySelectorAll('body *')].filter(e => e.childNodes.length && e.textContent.trim())"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 11


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_a_click_opens_the_curves_of_a_layer(width: int, browser: Browser, written: Path) -> None:
    browser.errors.clear()
    browser.look(width)
    browser.open(written)
    row = '.row[data-layer="body.1.norm"]'
    browser.click(row)
    assert browser.value("document.querySelectorAll('.detail .chart svg').length") == 6
    assert browser.value("document.querySelectorAll('.detail .curve').length") == 10
    assert browser.value("document.querySelector('.detail').getAttribute('aria-label')") == "body.1.norm"
    assert browser.value("location.hash") == "#layer=body.1.norm"
    assert browser.value("document.documentElement.scrollWidth") <= width
    inside = """[...document.querySelectorAll('.detail .curve')].every(curve => {
        const [a, b] = [curve.getBoundingClientRect(), curve.ownerSVGElement.getBoundingClientRect()];
        return a.left >= b.left - 1 && a.right <= b.right + 3 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1; })"""
    assert browser.value(inside)
    marks = "[...e.querySelectorAll('text')].filter(t => (t.getAttribute('x') === '40') === up).length"
    for up in ("true", "false"):
        fewest = f"Math.min(...[...document.querySelectorAll('.detail .chart svg')].map(e => (up => {marks})({up})))"
        assert browser.value(fewest) >= 2, "an axis with one number has no scale"
    browser.hover(".detail .chart svg")
    assert "update" in browser.value("document.querySelector('.detail .key').textContent")
    browser.click(row)
    assert browser.value("document.querySelectorAll('.detail').length") == 0
    assert browser.value("location.hash") == ""
    assert browser.errors == []


@needs_chromium
def test_colours_for_another_measure(browser: Browser, written: Path) -> None:
    browser.look(1280)
    browser.open(written)
    fills = (
        "[...document.querySelectorAll('.cells')].map(e => e.querySelector('rect:last-of-type').getAttribute('fill'))"
    )
    assert browser.value(fills) == [f"var(--h{b})" for b in (4, 5, 5, 5, 6)]
    browser.value(
        "(s => { s.value = 'worst'; s.dispatchEvent(new Event('change')); })(document.querySelector('select'))"
    )
    assert browser.value(fills) == [f"var(--h{b})" for b in (3, 4, 5, 5, 5)]
    assert browser.value("location.hash") == "#colour=worst"
    browser.open(written, "#colour=worst")
    assert browser.value("document.querySelector('select').value") == "worst"


@needs_chromium
def test_it_follows_the_training(browser: Browser, tmp_path: Path) -> None:
    """The page reads itself again while training runs: what was open stays open, where the reader was is kept."""
    target = tmp_path / "monitor.html"
    page.write(record(layers=40, samples=3), target)
    browser.errors.clear()
    browser.look(390, 700)
    browser.open(target)
    assert browser.value("document.querySelector('#status').textContent") == "running"
    browser.click('.row[data-layer="body.2.norm"]')
    browser.value("scrollTo(0, 500)")
    page.write(record(layers=40, samples=4), target)
    browser.wait("document.querySelector('.tiles dd')?.textContent.startsWith('40')")
    assert browser.value("document.querySelectorAll('.detail').length") == 1
    assert abs(browser.value("scrollY") - 500) < 2
    page.write(record(layers=40, samples=5, status="finished"), target)
    browser.wait("document.querySelector('#status')?.textContent === 'finished'")
    browser.value("window.same = true")
    with pytest.raises(AssertionError):  # the last one is not read again
        browser.wait("!window.same", seconds=3)
    assert browser.errors == []


@needs_chromium
def test_inside_a_notebook(browser: Browser, tmp_path: Path) -> None:
    """A frame in another page: drawn, opened with a click, and not read again."""
    target = tmp_path / "notebook.html"
    target.write_text("<!doctype html><p>A notebook.</p>" + page.embedded(record()))
    browser.errors.clear()
    browser.look(1280)
    browser.open(target)
    inside = "document.querySelector('iframe').contentDocument"
    assert browser.value(f"{inside}.querySelectorAll('.row').length") == 5
    browser.value(f"{inside}.querySelector('.row').click()")
    assert browser.value(f"{inside}.querySelectorAll('.detail .curve').length") == 10
    browser.value(f"{inside}.defaultView.same = true")
    with pytest.raises(AssertionError):
        browser.wait(f"!{inside}.defaultView.same", seconds=3)
    assert browser.errors == []


@needs_chromium
@pytest.mark.parametrize("status", ["running", "finished"])
def test_before_the_first_update(status: str, browser: Browser, tmp_path: Path) -> None:
    target = tmp_path / "monitor.html"
    page.write(Record("Net", 10, [LayerFacts("a", "StreamingNorm2d", 16, "window=50")], 0, status), target)
    browser.errors.clear()
    browser.look(1280)
    browser.open(target)
    assert "update" in browser.value("document.querySelector('.empty').textContent")
    assert browser.errors == []


@pytest.mark.filterwarnings("ignore:.* runs away")
@needs_chromium
@pytest.mark.filterwarnings("ignore:.* runs away: ")
def test_a_training_that_goes_wrong(browser: Browser, tmp_path: Path) -> None:
    """Values up to 1e30 and channels without a finite number: drawn, marked, and no script fails."""
    model = nn.Sequential(nn.Linear(4, 6), sn.StreamingNorm1d(6), nn.ReLU(), nn.Linear(6, 6), sn.StreamingNorm1d(6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sn.monitor(model, every=1, out=tmp_path):
        for _ in range(30):
            optimizer.zero_grad()
            model(torch.randn(2, 4)).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                model[0].weight.mul_(20.0)  # type: ignore[operator]
    for width, dark in LOOKS:
        browser.errors.clear()
        browser.look(width, dark=dark)
        browser.open(tmp_path / "monitor.html", "#layer=1&layer=4")
        assert browser.value("document.querySelectorAll('.detail').length") == 2
        assert browser.value("document.querySelectorAll('.row .flag').length") > 0
        assert "NaN" not in browser.value("['#tiles', '#layers'].map(e => document.querySelector(e).innerHTML).join()")
        assert browser.errors == []
