"""The experiments with convolutional networks."""

from __future__ import annotations

import pytest
import torch

from streamnorm.cli import main
from streamnorm.experiments.catalogue import find
from streamnorm.experiments.results import load_results

SMALL = [
    *("--methods", "batch", "layer", "streaming-l1", "--settings", "8x1", "1x1", "--rates", "0.01"),
    *("--seeds", "1", "--limit", "64", "--validation", "32", "--width", "2", "--points", "2", "--jobs", "2"),
]


@pytest.mark.parametrize("name", ["conv"])
def test_a_whole_experiment_at_the_smallest_size(tmp_path, name):
    assert main(["run", name, *SMALL, "--out", str(tmp_path)]) == 0
    results = load_results(tmp_path)
    assert len(results.settings) == 2
    assert all(cell.scores for cell in results.cells.values())
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["conv"])
def test_a_width_below_one_is_refused(name, capsys):
    assert main(["run", name, "--width", "0"]) == 2
    assert "--width 0: must be at least 1" in capsys.readouterr().err


def test_convolutions_lie_channels_last(data):
    model = find("conv")().model(data, "streaming-l1")
    weights = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert len(weights) == 6
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
