"""Logs of finished runs in one file: the very lines, read and continued like files of their own."""

from __future__ import annotations

import csv
import gzip
import io
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.commands.main import main
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.logs.packed import PACKED, pack, read_packed, read_runs
from streamnorm_lab.reports.overview import claim_rows, load_overview
from streamnorm_lab.reports.report import build_report
from streamnorm_lab.reports.tables import as_csv, result_rows

RESULTS = Path(__file__).parents[3] / "results"
FOLDERS = sorted(path.parent for path in RESULTS.glob("**/experiment.json"))

needs_results = pytest.mark.skipif(not FOLDERS, reason="a source distribution holds no results")


def content(folder: Path) -> bytes:
    return gzip.decompress((folder / PACKED).read_bytes())


def test_packed_are_the_very_lines_in_the_order_of_their_names(finished):
    before = b"".join(path.read_bytes() for path in sorted((finished / "logs").rglob("*.jsonl")))
    runs = read_runs(finished)
    assert pack(finished) == (len(runs), 0)
    assert content(finished) == before
    assert not (finished / "logs").exists()
    assert [(run.header, run.points, run.end) for run in read_runs(finished)] == [
        (run.header, run.points, run.end) for run in runs
    ]


def test_the_same_logs_give_the_same_file_at_any_time(finished, tmp_path):
    another = Path(shutil.copytree(finished, tmp_path / "another"))
    for path in another.rglob("*.jsonl"):
        os.utime(path, (1, 1))
    pack(finished)
    pack(another)
    assert (finished / PACKED).read_bytes() == (another / PACKED).read_bytes()


def test_the_report_is_the_same_from_packed_logs(finished):
    made = {path: path.read_bytes() for path in finished.rglob("*") if path.suffix in (".html", ".svg", ".csv")}
    pack(finished)
    for path in made:
        path.unlink()
    assert main(["report", str(finished)]) == 0
    assert {path: path.read_bytes() for path in made} == made


def test_a_sweep_continues_from_packed_logs(finished, small_command, capsys):
    """What is packed is kept; what is added are files of their own, until they are packed too."""
    pack(finished)
    before = content(finished)
    assert main([*small_command, "--out", str(finished)]) == 0
    assert capsys.readouterr().err.count("kept from before") == len(read_packed(finished))
    assert not (finished / "logs").exists()
    assert main([*small_command, "--out", str(finished), "--seeds", "4"]) == 0
    added = sorted(path.name for path in finished.rglob("*.jsonl"))
    assert added
    assert all("seed3" in name for name in added)
    assert content(finished) == before
    assert main(["pack", str(finished)]) == 0
    assert f"{len(read_packed(finished))} runs\n" in capsys.readouterr().out
    assert not (finished / "logs").exists()
    assert len(read_packed(finished)) == before.count(b'{"type": "run"') + len(added)


def test_an_unfinished_run_stays_a_file(finished):
    path = min((finished / "logs").rglob("*.jsonl"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    count = len(read_runs(finished))
    assert pack(finished) == (count - 1, 1)
    assert list(finished.rglob("*.jsonl")) == [path]
    assert len(read_runs(finished)) == count
    path.write_bytes(b"".join(lines))
    assert pack(finished) == (count, 0)


def test_a_kill_before_the_files_are_removed_loses_nothing(finished, tmp_path):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    pack(finished)
    shutil.copy(finished / PACKED, copy / PACKED)
    assert len(read_runs(copy)) == len(read_runs(finished))
    pack(copy)
    assert (copy / PACKED).read_bytes() == (finished / PACKED).read_bytes()
    assert not (copy / "logs").exists()


def test_a_log_that_differs_from_the_packed_one_is_not_removed(finished):
    path = min((finished / "logs").rglob("*.jsonl"))
    log = path.read_bytes()
    pack(finished)
    path.parent.mkdir(parents=True)
    path.write_bytes(log.replace(b'"seconds": ', b'"seconds": 1'))
    with pytest.raises(UserError, match=r"tells of another log of this run"):
        pack(finished)
    assert path.exists()


def test_a_log_under_another_name_is_not_packed(finished):
    path = min((finished / "logs").rglob("*.jsonl"))
    path.rename(path.with_name("another.jsonl"))
    with pytest.raises(UserError, match=r"another\.jsonl: the name or"):
        pack(finished)


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"text", lambda b: b[:100] + b"\0" * 9 + b[109:]])
def test_a_damaged_file_is_one_clear_line(finished, capsys, damage):
    pack(finished)
    path = finished / PACKED
    path.write_bytes(damage(path.read_bytes()))
    assert main(["report", str(finished)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert f"{path} is damaged" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1:], "line 1: a log is one line of type 'run', then"),
        (lambda lines: [*lines, lines[0]], "begins a run that is not finished, or is there twice"),
        (lambda lines: lines + lines, "begins a run that is not finished, or is there twice"),
        (lambda lines: [*lines[:3], b"5", *lines[3:]], "line 4: it must be an object, not 5"),
    ],
)
def test_lines_of_another_form_are_named(finished, change, message):
    pack(finished)
    lines = content(finished).splitlines(keepends=True)
    (finished / PACKED).write_bytes(gzip.compress(b"".join(line.rstrip() + b"\n" for line in change(lines))))
    with pytest.raises(UserError, match=message) as error:
        open_results(finished)
    assert str(finished / PACKED) in str(error.value)


