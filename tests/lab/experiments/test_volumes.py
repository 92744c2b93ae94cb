"""Segmentation of generated volumes: the volumes, the Dice coefficient, the network, a whole experiment."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.lab import finish, stop_after, timeless

from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.commands.main import main
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.data.images import Data
from streamnorm_lab.data.volume_task import VolumeTask
from streamnorm_lab.data.volumes import CLASSES, volumes
from streamnorm_lab.experiments.volumes import Volumes
from streamnorm_lab.logs.records import Run
from streamnorm_lab.methods.layers import METHODS
from streamnorm_lab.networks.volumes import UNet

SMALL: dict[str, Any] = {"width": 2, "edge": 8, "limit": 12, "validation": 4, "points": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("volumes")
    task = Volumes(**SMALL).task
    task.open([Setting(1, 1)]).prepare(folder)
    return task.load(folder)


def test_the_bodies_are_the_same_whatever_the_scanners() -> None:
    one, labels = volumes(8, "one", False).train(6)
    many, same = volumes(8, "many", False).train(6)
    np.testing.assert_array_equal(labels, same)
    fits = [np.polyfit(x.ravel(), y.ravel(), 1, full=True) for x, y in zip(one, many, strict=True)]
    assert all(residual < 1e-6 for _, (residual,), *_ in fits), "a gain and an offset, and nothing else"
    gains, offsets = np.array([line for line, *_ in fits]).T
    assert np.all(gains > 0)
    assert gains.std() > 0.2
    assert offsets.std() > 0.5


def test_standardized_volumes_do_not_tell_the_scanner() -> None:
    one, many = (volumes(8, scanners, True).test()[0] for scanners in ("one", "many"))
    np.testing.assert_allclose(one, many, atol=1e-5)
    np.testing.assert_allclose(one.mean((1, 2, 3, 4)), 0, atol=1e-6)
    np.testing.assert_allclose(one.std((1, 2, 3, 4)), 1, rtol=1e-5)


def test_every_volume_has_every_class_and_none_is_in_two_parts() -> None:
    source = volumes(8, "many", False)
    (train, labels), (test, _) = source.train(100), source.test()
    assert all(set(label) == set(range(CLASSES)) for label in labels)
    assert len({x.tobytes() for x in (*train, *test)}) == 100 + source.test_size
    np.testing.assert_array_equal(source.train(3)[0], train[:3])


def test_the_dice_coefficient_is_that_of_its_formula() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2 * 27, CLASSES), torch.randint(CLASSES, (2 * 27,))
    found, total = logits.argmax(1).tolist(), 0.0
    for first in (0, 27):
        mine, true = found[first : first + 27], targets[first : first + 27].tolist()
        for kind in (1, 2):
            both = sum(a == b == kind for a, b in zip(mine, true, strict=True))
            total += 2 * both / (mine.count(kind) + true.count(kind)) / 2
    assert VolumeTask.measure(logits, targets, 2)["dice"] == pytest.approx(total)
    perfect, nothing = torch.eye(CLASSES)[targets], torch.eye(CLASSES)[0 * targets]
    assert VolumeTask.measure(perfect, targets, 2)["dice"] == 2
    assert VolumeTask.measure(nothing, targets, 2)["dice"] == 0


def test_logits_are_in_the_order_of_the_labels(data: Data) -> None:
    inputs, labels = data.train.batch(torch.tensor([3, 1]))
    assert labels.tolist() == [*data.train.labels[3].tolist(), *data.train.labels[1].tolist()]
    assert data.train.count == 12 * 8**3
    model = UNet(1, CLASSES, METHODS["instance"].make, 2)
    maps: list[torch.Tensor] = []
    model.head.register_forward_hook(lambda module, given, made: maps.append(made))
    logits = model(inputs)
    assert torch.equal(logits.view(2, 8, 8, 8, CLASSES)[1, 2, 3, 4], maps[0][1, :, 2, 3, 4])


@pytest.mark.parametrize("edge", [8, 9, 11])
def test_any_edge_will_do(edge: int) -> None:
    model = UNet(1, CLASSES, METHODS["streaming-l1"].make, 2)
    assert model(torch.randn(1, 1, edge, edge, edge)).shape == (edge**3, CLASSES)


@pytest.mark.parametrize("method", ["batch", "streaming-l1"])
def test_continues_bit_for_bit_after_a_kill(data: Data, tmp_path: Path, method: str) -> None:
    experiment, run = Volumes(**SMALL, checkpoint_every=0), Run("final", method, "2x1", 0.01, 0)
    whole = finish(experiment, run, data, tmp_path / "whole.jsonl")
    stop_after(3, experiment, run, data, tmp_path / "killed.jsonl")
    assert timeless(finish(experiment, run, data, tmp_path / "killed.jsonl")) == timeless(whole)


@pytest.mark.parametrize("scanners", ["many", "one"])
def test_a_whole_experiment_at_the_smallest_size(tmp_path: Path, scanners: str) -> None:
    words = ["--methods", "batch", "instance", "streaming-l1", "--settings", "2x1", "1x1", "--jobs", "1"]
    sizes = ["--width", "2", "--edge", "8", "--limit", "12", "--validation", "4", "--points", "2", "--rates", "0.01"]
    assert main(["run", "volumes", "--scanners", scanners, *words, *sizes, "--seeds", "2", "--out", str(tmp_path)]) == 0
    results = open_results(tmp_path)
    names = [method.name for method in results.methods]
    assert names == ["batch", "batch-recalibrated", "instance", "streaming-l1"]
    assert all(0 <= score <= 1 for cell in results.cells.values() for score in cell.scores.values())
    assert results.guessing == 0
    ends = [run.end for run in results.logs if run.end is not None and run.run["stage"] == "final"]
    assert {end["voxels"] for end in ends} == {12 * 8**3}
    assert {end["voxels_evaluated"] for end in ends} == {64 * 8**3}
    assert all(math.isfinite(end["scores"][end_method]["dice"]) for end in ends for end_method in end["scores"])
    assert "dice" in (tmp_path / "runs.csv").read_text().splitlines()[0]
    assert "images" not in " ".join(results.protocol)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--edge", "4"], "--edge 4: must be at least 8 and at most 64"),
        (["--limit", "5000"], "it has 2000 training volumes"),
        (["--settings", "999x1"], "more than the 120 training volumes"),
        (["--tune-limit", "0"], "--tune-limit 0: must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "volumes", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())
