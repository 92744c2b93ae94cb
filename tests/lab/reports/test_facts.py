"""What README and documentation say of results is what the results say: each computed place is that of the logs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from streamnorm_lab.analysis.results import Results
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.experiments.adapt import Adapt
from streamnorm_lab.reports.facts import (
    FACTS,
    MARKED,
    SCANNERS,
    marked_pages,
    newest,
    page_with,
    results_of,
    write_pages,
)
from streamnorm_lab.reports.pictures import NARROW, PICTURE, save_pictures

HOME = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(not (HOME / "results").is_dir(), reason="needs the results of a checkout")
PAGES = marked_pages(HOME) if (HOME / "results").is_dir() else []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_says_what_the_results_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert page_with(text, HOME / "results") == text, "write it with: make reports"


def test_everything_computed_has_its_place() -> None:
    used = {match["name"] for page in PAGES for match in MARKED.finditer(page.read_text(encoding="utf-8"))}
    assert used == FACTS.keys()


def test_a_number_changed_by_hand_is_found_and_written(tmp_path: Path) -> None:
    text = (HOME / "README.md").read_text(encoding="utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").symlink_to(HOME / "results")
    changed = re.sub(r"(\| fully connected, 32 \| )[0-9.]+", r"\g<1>99.9", text)
    assert changed != text
    (tmp_path / "README.md").write_text(changed, encoding="utf-8")
    assert write_pages(tmp_path) == [tmp_path / "README.md"]
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text
    assert write_pages(tmp_path) == []


def test_the_newest_complete_results_are_taken(tmp_path: Path) -> None:
    def add(name: str, like: str, version: str) -> None:
        shutil.copytree(HOME / "results" / like, tmp_path / name)
        config = json.loads((tmp_path / name / "experiment.json").read_text())
        (tmp_path / name / "experiment.json").write_text(json.dumps({**config, "streamnorm": version}))

    add("old", "conv-cifar10", "0.1")
    add("old-0.2", "conv-cifar10", "0.2")
    add("old-20-0.11", "conv-cifar10", "0.11")  # of an experiment with another name
    add("old-0.10", "conv-cifar10-20000", "0.10")
    assert newest(tmp_path, "old", "layer") == tmp_path / "old-0.10"
    assert newest(tmp_path, "old", "group") == tmp_path / "old-0.2", "the last one has no results of it"


def test_a_mark_that_names_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="'no-such' is not computed: one of picture"):
        page_with("<!-- computed: no-such -->\n<!-- /computed -->", HOME / "results")


def test_what_pages_say_in_prose_of_large_mini_batches() -> None:
    """README and "When to use it": with large mini-batches nothing is lost and nothing is won."""
    rows = [row.split(" | ") for row in FACTS["situations"](HOME / "results").splitlines()]
    large = [row[-1] for row in rows if "Large mini-batches" in row[0] or "Mini-batches of 32, convolutional" in row[0]]
    assert len(large) == 2
    assert all("not clear" in reading for reading in large)


def test_what_a_page_says_in_prose_of_fine_tuning() -> None:
    """Small mini-batches: who is ahead of whom with one image and with four, and with which memory no seed is lost."""
    results = results_of(HOME / "results" / "finetune-digits")
    one, four = Setting(1, 1), Setting(4, 1)

    def ahead(ours: str, theirs: str, setting: Setting) -> bool:
        difference = results.difference(ours, theirs, setting)
        return difference is not None and difference.low > 0

    assert ahead("streaming-l1", "batch-frozen", one)
    assert ahead("group", "streaming-l1", one)
    assert ahead("streaming-l1", "batch", one)
    assert not any(ahead(method.name, "batch", four) for method in results.methods if "window" not in method.name)
    worst = {
        name: min(min(results.cells[name, setting].scores.values()) for setting in results.settings)
        for name in ("streaming-l1", *(f"streaming-l1,window={window}" for window in (50, 200, 1000)))
    }
    assert worst.pop("streaming-l1") < 0.6
    assert min(worst.values()) > 0.8


def test_what_the_guide_says_in_prose_of_adaptation() -> None:
    """Adapting is level with statistics of 64 images and costs nothing on clean ones; one image says too little."""
    results = results_of(newest(HOME / "results", "adapt-cifar10", "streaming-l1"))
    found = {(one.finals.method.name, one.mode): one.means for one in Adapt.evaluated(results.finals)}
    adapting = found["streaming-l1", "adapting"]
    for kind, mean in found["batch", "64 images"].items():
        assert mean.low < adapting[kind].high, kind
        assert adapting[kind].low < mean.high, kind
    trained = found["streaming-l1", "as trained"]
    assert adapting["clean"].high > trained["clean"].mean
    assert all(mean.mean < 0.15 for mean in found["batch", "each image"].values())
    layer = found["layer", "as trained"]
    for kind in ("noise", "blur"):
        assert layer["clean"].mean - layer[kind].mean < trained["clean"].mean - trained[kind].mean


def test_what_the_guide_says_in_prose_of_streams_of_another_order() -> None:
    """Ordered classes harm adapting a little and statistics of 64 images much; fog that comes and goes is followed."""
    results = results_of(newest(HOME / "results", "adapt-digits", "streaming-l1"))
    found = {(one.finals.method.name, one.mode): one.means for one in Adapt.evaluated(results.finals)}
    trained, adapting = found["streaming-l1", "as trained"], found["streaming-l1", "adapting"]
    waiting, entropy = found["batch", "64 images"], found["batch", "entropy"]
    assert 0.03 < trained["ordered"].mean - adapting["ordered"].mean < 0.05
    assert trained["ordered"].low > adapting["ordered"].high
    assert waiting["ordered"].mean < 0.5 * waiting["clean"].mean
    assert adapting["gradual"].low > trained["gradual"].mean
    assert all(abs(entropy[kind].mean - mean.mean) < 0.002 for kind, mean in waiting.items())
    assert all(waiting[kind].low > adapting[kind].mean for kind in ("contrast", "fog"))


def test_what_a_page_says_in_prose_of_scanners() -> None:
    """Where volumes differ in gain and offset only Instance Normalization holds; else Batch is not clearly ahead."""
    one, many, standardized = (results_of(HOME / "results" / f"volumes-{name}") for name in SCANNERS)

    def mean(results: Results, name: str, setting: Setting) -> float:
        found = results.cells[name, setting].mean
        assert found is not None
        return found.mean

    for setting in many.settings:
        assert abs(mean(many, "instance", setting) - mean(one, "instance", setting)) < 0.02
        assert max(mean(many, name, setting) for name in ("batch", "batch-recalibrated", "streaming-l1")) < 0.5
        for name in ("layer", "group"):
            assert min(many.cells[name, setting].scores.values()) < 0.4, "it fails on some seeds"
    alone = Setting(1, 1)
    behind = one.difference("streaming-l1", "batch", alone)
    assert behind is not None
    assert behind.low < 0 < behind.high
    assert -0.08 < behind.mean < -0.04
    assert 0.3 < mean(many, "streaming-l1", alone) < 0.4
    assert 0.7 < mean(standardized, "streaming-l1", alone) < 0.8
    assert mean(standardized, "instance", alone) > mean(standardized, "streaming-l1", alone) + 0.1


def test_the_pictures_are_drawn_from_the_results(tmp_path: Path) -> None:
    save_pictures(HOME, tmp_path)
    for path in (PICTURE, NARROW):
        committed = (HOME / path).read_text(encoding="utf-8")
        assert (tmp_path / path.name).read_text(encoding="utf-8") == committed, "draw it with: make reports"


def test_a_picture_of_other_results_is_another(tmp_path: Path) -> None:
    for name in ("online-fc-cifar10", "adapt-cifar10"):
        shutil.copytree(HOME / "results" / name, tmp_path / "results" / name)
    shutil.copytree(HOME / "results" / "conv-digits", tmp_path / "results" / "conv-cifar10-20000")
    save_pictures(tmp_path, tmp_path)
    assert (tmp_path / "evidence.svg").read_text(encoding="utf-8") != (HOME / PICTURE).read_text(encoding="utf-8")
