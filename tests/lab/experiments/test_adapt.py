"""The experiment with images that change at test time."""

from __future__ import annotations

import copy

import pytest
import torch

import streamnorm as sn
from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.commands.main import main
from streamnorm_lab.experiments.adapt import (
    KINDS,
    Adapt,
    _accuracy,
    _adapting,
    _as_trained,
    _by_batch,
    _by_entropy,
    _gradual,
    _ordered,
)
from streamnorm_lab.logs.records import Run
from streamnorm_lab.running.train import Training


@pytest.fixture
def trained(data):
    def train(method):
        training = Training(Adapt(width=2, epochs=1), Run("final", method, "8x1", 0.03, 0), data)
        for _ in training.advance():
            pass
        return training.model

    return train


def test_a_whole_experiment_at_the_smallest_size(tmp_path):
    words = ["--rates", "0.01", "--seeds", "2", "--limit", "64", "--validation", "32", "--width", "2", "--jobs", "1"]
    words += ["--points", "2", "--epochs", "1", "--settings", "8x1", "--stream-images", "70", "--out", str(tmp_path)]
    assert main(["run", "adapt", *words]) == 0
    results = open_results(tmp_path)
    modes = {
        log.run["method"]: set(log.end["adaptation"])
        for log in results.logs
        if log.end is not None and log.run["stage"] == "final"
    }
    assert modes == {
        "batch": {"as trained", "each image", "64 images", "entropy"},
        "layer": {"as trained"},
        "streaming-l1": {"as trained", "adapting"},
    }
    section = results.section
    assert section is not None
    assert section.head[2:] == KINDS
    assert [row[0] for row in section.rows] == [
        *("Batch", "Batch, statistics of each image", "Batch, statistics of 64 images", "Batch, entropy of 64 images"),
        *("Layer", "Streaming L1", "Streaming L1, adapting"),
    ]
    ends = [log.end for log in results.logs if log.end and log.run["method"] == "layer" and "adaptation" in log.end]
    fog = 100 * sum(end["adaptation"]["as trained"]["fog"] for end in ends) / 2
    assert section.rows[4][section.head.index("fog")].startswith(f"{fog:.1f} ± ")
    page = (tmp_path / "report.html").read_text()
    assert "When the images change" in page
    assert f"{section.rows[4][-1]}<" in page


def test_streams_of_another_order_have_the_same_images(data):
    clean = data.test.first(60)
    ordered, gradual = _ordered(clean), _gradual(clean, 0)
    assert ordered.labels.tolist() == sorted(clean.labels.tolist())
    for pixels, label in zip(ordered.pixels, ordered.labels, strict=True):
        assert any(torch.equal(pixels, other) for other in clean.pixels[clean.labels == label])
    assert torch.equal(gradual.labels, clean.labels)
    change = (gradual.pixels.float() - clean.pixels.float()).abs().mean((1, 2, 3))
    assert change[0] == change[-1] == 0
    assert change[25:35].mean() > 2 * change[5:15].mean() > 0


def test_entropy_minimization_is_its_rule(data, trained):
    """Each part is predicted before it is learnt from; gains and biases alone are trained, and the entropy falls."""
    model, (images, _) = trained("batch"), data.test.batch(slice(0, 48))
    by_hand, given = copy.deepcopy(model).train(), copy.deepcopy(model)
    norms = [m for m in by_hand.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    optimizer = torch.optim.Adam([p for m in norms for p in (m.weight, m.bias)], 1e-3)
    expected = []
    for part in (images[:32], images[32:]):
        logits = by_hand(part)
        chances = logits.softmax(1)
        optimizer.zero_grad()
        (-(chances * chances.log()).sum(1).mean()).backward()
        optimizer.step()
        expected.append(logits.detach())
    with torch.no_grad():
        torch.testing.assert_close(_by_entropy(given, images, 32), torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert torch.equal(given[0].weight, model[0].weight)
    assert not torch.equal(given[1].weight, model[1].weight)


def test_evaluating_leaves_the_model_as_it_is(data, trained):
    for method in ("batch", "streaming-l1"):
        model = trained(method)
        before = copy.deepcopy(model.state_dict())
        Adapt(width=2).epilogue(model, data, Run("final", method, "8x1", 0.03, 0))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rates_are_chosen_without_looking_at_corrupted_images(data, trained):
    assert Adapt(width=2).epilogue(trained("layer"), data, Run("tune", "layer", "8x1", 0.03, 0)) == {}


def test_adapting_follows_the_images_one_at_a_time(data, trained):
    model = trained("streaming-l1")
    images, _ = data.test.batch(slice(0, 50))
    changed = 0.3 * images + 1
    by_hand = copy.deepcopy(model).eval()
    with torch.no_grad(), sn.adapt(by_hand, window=30):
        expected = torch.cat([by_hand(image[None]) for image in changed])
    with torch.no_grad():
        assert torch.equal(_adapting(copy.deepcopy(model), changed, 30), expected)
        assert not torch.allclose(_as_trained(copy.deepcopy(model), changed), expected)


def test_statistics_of_a_batch_are_those_of_training(data, trained):
    model = trained("batch")
    images, _ = data.test.batch(slice(0, 20))
    with torch.no_grad():
        found = _by_batch(copy.deepcopy(model), images, 8)
        expected = [model.train()(part) for part in (images[:8], images[8:16], images[16:])]
    assert torch.equal(found, torch.cat(expected))


def test_accuracy_counts_what_is_right(data):
    def guess(model, images):
        logits = torch.zeros(len(images), 10)
        logits[:, 3] = 1
        return logits

    share = (data.test.labels == 3).float().mean().item()
    assert _accuracy(guess, torch.nn.Identity(), data.test) == pytest.approx(share)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--window", "0"], "--window 0: must be above 0"), (["--stream-images", "0"], "--stream-images 0: must be at")],
)
def test_what_cannot_be_meant_is_refused(words, message, capsys):
    assert main(["run", "adapt", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
