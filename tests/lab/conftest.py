"""A small finished experiment, made once, and a small data set."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from streamnorm_lab.commands.main import main
from streamnorm_lab.data.images import Data, load, prepare
from streamnorm_lab.data.sources import digits
from streamnorm_lab.experiments.experiment import Experiment
from streamnorm_lab.experiments.online_fc import OnlineFC

SMALL = [
    *("--methods", "batch", "layer", "streaming-l1"),
    *("--settings", "4x1", "1x4"),
    *("--rates", "0.003", "0.03"),
    *("--seeds", "3", "--limit", "64", "--validation", "32", "--width", "16", "--depth", "2", "--points", "4"),
    *("--jobs", "2"),
]


@pytest.fixture(scope="session")
def small_command() -> list[str]:
    return ["run", "online-fc", *SMALL]


@pytest.fixture(scope="session")
def _finished_once(tmp_path_factory: pytest.TempPathFactory, small_command: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "out"
    assert main([*small_command, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def finished(_finished_once: Path, tmp_path: Path) -> Path:
    """A folder with a finished experiment, for this test alone."""
    return Path(shutil.copytree(_finished_once, tmp_path / "finished"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """96 digits to train on, 64 to validate on."""
    folder = tmp_path_factory.mktemp("data")
    prepare(digits(), 96, 64, folder)
    return load(folder)


@pytest.fixture
def make_experiment() -> Callable[..., Experiment]:
    def make(**options: object) -> Experiment:
        return OnlineFC(**{"width": 16, "depth": 2, "points": 4, **options})  # type: ignore[arg-type]

    return make
