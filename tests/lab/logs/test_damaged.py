"""Files of a finished experiment with any one value replaced by another: a report, or one line that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.lab import change_logs, replacements

from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.commands.main import main
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.experiments.adapt import Adapt
from streamnorm_lab.experiments.char import CharRNN
from streamnorm_lab.experiments.experiment import Experiment
from streamnorm_lab.reports.charts import charts
from streamnorm_lab.reports.figures import save_figures
from streamnorm_lab.reports.report import page
from streamnorm_lab.reports.tables import save_tables
from streamnorm_lab.running.sweep import run_sweep

KINDS: dict[str, Experiment[Any]] = {
    "images": Adapt(
        methods=("batch", "layer"),
        settings=("32x1",),
        rates=(0.01,),
        seeds=1,
        epochs=1,
        limit=64,
        validation=32,
        stream_images=4,
        width=2,
        points=1,
        jobs=1,
    ),
    "text": CharRNN(
        methods=("none", "batch"),
        settings=("1x1",),
        rates=(0.01,),
        seeds=1,
        limit=5000,
        updates=2,
        steps=10,
        hidden=4,
        sample=5,
        points=1,
        jobs=1,
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "out"
    experiment = type(KINDS[request.param])(**{**vars(KINDS[request.param]), "out": str(out)})
    assert run_sweep(experiment, "streamnorm run small") == (out, 0)
    return out


def report_or_refuse(folder: Path, named: str) -> bool:
    """Whether there is a report; otherwise a refusal that names the file."""
    try:
        results = open_results(folder)
        page(results)
        save_tables(results, folder)
    except UserError as error:
        said = str(error)
    else:
        return True
    assert "\n" not in said
    assert named in said or "no run is finished yet" in said
    return False


@pytest.mark.slow
def test_configuration_of_another_form(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    before = json.loads((copy / "experiment.json").read_text())
    outcomes = set()
    for changed in replacements(before):
        (copy / "experiment.json").write_text(json.dumps(changed))
        outcomes.add(report_or_refuse(copy, "experiment.json"))
    assert outcomes == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tune", "final"])
def test_logs_of_another_form(folder, tmp_path, stage):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    outcomes = set()
    for log in sorted((copy / "logs" / stage).glob("*.jsonl")):
        lines = log.read_text().splitlines()
        for number, line in enumerate(lines):
            for changed in replacements(json.loads(line)):
                rest = [*lines[:number], json.dumps(changed), *lines[number + 1 :]]
                log.write_text("\n".join(rest) + "\n")
                outcomes.add(report_or_refuse(copy, str(log)))
        log.write_text("\n".join(lines) + "\n")
    assert outcomes == {True, False}


@pytest.mark.parametrize("value", [1e299, 1e150, 0])
def test_figures_of_numbers_without_measure(finished, value):
    """What passes as a number can be drawn."""

    def change(run, records):
        for record in records:
            for scores in (record.get("train"), record.get("test"), *record.get("scores", {}).values()):
                if scores:
                    scores["loss"] = value

    change_logs(finished, change)
    results = open_results(finished)
    save_figures(charts(results), finished / "figures")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["run"].update(method="bach"), "unknown method 'bach' (did you mean 'batch'?)"),
        (lambda record: record["run"].update(method="batch-recalibrated"), "comes by itself with 'batch'"),
        (lambda record: record["run"].update(setting="04x1"), "setting '04x1' is not of the form SxU"),
        (lambda record: record.update(experiment="conv"), "it is a log of conv, in a folder of online-fc"),
    ],
)
def test_what_a_log_says_is_compared_with_the_experiment(finished, capsys, change, message):
    log = min((finished / "logs").rglob("*.jsonl"))
    first, *rest = log.read_text().splitlines()
    record = json.loads(first)
    change(record)
    log.write_text("\n".join([json.dumps(record), *rest]) + "\n")
    assert main(["report", str(finished)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert message in said
    assert str(log) in said


def test_the_log_of_another_run_is_not_taken_for_this_one(finished, small_command, capsys):
    one, another = sorted((finished / "logs" / "final").glob("layer*"))[:2]
    another.write_bytes(one.read_bytes())
    assert main([*small_command, "--out", str(finished)]) == 2
    assert f"{another}: it is the log of another run" in capsys.readouterr().err


def test_an_experiment_that_is_not_known(finished, capsys):
    path = finished / "experiment.json"
    path.write_text(path.read_text().replace('"online-fc"', '"online-fd"', 1))
    assert main(["report", str(finished)]) == 2
    assert f"{path}: unknown experiment 'online-fd' (did you mean 'online-fc'?)" in capsys.readouterr().err
