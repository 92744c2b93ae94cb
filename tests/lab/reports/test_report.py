"""Figures, tables, sentences and the page, made from logs alone."""

from __future__ import annotations

import csv
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise

import pytest
from PIL import Image
from support.lab import Page, change_logs, set_scores

from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.analysis.headline import headline
from streamnorm_lab.analysis.verdict import sentences, warnings
from streamnorm_lab.commands.main import main
from streamnorm_lab.common.stats import paired
from streamnorm_lab.reports.figures import _apart


def test_report_is_the_same_made_from_the_logs_anew(finished):
    made = {path: path.read_bytes() for path in finished.rglob("*") if path.suffix in (".html", ".svg", ".csv", ".png")}
    assert len(made) == 9
    shutil.rmtree(finished / "figures")
    for path in ("report.html", "results.csv", "runs.csv"):
        (finished / path).unlink()
    assert main(["report", str(finished)]) == 0
    assert {path: path.read_bytes() for path in made} == made


def test_figures_can_be_read_as_images(finished):
    for name in ("summary", "curves", "rates"):
        with Image.open(finished / "figures" / f"{name}.png") as image:
            assert image.width > 900
        assert ET.parse(finished / "figures" / f"{name}.svg").getroot().tag.endswith("svg")


def test_page_is_self_contained_and_says_what_was_run(finished, small_command):
    text = (finished / "report.html").read_text()
    page = Page(text)
    words = " ".join(page.words)
    assert not page.sources
    files = {link for link in page.links if not link.startswith("#")}
    assert files == {f"figures/{name}.svg" for name in ("summary", "curves", "rates")}
    assert all(f'id="{link[1:]}"' in text for link in page.links if link not in files)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "streamnorm run online-fc --methods batch layer streaming-l1" in words
    assert "Recalibrated Batch" in words
    assert "Expected more than 1 value per channel" in words
    assert "first 64" in words
    assert "torch 2." in words
    assert "None" not in words
    assert "nan" not in words


def test_csv_files_hold_the_numbers_of_the_logs(finished):
    results = open_results(finished)
    with open(finished / "results.csv", newline="") as file:
        rows = {(row["method"], row["setting"]): row for row in csv.DictReader(file)}
    assert len(rows) == len(results.methods) * len(results.settings) == 8
    for (name, setting), cell in results.cells.items():
        row = rows[name, str(setting)]
        if cell.mean is None:
            assert (row["status"], row["accuracy"]) == ("fails", "")
            continue
        assert float(row["accuracy"]) == cell.mean.mean
        assert float(row["half_interval"]) == cell.mean.half
        assert float(row["rate"]) == cell.rate
        difference = paired(cell.accuracy, results.cells["layer", setting].accuracy)
        assert difference is not None
        assert float(row["difference_to_layer"]) == difference.mean
    with open(finished / "runs.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    ends = [run.end for run in results.logs if run.end is not None]
    assert len(runs) == sum(len(end.get("scores", [None])) for end in ends) > len(ends)


def test_verdict_says_ahead_behind_or_not_clearly_different(finished):
    set_scores(finished, {"layer": (0.5, 0.6, 0.7), "streaming-l1": (0.55, 0.66, 0.75), "batch": (0.9, 0.1, 0.5)})
    said = sentences(open_results(finished))
    assert headline(open_results(finished)) == (
        "Streaming L1 reaches a test accuracy of 65.3% with mini-batches of 4 and of 65.3% with one sample at a time, "
        "4 per weight update; Batch Normalization reaches 50.0% with mini-batches of 4 and cannot train with one "
        "sample at a time, 4 per weight update; the best of the others there is Layer Normalization with 60.0%."
    )
    assert "Streaming L1 is ahead of Layer at 4×1 and 1×4 (+5.3 points)." in said
    assert "Streaming L1 is not clearly different from Batch at 4×1 (+15.3 points)." in said
    assert any(re.fullmatch(r"Batch cannot train at 1×4: “Expected .*”\.", sentence) for sentence in said)
    set_scores(finished, {"layer": (0.8, 0.8, 0.9)})
    assert "Streaming L1 is behind Layer at 4×1 and 1×4 (−18.0 points)." in sentences(open_results(finished))


def test_verdict_counts_divergence(finished):
    def change(run, records):
        if (run["stage"], run["method"], run["setting"]) == ("final", "streaming-l1", "4x1") and run["seed"] < 2:
            records[-1]["status"] = "diverged"

    change_logs(finished, change)
    said = sentences(open_results(finished))
    assert any("Streaming L1 at 4×1 (2 of 3 runs)" in sentence for sentence in said)


def test_best_rate_at_the_edge_of_the_grid_is_warned_of(finished):
    """Two rates only: whichever is best is at an edge."""
    said = " ".join(warnings(open_results(finished)))
    assert "a better one may lie beyond" in said


def test_the_largest_rate_that_trains_is_nearer_to_the_best_score_than_to_guessing(finished):
    results = open_results(finished)
    cell = results.cells["layer", results.settings[0]]
    # Ten classes: 0.1 is guessing, and half-way to the best lies 0.5.
    tuned = replace(cell, rate=0.01, tuning={0.001: 0.3, 0.01: 0.9, 0.1: 0.51, 1.0: 0.49, 10.0: 0.1})
    assert results.largest_rate(tuned) == 0.1
    assert results.largest_rate(replace(cell, rate=None, tuning={})) is None


def test_missing_runs_and_seeds_are_warned_of(finished):
    paths = sorted((finished / "logs" / "final").glob("layer_4x1*"))
    paths[0].unlink()
    content = paths[1].read_bytes().splitlines(keepends=True)
    paths[1].write_bytes(b"".join(content[:-1]))
    said = " ".join(warnings(open_results(finished)))
    assert "1 of " in said
    assert "not finished" in said
    assert "Fewer than three seeds" in said
    assert main(["report", str(finished)]) == 0


def test_one_seed_gives_no_interval_and_no_claim(finished):
    for path in (finished / "logs" / "final").glob("*seed[12].jsonl"):
        path.unlink()
    results = open_results(finished)
    assert all("ahead" not in sentence and "behind" not in sentence for sentence in sentences(results))
    assert main(["report", str(finished)]) == 0
    assert "nan" not in (finished / "results.csv").read_text()
    words = " ".join(Page((finished / "report.html").read_text()).words)
    assert "nan" not in words
    assert "one seed, so no interval" in words
    assert "95% interval of" not in words


@pytest.mark.parametrize("values", [[0.1, 0.1, 0.1], [0.0, 0.5, 0.51, 0.52], [0.3]])
def test_labels_keep_their_distance_and_order(values):
    moved = _apart(values, 0.05)
    assert all(b - a >= 0.05 - 1e-6 for a, b in pairwise(moved))
    assert sum(moved) == pytest.approx(sum(values))


def test_a_table_says_nothing_of_a_reference_that_was_not_run(finished):
    assert "the difference to Layer" in (finished / "report.html").read_text(encoding="utf-8")
    for log in (finished / "logs").rglob("layer_*"):
        log.unlink()
    assert main(["report", str(finished)]) == 0
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "the difference to" not in page
    assert "Test accuracy in percent, mean" in page
