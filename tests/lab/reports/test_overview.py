"""All results on one page: verdicts are computed from logs, for us and against us."""

from __future__ import annotations

import re
import shutil

import pytest
from support.lab import Page, set_scores

from streamnorm_lab.analysis.claims import (
    CLAIMS,
    FALSE,
    HOLDS,
    OPEN,
    UNMEASURED,
    Contrast,
    between,
    everywhere,
    verdict,
)
from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.analysis.results import Cell, Results
from streamnorm_lab.commands.main import main
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.experiments.catalogue import EXPERIMENTS
from streamnorm_lab.reports.overview import describe, load_overview, tightest

BATCH, ONLINE = Setting(4, 1), Setting(1, 4)


@pytest.fixture
def root(finished, tmp_path):
    """A folder with one result folder, of two settings: 4x1 and 1x4."""
    shutil.copytree(finished, tmp_path / "all" / "online-fc-digits")
    return tmp_path / "all"


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ((0.60, 0.61, 0.62), HOLDS),  # ahead by 10 points at every seed
        ((0.50, 0.51, 0.52), HOLDS),  # equal, and up to 1 point behind is allowed
        ((0.48, 0.49, 0.50), FALSE),  # behind by 2 points at every seed
        ((0.48, 0.51, 0.54), OPEN),  # equal on average, and uncertain by more than the bound
    ],
)
def test_a_contrast_is_judged_by_the_interval_of_the_paired_difference(root, ours, expected):
    folder = root / "online-fc-digits"
    set_scores(folder, {"layer": (0.50, 0.51, 0.52)}, setting="4x1")
    set_scores(folder, {"streaming-l1": ours}, setting="4x1")
    results = open_results(folder)
    contrast = Contrast(results, results.cells["streaming-l1", BATCH], results.cells["layer", BATCH], -0.01)
    assert contrast.verdict == expected
    assert contrast.ahead is not None
    assert contrast.ahead.mean == pytest.approx(sum(ours) / 3 - 0.51)


def test_what_cannot_train_is_behind_what_can(root):
    results = open_results(root / "online-fc-digits")
    batch, streaming = results.cells["batch", ONLINE], results.cells["streaming-l1", ONLINE]
    assert Contrast(results, streaming, batch, 0.5).verdict == HOLDS
    assert Contrast(results, batch, streaming, -0.5).verdict == FALSE
    assert describe(Contrast(results, streaming, batch, 0)) == "Streaming L1 − Batch at 1×4: Batch cannot train"


def test_a_loss_is_ahead_when_it_is_lower(root, monkeypatch):
    results = open_results(root / "online-fc-digits")
    left, right = results.cells["streaming-l1", BATCH], results.cells["layer", BATCH]
    plain = Contrast(results, left, right, 0).ahead
    monkeypatch.setattr(results.experiment, "score", EXPERIMENTS["char-gru"].score)
    turned = Contrast(results, left, right, 0).ahead
    assert plain is not None
    assert turned == (-plain.mean, plain.half)
    assert describe(Contrast(results, left, right, 0)).startswith("Layer − Streaming L1 at")


def test_one_seed_decides_nothing(root):
    folder = root / "online-fc-digits"
    for seed in (1, 2):
        for path in (folder / "logs" / "final").glob(f"*seed{seed}.jsonl"):
            path.unlink()
    results = open_results(folder)
    contrast = Contrast(results, results.cells["streaming-l1", BATCH], results.cells["layer", BATCH], -1)
    assert contrast.verdict == OPEN
    assert "(one seed)" in describe(contrast)


def test_a_claim_falls_with_one_contrast_and_stays_open_with_one(root):
    results = open_results(root / "online-fc-digits")
    batch, streaming = results.cells["batch", ONLINE], results.cells["streaming-l1", ONLINE]
    holds, false = Contrast(results, streaming, batch, 0), Contrast(results, batch, streaming, 0)
    assert verdict([holds, holds]) == HOLDS
    assert verdict([holds, false]) == FALSE
    assert tightest([holds, false]) is false


def test_contrasts_are_taken_where_both_were_run(root):
    results = open_results(root / "online-fc-digits")
    found = list(everywhere("streaming-l1", "layer", "online", above=0)(results))
    assert [(c.ours.setting, c.theirs.method.name) for c in found] == [(BATCH, "layer"), (ONLINE, "layer")]
    assert [c.ours.setting for c in everywhere("streaming-l1", "layer", above=0, most=1)(results)] == [ONLINE]
    assert [c.ours.setting for c in everywhere("streaming-l1", "layer", above=0, least=2)(results)] == [BATCH]
    (pair,) = between("layer", ("1x4", "4x1"), ("2x1", "4x1"), above=0)(results)
    assert (pair.ours.setting, pair.theirs.setting) == (ONLINE, BATCH)


def test_every_claim_asks_for_methods_and_settings_that_there_are():
    """Each claim finds something in each of its experiments, once all methods are run at the default settings."""
    for claim in CLAIMS:
        for name in claim.experiments:
            experiment = EXPERIMENTS[name]
            options = experiment()
            settings = tuple(Setting.parse(text) for text in options.settings)
            methods = tuple(experiment.catalogue[name] for name in {*experiment.catalogue, *options.methods})
            cells = {(m.name, s): Cell(m, s, {}, 0.1, {0: 0.5, 1: 0.6}, (), None) for m in methods for s in settings}
            results = Results(experiment, {}, (), methods, settings, cells)
            found = list(claim.contrasts(results))
            assert found, claim.text
            assert {contrast.verdict for contrast in found} <= {HOLDS, FALSE, OPEN}


def test_the_page_over_all_results(root, capsys):
    folder = root / "online-fc-digits"
    for method, values in (("layer", (0.9, 0.91, 0.92)), ("streaming-l1", (0.5, 0.51, 0.52))):
        for setting in ("4x1", "1x4"):
            set_scores(folder, {method: values}, setting=setting)
    before = (folder / "report.html").read_bytes()
    assert main(["report", str(root)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "does not hold" in said
    page = Page((root / "report.html").read_text())
    text = " ".join(" ".join(page.words).split())
    assert "Streaming L1 − Layer at 4×1: −40.0 [−40.0, −40.0] points, bound −0.5" in text
    standings = load_overview(root).standings
    count = sum(standing.verdict == UNMEASURED for standing in standings)
    assert f"{count} are not measured" in text
    assert f"Of {len(standings)} claims" in text
    assert len(re.findall(r'<details class="claim"', (root / "report.html").read_text())) == len(standings)
    assert "threads 1" in text
    assert "streamnorm run online-fc" in text
    assert not page.sources
    files = {link for link in page.links if not link.startswith("#")}
    assert files == {"online-fc-digits/report.html", "online-fc-digits/figures/summary.svg"}
    assert all((root / link).exists() for link in files)
    anchors = {link for link in page.links if link.startswith("#")}
    assert all(f'id="{link[1:]}"' in (root / "report.html").read_text() for link in anchors)
    assert (folder / "report.html").read_bytes() == before
    measured = {m.claim.text: m.verdict for m in load_overview(root).measured}
    assert measured[next(claim.text for claim in CLAIMS if "at least as well as Layer" in claim.text)] == FALSE


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path)]) == 2
    assert "name a folder that `streamnorm run` wrote" in capsys.readouterr().err


def test_the_experiments_that_a_page_leads_to_are_built(root):
    (root / "online-fc-digits" / "report.html").unlink()
    assert main(["report", str(root)]) == 0
    assert (root / "online-fc-digits" / "report.html").exists()
