"""Runs as jobs, by submitit's local executor; and what becomes of a sweep when one of its runs fails."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.commands.main import main
from streamnorm_lab.common.files import waited_for
from streamnorm_lab.experiments.online_fc import OnlineFC
from streamnorm_lab.logs.packed import read_runs
from streamnorm_lab.logs.records import Run
from streamnorm_lab.logs.runlog import RunLog
from streamnorm_lab.running.sweep import log_header

SMALL = [
    *("run", "online-fc", "--settings", "4x1", "--rates", "0.01", "--seeds", "1", "--limit", "32"),
    *("--validation", "16"),
    *("--width", "8", "--depth", "1", "--points", "2", "--jobs", "2"),
]


def run(folder, *words):
    return main([*SMALL, "--out", str(folder), *words])


def numbers(folder):
    return {tuple(log.run.values()): (log.points, (log.end or {}).get("scores")) for log in read_runs(folder)}


def spoil_a_run(folder):
    """Leave a checkpoint that fits one run in everything but the state of its training."""
    experiment, spoiled = OnlineFC(width=8, depth=1, points=2), Run("final", "batch", "4x1", 0.01, 0)
    log = RunLog(folder / "logs" / f"{spoiled.key}.jsonl", log_header(experiment, spoiled))
    log.start()
    log.save({"seconds": 0.0})


def test_one_failed_run_is_reported_and_stops_no_other(tmp_path, capsys):
    folder = tmp_path / "out"
    spoil_a_run(folder)
    assert run(folder, "--methods", "batch", "layer") == 1
    said = capsys.readouterr()
    assert "1 runs failed; run the same command to try them again" in said.err
    (reason,) = folder.rglob("*.error.txt")
    assert "KeyError" in reason.read_text()
    results = open_results(folder)
    assert results.cells["layer", results.settings[0]].mean is not None
    assert results.cells["batch", results.settings[0]].mean is None
    assert (folder / "report.html").exists()


def test_without_submitit_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert run(tmp_path / "out", "--methods", "layer", "--launcher", "slurm") == 2
    assert 'pip install "streamnorm[slurm]"' in capsys.readouterr().err


@pytest.mark.slow
def test_jobs_give_the_numbers_of_local_processes_and_leave_nothing_else(tmp_path, capsys):
    pytest.importorskip("submitit")
    assert run(tmp_path / "local", "--methods", "layer", "batch") == 0
    assert run(tmp_path / "jobs", "--methods", "layer", "batch", "--launcher", "slurm") == 0
    assert "no SLURM here" in capsys.readouterr().err
    assert numbers(tmp_path / "jobs") == numbers(tmp_path / "local")
    assert not (tmp_path / "jobs" / "slurm").exists()


@pytest.mark.slow
def test_a_failed_job_is_reported_and_what_submitit_wrote_is_kept(tmp_path):
    pytest.importorskip("submitit")
    folder = tmp_path / "out"
    spoil_a_run(folder)
    assert run(folder, "--methods", "batch", "layer", "--launcher", "slurm") == 1
    (reason,) = folder.rglob("*.error.txt")
    assert "KeyError" in reason.read_text()
    assert open_results(folder).cells["layer", open_results(folder).settings[0]].mean is not None
    assert any((folder / "slurm").rglob("*_log.err"))


def test_a_second_job_for_a_run_waits_for_the_first(tmp_path):
    pytest.importorskip("fcntl")
    path, order, held = tmp_path / "locks" / "run", [], threading.Event()

    def first():
        with waited_for(path):
            held.set()
            time.sleep(0.3)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    held.wait()
    with waited_for(path):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
