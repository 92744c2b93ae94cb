"""``streamnorm compare`` from an empty folder: a network of ten lines, its report, one clear line for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.lab import Page

from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.commands.main import main
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.logs.packed import read_runs

MINE = """
from torch import nn

def build(norm):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), norm(4, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(36, 16), norm(16, 0), nn.ReLU(),
        nn.Linear(16, 10),
    )
"""

OTHERS = """
import torch
from torch import nn

number = 5

def data():
    inputs, labels = torch.randn(48, 3, 20), torch.arange(48) % 2
    inputs[labels == 1] += 1
    return torch.utils.data.TensorDataset(inputs, labels), list(zip(inputs[:8], labels.tolist()))

def sequences(norm):
    return nn.Sequential(nn.Conv1d(3, 4, 5), norm(4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))

def nothing(norm):
    norm(3, 2)

def lacks(norm):
    return norm(64)

def dimensions(norm):
    return norm(64, 7)

def fails(norm):
    return {}["missing"]

def plain(norm):
    return nn.Linear(64, 10)

def frozen(norm):
    return nn.Sequential(nn.Flatten(), norm(64, 0), nn.Linear(64, 10)).requires_grad_(False)

def misfit(norm):
    return nn.Sequential(nn.Flatten(), nn.Linear(63, 10), norm(10, 0))

def few(norm):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), norm(5, 0))

