"""The experiment with images that change at test time."""

from __future__ import annotations

import copy

import pytest
import torch

import streamnorm as sn
from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.commands.main import main
from streamnorm_lab.data.corruptions import CORRUPTIONS
from streamnorm_lab.experiments.adapt import Adapt, _accuracy, _adapting, _as_trained, _by_batch
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
        "batch": {"as trained", "each image", "64 images"},
        "layer": {"as trained"},
        "streaming-l1": {"as trained", "adapting"},
    }
    section = results.section
    assert section is not None
    assert section.head[2:] == ("clean", *CORRUPTIONS)
    assert [row[0] for row in section.rows] == [
        *("Batch", "Batch, statistics of each image", "Batch, statistics of 64 images"),
        *("Layer", "Streaming L1", "Streaming L1, adapting"),
    ]
    ends = [log.end for log in results.logs if log.end and log.run["method"] == "layer" and "adaptation" in log.end]
    fog = 100 * sum(end["adaptation"]["as trained"]["fog"] for end in ends) / 2
    assert section.rows[3][-1].startswith(f"{fog:.1f} ± ")
    page = (tmp_path / "report.html").read_text()
    assert "When the images change" in page
    assert f"{section.rows[3][-1]}<" in page


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