def test_a_small_file_that_would_fill_memory(finished, monkeypatch):
    monkeypatch.setattr("streamnorm_lab.logs.packed.LARGEST", 1000)
    pack(finished)
    with pytest.raises(UserError, match="holds more than 1,000 bytes"):
        read_packed(finished)


@pytest.mark.parametrize("words", [["pack"], ["pack", "--help"]])
def test_pack_explains_itself(capsys, words):
    with pytest.raises(SystemExit):
        main(words)
    assert "usage: streamnorm pack FOLDER" in capsys.readouterr().out


def test_what_is_no_result_is_not_packed(tmp_path, capsys):
    assert main(["pack", str(tmp_path)]) == 2
    assert "it holds no experiment.json" in capsys.readouterr().err


def numbers(text: str) -> list[list[float | str]]:
    """A CSV file cell by cell."""

    def cell(word: str) -> float | str:
        try:
            return float(word)
        except ValueError:
            return word

    return [[cell(word) for word in line] for line in csv.reader(io.StringIO(text))]


def assert_same_numbers(ours: str, theirs: str) -> None:
    """Number by number; to twelve digits, for libraries of another version may round the last ones otherwise."""
    left, right = numbers(ours), numbers(theirs)
    assert len(left) == len(right)
    for line, other in zip(left, right, strict=True):
        for one, another in zip(line, other, strict=True):
            assert one == (pytest.approx(another, rel=1e-12) if isinstance(another, float) else another)


@needs_results
def test_a_committed_page_is_rebuilt_from_its_packed_logs(tmp_path):
    """Figures, tables and page; the numbers are those that are committed."""
    committed = RESULTS / "online-fc-cifar10"
    for name in ("experiment.json", PACKED):
        shutil.copy(committed / name, tmp_path / name)
    build_report(tmp_path)
    assert_same_numbers((tmp_path / "results.csv").read_text(), (committed / "results.csv").read_text())
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"report.html", "runs.csv", "figures/summary.svg", "figures/summary.png"} <= made


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(RESULTS).as_posix())
def test_every_committed_table_is_that_of_its_logs(folder):
    assert_same_numbers(as_csv(result_rows(open_results(folder))), (folder / "results.csv").read_text())


@needs_results
def test_the_committed_claims_are_those_of_all_logs():
    assert as_csv(claim_rows(load_overview(RESULTS))) == (RESULTS / "claims.csv").read_text()


def test_results_are_few_files():
    """No log of a single run, and nothing that a command can build."""
    git = shutil.which("git")
    if git is None or not (RESULTS.parent / ".git").exists():
        pytest.skip("not a checkout of git")
    done = subprocess.run([git, "ls-files", "results"], cwd=RESULTS.parent, capture_output=True, text=True, check=True)
    listed = done.stdout.split()
    allowed = {".json", ".gz", ".csv", ".svg", ".txt"}
    others = [path for path in listed if Path(path).suffix not in allowed]
    assert not others
    assert len(listed) < 400
    assert not [path for path in listed if path.endswith(("runs.csv", "report.html"))]
    assert sum((RESULTS.parent / path).stat().st_size for path in listed) < 15e6