class Named(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm(64, 0)

    def forward(self, x):
        return {"logits": self.norm(x.flatten(1))}
"""

SMALL = [
    *("--methods", "batch", "streaming-l1", "--settings", "4x1", "1x2", "--rates", "0.001", "0.01"),
    *("--seeds", "2", "--limit", "64", "--validation", "32", "--points", "4", "--jobs", "1", "--out", "out"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that holds two modules and nothing else, and from which Python imports no others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "others.py").write_text(OTHERS)
    yield tmp_path
    for name in ("mine", "others", "damaged", "needy"):
        sys.modules.pop(name, None)


def test_a_network_of_ten_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tuned, run with several seeds, and reported; the same command again does nothing, and more seeds are added."""
    assert main(["compare", "mine:build", *SMALL]) == 0
    results = open_results(folder / "out")
    assert [method.name for method in results.methods] == ["batch", "batch-recalibrated", "streaming-l1"]
    cell = results.cells["streaming-l1", Setting(4, 1)]
    assert len(cell.scores) == 2
    assert list(cell.tuning) == [0.004, 0.04]
    assert list(results.cells["streaming-l1", Setting(1, 2)].tuning) == [0.002, 0.02]
    assert results.grid == [0.001, 0.01]
    assert results.cells["batch", Setting(1, 2)].reason is not None
    words = " ".join(Page((folder / "out/report.html").read_text()).words)
    assert "what mine:build builds" in words
    assert "0.001, 0.01, times the samples of a weight update" in words

    before = [log.header for log in read_runs(folder / "out")]
    (folder / "mine.py").write_text("# A comment changes nothing.\n" + MINE)
    assert main(["compare", "mine:build", *SMALL, "--seeds", "3"]) == 0
    after = [log.header for log in read_runs(folder / "out")]
    assert all(header in after for header in before)
    assert len(open_results(folder / "out").cells["streaming-l1", Setting(4, 1)].scores) == 3

    capsys.readouterr()
    (folder / "mine.py").write_text(MINE.replace("16", "24"))
    assert main(["compare", "mine:build", *SMALL]) == 2
    assert capsys.readouterr().err == (
        "streamnorm: out holds runs of other code of mine:build: choose another folder with --out\n"
    )


def test_from_a_terminal_in_a_folder_that_holds_nothing_else(folder: Path) -> None:
    """As the installed command does it, whose own folder comes first among those of modules."""
    code = "import sys; sys.path.remove(''); from streamnorm_lab.commands.main import main; sys.exit(main())"
    words = [*SMALL[:-2], "--methods", "group", "--settings", "8x1", "--rates", "0.001", "--seeds", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", "mine:build", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "runs/compare-build-digits/report.html").exists()
    assert "Report: runs/compare-build-digits/report.html" in done.stdout


def test_data_of_ones_own_that_are_no_images(folder: Path) -> None:
    small = ["--methods", "layer", "streaming-l2,window=50", "--settings", "4x1", "--rates", "0.001", "--seeds", "1"]
    sizes = ["--limit", "36", "--validation", "12", "--points", "2", "--jobs", "1"]
    assert main(["compare", "others:sequences", "--data", "others:data", *small, *sizes]) == 0
    results = open_results(folder / "runs/compare-sequences-data")
    assert results.config["data"]["dtype"] == "float32"
    assert results.config["data"]["classes"] == 2
    assert "Inputs are as the data sets give them" in " ".join(results.protocol)


def test_as_many_samples_as_fit_into_the_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command goes on with as many as it had chosen first, however fast the machine is then."""
    words = ["compare", "mine:build", *SMALL, "--limit", "800", "--minutes"]
    assert main([*words, "0.3"]) == 0
    limit = json.loads((folder / "out/experiment.json").read_text())["options"]["limit"]
    assert 40 <= limit <= 800
    assert f"Within 0.3 minutes: {limit:,} training samples a pass" in capsys.readouterr().err
    assert main([*words, "0.3"]) == 0
    assert "Within" not in capsys.readouterr().err
    assert main([*words, "0.00001", "--out", "another"]) == 2
    error = capsys.readouterr().err
    assert "--minutes 1e-05: even with 10 weight updates a run it would take about" in error
    assert len(error.splitlines()) == 1


MISTAKES = [
    (["mine"], "'mine' is not of the form MODULE:FUNCTION: write mine:build"),
    (["mine.py:build"], "mine.py:build: there is no module 'mine.py', write mine:build"),
    (["mined:build"], "mined:build: there is no module 'mined', looked in "),
    (["mine:biuld"], "mine:biuld: there is no function 'biuld'; did you mean 'build'?"),
    (["others:number"], "others:number: number is no function, it is of type int"),
    (["damaged:f"], "damaged:f: importing it raises SyntaxError: invalid syntax (damaged.py, line 1)"),
    (["needy:f"], "needy:f: needy imports 'nosuchpackage', which is not installed"),
    (["others:nothing"], "others:nothing returns nothing, and must return a torch.nn.Module"),
    (["others:lacks"], "TypeError: norm() missing 1 required positional argument: 'dimensions' (others.py, line "),
    (["others:dimensions"], "norm(channels, dimensions): dimensions is 0, 1, 2 or 3, got 7 (others.py, line "),
    (["others:fails"], "others:fails: calling it raises KeyError: 'missing' (others.py, line "),
    (["others:plain"], "others:plain does not call its argument: norm(channels, dimensions) gives a normalization"),
    (["others:frozen"], "others:frozen returns a network without parameters to train"),
    (["others:misfit"], "the network does not take inputs of shape (4, 1, 8, 8): RuntimeError: mat1 and mat2"),
    (["others:few"], "gives numbers of shape (4, 5); needed is (4, 10), one for each of the 10 classes"),
    (["others:Named"], "others:Named: the network gives a dict, and must give one tensor"),
    (["mine:build", "--data", "nowhere"], "--data nowhere: no such folder"),
    (["mine:build", "--data", "others:number"], "others:number: number is no function"),
    (["mine:build", "--minutes", "-1"], "--minutes -1: must be above 0"),
    (["mine:build", "--methods", "bach"], "unknown method 'bach' (did you mean 'batch'?)"),
]


@pytest.mark.parametrize(
    ("words", "message"), MISTAKES, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (folder / "damaged.py").write_text("def f(:")
    (folder / "needy.py").write_text("import nosuchpackage")
    before = {path.name for path in folder.iterdir()}
    assert main(["compare", *words, "--out", "made"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == before


def test_what_no_normalization_can_take_is_said_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "others.py").write_text("""
from torch import nn

def build(norm):
    return nn.Sequential(nn.Flatten(), norm(64, 2), nn.Linear(64, 10))
""")
    assert main(["compare", "others:build", "--methods", "batch", "streaming-l1", "--out", "made"]) == 2
    assert "does not take inputs of shape (4, 1, 8, 8): ValueError: expected 4D input" in capsys.readouterr().err
