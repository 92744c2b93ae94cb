"""ResNet-20: its layers, its augmentation, its schedule, and continuing after a kill."""

from __future__ import annotations

import math

import pytest
import torch
from support.lab import finish, stop_after, timeless
from torch import nn

from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.commands.main import main
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.data.augment import Shifts
from streamnorm_lab.experiments.resnet import ResNet
from streamnorm_lab.logs.records import Run
from streamnorm_lab.methods.layers import METHODS
from streamnorm_lab.networks.images import ResidualBlock, resnet
from streamnorm_lab.running.train import Training


def test_resnet_20_is_that_of_he_et_al():
    """20 layers with weights, and 0.27 million parameters (their table 6)."""
    model = resnet(3, 10, METHODS["batch"].make, 16, 3)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == 20
    assert sum(p.numel() for p in model.parameters()) == 269_722
    shapes = []
    x = torch.randn(2, 3, 32, 32)
    for layer in model:
        x = layer(x)
        if isinstance(layer, ResidualBlock):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3
    assert x.shape == (2, 10)


def test_a_shortcut_takes_every_second_place_and_fills_with_zeros():
    block = ResidualBlock(2, 4, METHODS["batch"].make)
    nn.init.zeros_(block.norm2.weight)  # type: ignore[arg-type]
    x = torch.rand(1, 2, 5, 5)
    y = block(x)
    assert torch.equal(y[:, :2], x[:, :, ::2, ::2])
    assert y[:, 2:].abs().sum() == 0


def shifts(down, right, mirrored, padding=1):
    return Shifts(padding, torch.tensor(down), torch.tensor(right), torch.tensor(mirrored))


def test_shifts_move_and_mirror_each_image_by_itself():
    images = torch.arange(1.0, 28.0).view(3, 1, 3, 3)
    made = shifts([1, 0, 1], [1, 1, 2], [False, False, True]).apply(images, 0)
    assert torch.equal(made[0], images[0])
    assert made[1, 0].tolist() == [[0, 0, 0], [10, 11, 12], [13, 14, 15]]
    assert made[2, 0].tolist() == [[0, 21, 20], [0, 24, 23], [0, 27, 26]]
    assert made.shape == images.shape


def test_shifts_of_a_part_are_those_of_the_whole():
    images = torch.randn(10, 3, 8, 8)
    drawn = Shifts.draw(10, 2, True, 7, "cpu")
    whole = drawn.apply(images, 0)
    assert torch.equal(torch.cat([drawn.apply(images[:4], 0), drawn.apply(images[4:], 4)]), whole)


def test_shifts_are_drawn_evenly():
    drawn = Shifts.draw(20_000, 2, True, 0, "cpu")
    for values in (drawn.down, drawn.right):
        assert torch.bincount(values).tolist() == pytest.approx([4000] * 5, rel=0.1)
    assert drawn.mirrored.float().mean() == pytest.approx(0.5, abs=0.02)
    assert not Shifts.draw(100, 2, False, 0, "cpu").mirrored.any()


@pytest.mark.parametrize("update", [0, 3])
def test_the_images_of_an_update_follow_from_seed_pass_and_update_alone(data, update):
    experiment, setting = ResNet(), Setting(4, 3)
    whole = list(experiment.task.batches(data, setting, 1, 2, 0))[3 * update :]
    rest = list(experiment.task.batches(data, setting, 1, 2, update))
    assert len(rest) == len(whole)
    assert all(torch.equal(a, b) for x, y in zip(rest, whole, strict=True) for a, b in zip(x, y, strict=True))
    other_pass, other_seed = (next(experiment.task.batches(data, setting, *key, update))[0] for key in ((1, 3), (2, 2)))
    assert not torch.equal(other_pass, rest[0][0])
    assert not torch.equal(other_seed, rest[0][0])


def test_augmented_images_are_shifted_training_images(data):
    """Each 8×8 digit by up to one pixel, unmirrored, with its own label."""
    pixels, labels = data.train.batch(slice(None))
    places = [(down, right) for down in range(3) for right in range(3)]
    all_shifts = [shifts([down] * 96, [right] * 96, [False] * 96).apply(pixels, 0) for down, right in places]
    seen = set()
    for image, label in zip(*next(ResNet().task.batches(data, Setting(96, 1), 0, 0, 0)), strict=True):
        found = [
            (n, place)
            for place, made in zip(places, all_shifts, strict=True)
            for n in range(96)
            if labels[n] == label and torch.equal(made[n], image)
        ]
        assert found
        seen |= {place for _, place in found}
    assert seen == set(places)


@pytest.mark.parametrize(
    ("anneal", "rates"),
    [
        ("constant", [0.1] * 4),
        ("step", [0.1, 0.1, 0.01, 0.001]),
        ("cosine", [0.05 * (1 + math.cos(math.pi * share)) for share in (0, 0.25, 0.5, 0.75)]),
    ],
)
def test_the_rate_of_each_update(data, anneal, rates):
    """96 images in mini-batches of 48, two of them per update: one update a pass."""
    training = Training(ResNet(width=1, depth=1, epochs=4, anneal=anneal), Run("final", "layer", "48x2", 0.1, 0), data)
    seen = [training.optimizer.param_groups[0]["lr"] for _ in training.advance()]
    assert seen == pytest.approx(rates)


def test_a_whole_experiment_at_the_smallest_size(tmp_path):
    words = ["--width", "2", "--depth", "1", "--limit", "64", "--validation", "32", "--jobs", "1", "--points", "2"]
    words += ["--methods", "batch", "streaming-l1", "--settings", "16x1", "4x4", "--rates", "0.03", "--seeds", "1"]
    words += ["--epochs", "2", "--tune-limit", "32", "--out", str(tmp_path)]
    assert main(["run", "resnet", *words]) == 0
    ends = {(log.run["stage"], log.end["images"]) for log in open_results(tmp_path).logs if log.end}
    assert ends == {("tune", 2 * 32), ("final", 2 * 64)}
    page = (tmp_path / "report.html").read_text()
    assert "shifted at random" in page
    assert "half a cosine" in page
    assert "constant learning rate" not in page
    assert "Nothing is augmented" not in page


@pytest.mark.parametrize("method", ["batch", "streaming-l1"])
def test_an_interrupted_run_ends_with_the_same_numbers(data, tmp_path, method):
    experiment = ResNet(width=2, depth=1, epochs=2, points=4, checkpoint_every=0.0)
    run = Run("final", method, "8x3", 0.1, 0)

    whole = timeless(finish(experiment, run, data, tmp_path / "whole.jsonl"))
    stop_after(6, experiment, run, data, tmp_path / "torn.jsonl")  # in the second pass
    assert (tmp_path / "torn.ckpt").exists()
    assert timeless(finish(experiment, run, data, tmp_path / "torn.jsonl")) == whole


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weight-decay", "-1"], "--weight-decay -1: must be at least 0"),
        (["--depth", "0"], "--depth 0: must be at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, message, capsys):
    assert main(["run", "resnet", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
