"""One run: what it computes, and that interrupting it changes nothing."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from support.lab import finish, stop_after, timeless
from torch import nn

import streamnorm as sn
from streamnorm_lab.logs.records import Run
from streamnorm_lab.methods.peers.batch_renorm import BatchRenorm
from streamnorm_lab.running import train as train_module
from streamnorm_lab.running.train import Training


def test_a_run_is_the_loop_that_one_would_write(make_experiment, data, tmp_path):
    """Against a plain loop: same weights at first, same order of the images, gradients averaged over 2×3 samples."""
    run = Run("final", "streaming-l1", "2x3", 0.02, 5)
    experiment = make_experiment(epochs=2, momentum=0.9)
    logged = finish(experiment, run, data, tmp_path / "log.jsonl")

    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(64, 16), sn.StreamingNorm1d(16), nn.ReLU()),
        *(nn.Linear(16, 16), sn.StreamingNorm1d(16), nn.ReLU()),
        nn.Linear(16, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for epoch in range(2):
        order = torch.randperm(96, generator=torch.Generator().manual_seed(1_000_003 * epoch + 5))
        for group in order.split(6):
            optimizer.zero_grad()
            for index in group.split(2):
                inputs, targets = data.train.batch(index)
                (F.cross_entropy(model(inputs), targets) / 3).backward()
            optimizer.step()
    model.eval()
    inputs, targets = data.test.batch(slice(None))
    with torch.no_grad():
        logits = model(inputs)
    scores = logged.end["scores"]["streaming-l1"]
    assert scores["loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-4)
    assert scores["accuracy"] == pytest.approx((logits.argmax(1) == targets).float().mean().item(), abs=0.003)
    assert logged.end["updates"] == 32
    assert logged.end["images"] == 192
    assert logged.end["images_evaluated"] == 500


def test_points_are_spread_over_the_run_and_judge_each_image_once(make_experiment, data, tmp_path):
    run = Run("final", "layer", "4x2", 0.01, 0)
    logged = finish(make_experiment(curve_images=100), run, data, tmp_path / "log.jsonl")
    assert [point["update"] for point in logged.points] == [3, 6, 9, 12]
    assert [point["images"] for point in logged.points] == [24, 48, 72, 96]
    assert all(0 <= point["test"]["accuracy"] <= 1 for point in logged.points)


def test_choosing_a_rate_never_looks_at_the_test_images(make_experiment, data, tmp_path):
    run = Run("tune", "layer", "4x2", 0.01, 0)
    blind = type(data)(data.classes, data.train, data.validation, data.test.first(0))
    logged = finish(make_experiment(), run, blind, tmp_path / "log.jsonl")
    assert logged.end["images_evaluated"] == 64
    assert all("test" not in point for point in logged.points)


@pytest.mark.parametrize("method", ["none", "layer"])
def test_without_batch_statistics_dau_is_the_large_batch(make_experiment, data, tmp_path, method):
    losses = [
        finish(make_experiment(), Run("final", method, setting, 0.02, 0), data, tmp_path / f"{setting}.jsonl").end[
            "scores"
        ][method]["loss"]
        for setting in ("8x1", "2x4", "1x8")
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_same_seed_same_start_and_order_for_every_method(make_experiment, data):
    trainings = [
        Training(make_experiment(), Run("final", name, "2x2", 0.1, 3), data) for name in ("batch", "streaming-l1")
    ]
    first, second = ([p for p in t.model.parameters() if p.dim() == 2] for t in trainings)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    orders = [torch.cat([targets for _, targets in t._batches(1, 0)]) for t in trainings]
    assert torch.equal(*orders)


@pytest.mark.parametrize("method", ["batch", "layer", "streaming-l1", "streaming-l2", "batch-renorm", "mabn", "online"])
@pytest.mark.parametrize("updates", [1, 7, 19])
def test_an_interrupted_run_ends_with_the_same_numbers(make_experiment, data, tmp_path, monkeypatch, method, updates):
    """Interrupted right after a checkpoint or one update later, in the middle of a pass or between two."""
    experiment = make_experiment(epochs=2, checkpoint_every=0.0)
    run = Run("final", method, "3x3", 0.02, 1)
    whole = finish(experiment, run, data, tmp_path / "whole.jsonl")
    path, advance = tmp_path / "torn.jsonl", Training.advance
    stop_after(updates, experiment, run, data, path)
    with open(path, "ab") as file:
        file.write(b'{"type": "point", "upd')  # the kill hit a write
    started_at = []

    def watched(self):
        started_at.append(self.updates)
        return advance(self)

    monkeypatch.setattr(Training, "advance", watched)
    torn = finish(experiment, run, data, path)
    assert started_at == [updates]
    assert timeless(torn) == timeless(whole)


def test_batch_renormalization_knows_how_long_the_run_is(make_experiment, data):
    training = Training(make_experiment(epochs=2), Run("final", "batch-renorm", "4x3", 0.1, 0), data)
    lengths = [layer.length for layer in training.model.modules() if isinstance(layer, BatchRenorm)]
    assert lengths == [48, 48]


def test_batch_normalization_refuses_one_sample_and_the_reason_is_kept(make_experiment, data, tmp_path):
    logged = finish(make_experiment(), Run("tune", "batch", "1x4", 0.1, 0), data, tmp_path / "log.jsonl")
    assert logged.end["status"] == "fails"
    assert "more than 1 value per channel" in logged.end["reason"]
    assert "scores" not in logged.end


def test_a_diverging_run_stops_and_counts_as_guessing(make_experiment, data, tmp_path):
    logged = finish(make_experiment(), Run("final", "none", "4x1", 1e12, 0), data, tmp_path / "log.jsonl")
    assert logged.end["status"] == "diverged"
    assert logged.end["scores"] == {"none": {"loss": None, "accuracy": 0.1}}
    assert logged.end["updates"] < 24
    json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1], parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize(("rate", "away"), [(30.0, True), (0.01, False)])
def test_the_log_says_when_a_layer_ran_away(make_experiment, data, tmp_path, rate, away):
    logged = finish(
        make_experiment(epochs=4), Run("final", "streaming-l1", "1x1", rate, 0), data, tmp_path / "log.jsonl"
    )
    assert ("ran_away" in logged.end) == away
    if away:
        assert 0 < logged.end["ran_away"] <= logged.end["updates"]


def test_another_error_is_not_taken_for_a_result(make_experiment, data, tmp_path, monkeypatch):
    calls = []

    def broken(model, split, measure):
        calls.append(split)
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(train_module, "evaluate", broken)
    with pytest.raises(ValueError, match="a mistake of ours"):
        finish(make_experiment(), Run("final", "layer", "4x1", 0.1, 0), data, tmp_path / "log.jsonl")
    assert calls


def test_recalibrated_batch_normalization_has_the_statistics_of_the_training_images(make_experiment, data, tmp_path):
    """With one hidden layer and all images in one part, they are the plain mean and variance of its inputs."""
    training = Training(make_experiment(depth=1), Run("final", "batch", "2x1", 0.05, 0), data)
    for _ in training.advance():
        pass
    model, before = train_module._recalibrated(training), training.model
    assert isinstance(model, nn.Sequential)
    assert isinstance(before, nn.Sequential)
    inputs, _ = data.train.batch(slice(None))
    with torch.no_grad():
        hidden = model[1](model[0](inputs))
    torch.testing.assert_close(model[2].running_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[2].running_var, hidden.var(0), rtol=1e-4, atol=1e-5)
    assert isinstance(before[2], nn.BatchNorm1d)
    assert before[2].running_mean is not None
    assert not torch.allclose(before[2].running_mean, hidden.mean(0), rtol=1e-2)
    logged = finish(make_experiment(), Run("final", "batch", "2x1", 0.05, 0), data, tmp_path / "log.jsonl")
    assert logged.end["scores"].keys() == {"batch", "batch-recalibrated"}
