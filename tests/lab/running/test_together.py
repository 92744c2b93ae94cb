"""One training in several processes, started by torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from streamnorm_lab.logs.packed import read_runs
from streamnorm_lab.logs.runlog import RunLog, read_log

SMALL = [
    *("run", "online-fc", "--methods", "layer", "batch", "--settings", "8x1", "4x2"),
    *("--rates", "0.01", "--seeds", "1", "--limit", "64", "--validation", "32", "--width", "16", "--depth", "2"),
    *("--points", "2", "--jobs", "1"),
]


# The command, and what it leaves: a thread of gloo that drops a tensor while Python ends aborts the process.
COMMAND = """
import sys
from pathlib import Path
from streamnorm_lab.commands.main import main

code = main(sys.argv[1:])
threads = {(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")}
sys.exit("gloo is still there" if any("gloo" in thread for thread in threads) else code)
"""


def together(*words: str | Path) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*torchrun, sys.executable, "-c", COMMAND, *SMALL, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same experiment in two processes and alone."""
    shared, alone = (tmp_path_factory.mktemp("together") / name for name in ("shared", "alone"))
    done = together("--out", shared)
    assert done.returncode == 0, done.stderr
    subprocess.run([sys.executable, "-m", "streamnorm", *SMALL, "--out", alone], check=True, capture_output=True)
    return shared, alone


def log_of(folder: Path, name: str):
    logged = read_log(folder / "logs" / "final" / f"{name}_rate0.01_seed0.jsonl")
    assert logged is not None
    assert logged.end is not None
    return logged


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["8x1", "4x2"])
def test_without_statistics_of_the_mini_batch_it_is_the_same_training(folders, setting):
    shared, alone = (log_of(folder, f"layer_{setting}") for folder in folders)
    assert shared.header["environment"]["processes"] == "2"
    assert "processes" not in alone.header["environment"]
    assert shared.end["scores"]["layer"]["loss"] == pytest.approx(alone.end["scores"]["layer"]["loss"], rel=1e-4)
    for ours, theirs in zip(shared.points, alone.points, strict=True):
        assert ours["images"] == theirs["images"]
        assert ours["train"] == pytest.approx(theirs["train"], rel=1e-4)


@pytest.mark.slow
def test_each_process_has_statistics_of_its_share(folders):
    """Two processes at 8×1 learn what one learns at 4×2, by Batch Normalization too."""
    shared, alone = log_of(folders[0], "batch_8x1"), log_of(folders[1], "batch_4x2")
    loss = "batch-recalibrated"  # the running statistics are those of one share
    assert shared.end["scores"][loss]["loss"] == pytest.approx(alone.end["scores"][loss]["loss"], rel=1e-4)


@pytest.mark.slow
def test_the_same_command_makes_up_what_is_missing(folders):
    shared, _ = folders
    path = shared / "logs" / "final" / "layer_8x1_rate0.01_seed0.jsonl"
    before = {log.header["run"]["method"]: log.points for log in read_runs(shared)}
    path.unlink()
    assert together("--out", shared).returncode == 0
    assert {log.header["run"]["method"]: log.points for log in read_runs(shared)} == before


@pytest.mark.slow
def test_mini_batches_that_cannot_be_shared_are_refused(tmp_path):
    done = together("--out", tmp_path / "out", "--settings", "8x1", "1x8")
    assert done.returncode != 0
    assert "setting 1x8: 2 processes cannot share its mini-batches equally" in done.stderr
    assert not (tmp_path / "out").exists()


def test_alone_nothing_is_shared(tmp_path):
    from streamnorm_lab.running import together as module

    module.check(["1x1", "3x2"])
    with module.joined() as leads:
        assert leads
        assert module.count() == 1
        assert module.described() == {}
    assert RunLog(tmp_path / "log.jsonl", {}).start() is None
