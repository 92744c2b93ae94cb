"""The experiments with convolutional networks."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import streamnorm as sn
from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.commands.main import main
from streamnorm_lab.experiments.catalogue import find
from streamnorm_lab.experiments.conv import Conv
from streamnorm_lab.experiments.lp import Lp
from streamnorm_lab.experiments.recurrent_conv import RecurrentConv
from streamnorm_lab.logs.records import Run
from streamnorm_lab.running.train import Training

SMALL = [
    *("--rates", "0.01", "--seeds", "1", "--limit", "64", "--validation", "32", "--width", "2", "--points", "2"),
    *("--jobs", "1"),
]


@pytest.mark.parametrize(
    ("name", "methods"),
    [("recurrent-conv", ["batch-per-step", "streaming-l1"]), ("figure3", ["batch-l1", "streaming-l7"])],
)
def test_a_whole_experiment_at_the_smallest_size(tmp_path, name, methods):
    assert main(["run", name, *SMALL, "--methods", *methods, "--settings", "8x1", "2x4", "--out", str(tmp_path)]) == 0
    results = open_results(tmp_path)
    assert [method.name for method in results.methods] == methods
    assert [setting.label for setting in results.settings] == ["8×1", "2×4"]
    assert all(cell.scores for cell in results.cells.values())
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["conv", "recurrent-conv", "lp", "resnet"])
def test_help_names_every_method_that_can_be_chosen_without_looking(name, capsys):
    with pytest.raises(SystemExit):
        main(["run", name, "--help"])
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert find(name).summary not in ("", None)
    for option in ("--width INT", "--device STR", "--methods METHOD", "--settings SxU"):
        assert option in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["conv", "--width", "0"], "--width 0: must be at least 1"),
        (["recurrent-conv", "--k2", "0"], "--k2 0: must be at least 1"),
        (
            ["lp", "--methods", "batch-l8"],
            "unknown method 'batch-l8' (did you mean 'batch-l7'?): choose from",
        ),
        (["conv", "--device", "gpu"], "--device gpu: write cpu, cuda, or cuda:1"),
        (["conv", "--device", "cuda:99"], "NVIDIA cards; leave it out for cpu"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, message, capsys, tmp_path):
    assert main(["run", *words, "--out", str(tmp_path / "out")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_convolutions_lie_channels_last(data):
    model = Conv().model(data, "streaming-l1")
    weights = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert len(weights) == 6
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def advanced(experiment, run, data, count):
    """A training after so many updates."""
    training = Training(experiment, run, data)
    for _, _ in zip(range(count), training.advance(), strict=False):
        pass
    return training


@pytest.mark.parametrize("method", ["batch", "layer", "streaming-l1"])
def test_recurrent_conv_with_one_application_is_conv(data, method):
    run = Run("final", method, "2x2", 0.03, 0)
    feedforward = advanced(Conv(width=2), run, data, 5)
    recurrent = advanced(RecurrentConv(width=2, k1=1, k2=1), run, data, 5)
    for (name, left), (same, right) in zip(
        feedforward.model.state_dict().items(), recurrent.model.state_dict().items(), strict=True
    ):
        assert name == same
        assert torch.equal(left, right)


def test_batch_per_step_has_layers_of_its_own_for_each_application(data):
    experiment = RecurrentConv(width=2, k1=3, k2=2)
    shared, own = (
        Training(experiment, Run("final", name, "8x1", 0.1, 0), data).model for name in ("batch", "batch-per-step")
    )
    for model, count in ((shared, 3 + 2 + 2), (own, 3 + 2 * 3 + 2 * 2)):
        assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == count
    inputs, _ = data.train.batch(slice(0, 8))
    torch.testing.assert_close(own(inputs), shared(inputs))  # gains are all 1 at first
    own.eval(), shared.eval()
    assert not torch.allclose(own(inputs), shared(inputs))
    uses = [m.num_batches_tracked for m in own.modules() if isinstance(m, nn.BatchNorm2d)]
    assert uses == [1] * len(uses)


@pytest.mark.parametrize("p", range(1, 8))
def test_lp_methods_have_their_moment(data, p):
    for name, kind in ((f"batch-l{p}", sn.GeneralBatchNorm), (f"streaming-l{p}", sn.StreamingNorm2d)):
        layers = [m for m in Lp(width=2).model(data, name).modules() if isinstance(m, sn.Norm)]
        assert len(layers) == 7
        assert all(isinstance(layer, kind) and layer.moment.p == p for layer in layers)


def test_batch_l2_is_batch_normalization(data):
    lp = advanced(Lp(width=2), Run("final", "batch-l2", "8x1", 0.1, 0), data, 10)
    stock = advanced(Conv(width=2), Run("final", "batch", "8x1", 0.1, 0), data, 10)
    for name, value in stock.model.state_dict().items():
        torch.testing.assert_close(lp.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)
