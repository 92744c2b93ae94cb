"""Runs that are watched: their pages, the index, and that nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from streamnorm.insight import Record
from streamnorm_lab.commands.main import main
from streamnorm_lab.logs.packed import read_runs
from streamnorm_lab.logs.records import Run
from streamnorm_lab.logs.runlog import RunLog
from streamnorm_lab.running.train import train
from streamnorm_lab.running.watching import watched


@pytest.fixture(scope="session")
def watched_runs(tmp_path_factory: pytest.TempPathFactory, small_command: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("watched") / "out"
    assert main([*small_command, "--watch", "--out", str(folder)]) == 0
    return folder


def test_every_run_with_streaming_layers_has_a_page(watched_runs: Path) -> None:
    pages = {path.parent.relative_to(watched_runs / "watch").as_posix() for path in watched_runs.rglob("monitor.html")}
    assert pages == {Run(**run.run).key for run in read_runs(watched_runs) if run.run["method"] == "streaming-l1"}
    index = (watched_runs / "watch" / "index.html").read_text()
    assert all(f'href="{page}/monitor.html"' in index for page in pages)
    assert "online-fc, Streaming L1 at 4×1, rate 0.03, choosing a rate" in index
    assert "reload" not in index, "nothing trains any more"


def test_a_record_is_that_of_the_run(watched_runs: Path) -> None:
    for run in read_runs(watched_runs):
        if run.run["method"] != "streaming-l1":
            continue
        record = Record.read(watched_runs / "watch" / Run(**run.run).key / "monitor.jsonl")
        assert run.end is not None
        assert record.status == "finished"
        assert record.updates == run.end["updates"] == 16
        assert [facts.channels for facts in record.layers] == [16, 16]
        samples = int(run.run["setting"].split("x")[0]) * int(run.run["setting"].split("x")[1])
        assert {reading.samples for sample in record.samples[:-1] for reading in sample.layers.values()} == {samples}


def test_the_numbers_are_the_same(watched_runs: Path, finished: Path) -> None:
    def results(folder: Path) -> list[object]:
        ends = [(run.run, {k: v for k, v in (run.end or {}).items() if k != "seconds"}) for run in read_runs(folder)]
        return [*ends, *(run.points for run in read_runs(folder))]

    assert results(watched_runs) == results(finished)


def test_a_folder_of_runs_that_were_not_watched_goes_on_watched(finished: Path, small_command: list[str]) -> None:
    """It is no other experiment; what is done is kept, and has no page."""
    assert main([*small_command, "--watch", "--out", str(finished)]) == 0
    assert not list(finished.rglob("monitor.html"))
    assert "Nothing yet" in (finished / "watch" / "index.html").read_text()


def test_a_run_that_is_killed_and_continued(data, make_experiment, tmp_path: Path, monkeypatch) -> None:
    """Its record goes on from the checkpoint, without what came after it."""
    run, experiment = Run("final", "streaming-l1", "4x1", 0.01, 0), make_experiment(checkpoint_every=0.0)
    calls = []

    def kill(*_: object) -> None:
        calls.append(0)
        if len(calls) == 15:
            raise KeyboardInterrupt

    monkeypatch.setattr("streamnorm_lab.running.train.TICK_SECONDS", 0.0)
    log = RunLog(tmp_path / "run.jsonl", {"run": vars(run)})
    with pytest.raises(KeyboardInterrupt):
        train(experiment, run, data, log, kill, watch=tmp_path / "watch")
    assert Record.read(tmp_path / "watch" / "monitor.jsonl").status == "stopped by KeyboardInterrupt"
    train(
        experiment,
        run,
        data,
        RunLog(tmp_path / "run.jsonl", {"run": vars(run)}),
        lambda *_: None,
        watch=tmp_path / "watch",
    )
    record = Record.read(tmp_path / "watch" / "monitor.jsonl")
    assert (record.status, record.updates) == ("finished", 24)
    assert [sample.update for sample in record.samples] == [1, 10, 20, 24]


def test_a_run_that_diverges(data, make_experiment, tmp_path: Path) -> None:
    run = Run("final", "streaming-l1", "4x1", 1e6, 0)
    log = RunLog(tmp_path / "run.jsonl", {"run": vars(run)})
    train(make_experiment(), run, data, log, lambda *_: None, watch=tmp_path / "watch")
    assert Record.read(tmp_path / "watch" / "monitor.jsonl").status == "stopped by Diverged"


def test_a_network_without_streaming_layers_has_no_page(tmp_path: Path) -> None:
    with watched(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), tmp_path / "watch", "a run", 0, 100):
        pass
    assert not (tmp_path / "watch").exists()


# streamnorm watch


def test_pages_are_rebuilt_from_logs(watched_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in watched_runs.rglob("*.html")}
    pages = sorted(watched_runs.rglob("monitor.html"))
    pages[0].unlink()
    assert main(["watch", str(watched_runs)]) == 0
    assert capsys.readouterr().out.strip() == str(watched_runs / "watch" / "index.html")
    for page in pages:
        assert page.exists()
        assert page not in before or page == pages[0] or page.stat().st_mtime_ns > before[page]
    assert main(["watch", str(pages[0].parent)]) == 0
    assert capsys.readouterr().out.strip() == str(pages[0])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds no monitor.jsonl"),
        (b"", "is no record of streamnorm.monitor"),
        (b"\xff\xfe\n", "monitor.jsonl"),
        (b'{"type": "monitor", "version": 1}\n', "is no record of streamnorm.monitor"),
    ],
)
def test_what_cannot_be_rebuilt_is_said_in_a_line(
    content: bytes | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "monitor.jsonl").write_bytes(content)
    assert main(["watch", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_an_index_while_runs_begin(tmp_path: Path) -> None:
    """A log that is there without a whole line is left out, and one without an end runs."""
    from streamnorm_lab.reports.watch import write_index

    head = {"type": "monitor", "version": 1, "name": "<one>", "every": 5, "started": 0, "fields": [], "layers": [{}]}
    for name, text in (("a", ""), ("b", json.dumps(head) + "\n"), ("c", json.dumps(head)[:20])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "monitor.jsonl").write_text(text)
    text = write_index(tmp_path, live=True).read_text()
    assert "&lt;one&gt;" in text
    assert "running" in text
    assert text.count("monitor.html") == 1
    assert "location.reload()" in text
