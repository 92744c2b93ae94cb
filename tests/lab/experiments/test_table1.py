"""The paper's table 1: what is run for each cell, and the criterion."""

from __future__ import annotations

import csv
import json
import math
import shutil

import pytest

from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.analysis.table1 import CRITERION, gain, judge, verdict
from streamnorm_lab.commands.main import main
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.experiments.table1 import PARTS, SCENARIOS, TECHNIQUES, Table1
from streamnorm_lab.reports.table1 import agrees, claimed


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All parts, as small as they can be."""
    monkeypatch = pytest.MonkeyPatch()
    parts = Table1.parts

    def small(self):
        for part in parts(self):
            shrunk = {"rates": part.rates[1:2], "points": 1, "validation": 16, "width": 4, "hidden": 6, "steps": 5}
            shrunk |= {"sample": 1, "curve_characters": 20, "curve_images": 10}
            options = vars(part) | {name: value for name, value in shrunk.items() if name in vars(part)}
            if part.name == "char-rnn":
                options["limit"] = 2000
            yield type(part)(**options)

    monkeypatch.setattr(Table1, "parts", small)
    folder = tmp_path_factory.mktemp("table1") / "out"
    words = ["run", "table1", "--limit", "64", "--updates", "3", "--seeds", "2", "--jobs", "1", "--out", str(folder)]
    assert main(words) == 0
    monkeypatch.undo()
    return folder


def test_every_cell_is_judged_from_its_runs(finished):
    judgements = judge(finished)
    assert list(judgements) == list(SCENARIOS)
    for scenario, row in judgements.items():
        assert list(row) == list(TECHNIQUES)
        assert all(str(judged.cell.setting) == scenario.setting for judged in row.values())
        shares = {name: judged.share for name, judged in row.items() if judged.share is not None}
        assert max(shares.values()) in (0, pytest.approx(1))
        assert all(row[name].verdict == verdict(share) for name, share in shares.items())
    online = judgements[SCENARIOS[4]]
    assert online["batch"].verdict == online["batch-per-step"].verdict == "fails"
    assert "more than 1 value" in (online["batch"].cell.reason or "")


def test_gain_is_the_distance_from_guessing(finished):
    for name, sign in (("conv", 1), ("char-rnn", -1)):
        results = open_results(finished / name)
        cell = results.cells["layer", Setting(32, 1)]
        classes = results.config["data"]["classes"]
        assert cell.mean is not None
        guess = 1 / classes if sign == 1 else math.log(classes)
        assert gain(results, cell) == pytest.approx(sign * (cell.mean.mean - guess))


def test_the_criterion():
    assert [verdict(share) for share in (1, 0.95, 0.949, 0.5, 0.49, -1, None)] == [
        *("works", "works", "suboptimal", "suboptimal", "fails", "fails", "fails")
    ]


def test_the_page_and_the_csv_tell_the_same(finished, capsys):
    assert main(["report", str(finished)]) == 0
    assert "of 28 cells are as in the paper" in capsys.readouterr().out.replace("\n", " ")
    page = (finished / "report.html").read_text()
    with open(finished / "table1.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 28
    assert page.count("<td") == 28
    for kind in ("works", "suboptimal", "fails"):
        assert page.count(f">{kind}</b>") == sum(row["verdict"] == kind for row in rows)
    assert CRITERION in page
    for part in ("online-fc", "conv", "recurrent-conv", "char-rnn"):
        assert (finished / part / "report.html").exists()
        assert f'href="{part}/report.html"' in page


def test_the_papers_judgement_as_our_documentation_tells_it():
    """Streaming works everywhere; Layer works but for what is convolutional; Batch needs feedforward networks."""
    table = {name: [claimed(scenario, name) for scenario in SCENARIOS] for name in TECHNIQUES}
    assert set(table["streaming-l1"]) == {"works"}
    convolutional = ["conv" in scenario.experiment for scenario in SCENARIOS]
    assert [claim == "suboptimal" for claim in table["layer"]] == convolutional
    assert table["batch"] == ["works", "fails", "works", "fails", "fails", "suboptimal", "fails"]


def test_a_limited_technique_counts_as_met_where_it_works(finished):
    judged = judge(finished)[SCENARIOS[0]]["layer"]
    assert agrees(judged, "limited") is (judged.verdict == "works")
    assert agrees(judged, judged.verdict)


def test_over_all_results_it_is_one_more_claim(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "all" / "the-table")
    assert main(["report", str(tmp_path / "all")]) == 0
    row = next(
        line for line in (tmp_path / "all" / "report.html").read_text().split("<tr>") if "every scenario" in line
    )
    holds = all(cells["streaming-l1"].verdict == "works" for cells in judge(finished).values())
    assert f">{'holds' if holds else 'does not hold'}</b>" in row
    assert 'href="the-table/report.html"' in row
    assert "of 28 cells are as in the paper" in row


@pytest.fixture
def elsewhere(finished, tmp_path):
    """The parts, each where it was run by itself."""
    names = {"online-fc": "one", "conv": "two", "recurrent-conv": "three", "char-rnn": "four"}
    for name, place in names.items():
        shutil.copytree(finished / name, tmp_path / place)
    return [str(tmp_path / place) for place in names.values()]


def test_it_judges_experiments_that_were_run_before(finished, elsewhere, tmp_path, capsys):
    assert main(["run", "table1", "--results", *reversed(elsewhere), "--out", str(tmp_path / "table")]) == 0
    table = tmp_path / "table"
    assert (table / "table1.csv").read_text() == (finished / "table1.csv").read_text()
    assert {path.name for path in table.iterdir()} == {"table1.json", "table1.csv", "report.html"}
    page = (table / "report.html").read_text()
    assert 'href="../three/report.html">recurrent-conv</a>. Images: ' in page
    (table / "table1.csv").unlink()
    assert main(["report", str(table)]) == 0
    assert (table / "table1.csv").exists()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [((0, 1, 2), "no folder of char-rnn"), ((0, 1, 2, 3, 1), "a second one of conv")],
)
def test_the_folders_to_judge_are_one_of_each_part(elsewhere, tmp_path, capsys, chosen, message):
    folders = [elsewhere[i] for i in chosen]
    assert main(["run", "table1", "--results", *folders, "--out", str(tmp_path / "table")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "table").exists()


def test_a_part_without_results_is_named(finished, tmp_path, capsys):
    (tmp_path / "table1.json").write_text(json.dumps({"commands": [], "parts": {name: name for name in PARTS}}))
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path / 'online-fc'}: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "it must be an object, not []"),
        ('{"commands": [], "parts": {"conv": 5}}', "parts.conv must be a text, not 5"),
        ('{"commands": [], "parts": {"conv": "conv"}}', "parts must name online-fc, char-rnn, conv, recurrent-conv"),
        ('{"parts": {}}', "it lacks 'commands'"),
    ],
)
def test_a_table_of_another_form_is_named(tmp_path, capsys, text, message):
    (tmp_path / "table1.json").write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert f"{tmp_path / 'table1.json'}" in said
    assert message in said


def test_a_part_that_is_another_experiment_is_named(finished, tmp_path, capsys):
    parts = {name: str(finished / name) for name in PARTS} | {"conv": str(finished / "online-fc")}
    (tmp_path / "table1.json").write_text(json.dumps({"commands": [], "parts": parts}))
    assert main(["report", str(tmp_path)]) == 2
    assert "the part conv holds online-fc" in capsys.readouterr().err


def test_a_mistake_is_found_before_anything_is_run(tmp_path, capsys):
    assert main(["run", "table1", "--text", "nowhere.txt", "--out", str(tmp_path / "out")]) == 2
    assert "nowhere.txt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
