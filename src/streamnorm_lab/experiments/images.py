"""What experiments with images have in common."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.forms import Size
from streamnorm_lab.common.score import ACCURACY, Score
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.data.images import Data, Split, load, prepare, split_sizes
from streamnorm_lab.data.sources import Source, open_source
from streamnorm_lab.experiments.experiment import Batch, Experiment, Folder, Number, Scores
from streamnorm_lab.experiments.wording import ImageWords, Words
from streamnorm_lab.logs.records import DataRecord, Run
from streamnorm_lab.methods.layers import METHODS, LayerMethod, NormFactory


class _ImageRecord(DataRecord):
    shape: list[Size]


class ImageRecord(_ImageRecord, total=False):
    """What identifies images; folders of earlier versions have no short runs, ``tune``."""

    tune: Size


@dataclass(frozen=True)
class Images:
    """A source and how many of its images are used."""

    source: Source
    limit: int | None
    validation: int | None
    tune_limit: int | None

    @property
    def name(self) -> str:
        """The source's name."""
        return self.source.name

    def prepare(self, folder: Path) -> dict[str, Any]:
        """Decode the images into ``folder``."""
        return prepare(self.source, self.limit, self.validation, folder, self.tune_limit)


@dataclass(frozen=True, kw_only=True)
class ImageExperiment(Experiment[Data]):
    """Classifying images with SGD; whole passes over the training images, judged by accuracy."""

    catalogue: ClassVar[Mapping[str, LayerMethod]] = METHODS
    score: ClassVar[Score] = ACCURACY
    unit: ClassVar[str] = "images"
    words: ClassVar[Words] = ImageWords()
    data_form: ClassVar[type] = ImageRecord

    data: Folder = None
    """Folder with images: Parquet files in the Hub's cifar10 layout, or CIFAR-10's binary files.

    Default: scikit-learn's digits, so that nothing is downloaded. `streamnorm data --help` tells more."""

    epochs: int = 1
    """Passes over the training images."""

    limit: Number = None
    """Train on so many images, the first ones. Default: 10,000, or 800 of the digits."""

    validation: Number = None
    """Choose rates on so many images, those after the training images. Default: 5,000, or 297 of the digits."""

    tune_limit: Number = None
    """Choose rates with short runs, on the first so many training images; the validation images then are those right
    after these, and the final runs may train on them too. Default: rates are chosen with whole runs."""

    momentum: float = 0.9
    """Momentum of SGD."""

    device: str = "cpu"
    """Where to train: cpu, or cuda for an NVIDIA card, which then holds all images; --jobs runs share it."""

    curve_images: int = 1000
    """Test images used for the points of a curve; the final accuracy always uses all of them."""

    @abstractmethod
    def network(self, shape: tuple[int, ...], classes: int, norm: NormFactory) -> nn.Module:
        """The network for images of ``shape`` (C, H, W), with layers made by ``norm``."""

    def check(self) -> None:
        """Look at the options before anything is read or written."""
        super().check()
        if not 0 <= self.momentum < 1:
            raise UserError(f"--momentum {self.momentum:g}: must be at least 0 and below 1")
        _check_device(self.device)

    def _counts(self) -> tuple[str, ...]:
        return ("epochs", "curve_images")

    def open(self) -> Images:
        """Find the images, without reading them."""
        source = open_source(self.data)
        images, _ = split_sizes(source, self.limit, self.validation, self.tune_limit)
        images = self.tune_limit or images
        for setting in self.settings:
            if Setting.parse(setting).samples > images:
                raise UserError(f"setting {setting}: a mini-batch cannot have more than the {images} training images")
        return Images(source, self.limit, self.validation, self.tune_limit)

    def load(self, folder: Path) -> Data:
        """Map the decoded images into memory, or copy them to the device."""
        return _load(folder, self.device)

    def part(self, data: Data, run: Run) -> Data:
        """Fewer training images where rates are chosen with short runs."""
        short = self._tune_limit(run)
        return replace(data, train=data.train.first(short)) if short else data

    def size(self, data: Mapping[str, Any], run: Run) -> Mapping[str, Any]:
        """Likewise."""
        short = self._tune_limit(run)
        return {**data, "train": short} if short else data

    def _tune_limit(self, run: Run) -> int | None:
        return self.tune_limit if run.stage == "tune" else None

    def model(self, data: Data, method: str) -> nn.Module:
        """The network with layers of this method."""
        chosen = self.catalogue[method]
        return chosen.finish(self.network(data.shape, data.classes, chosen.make)).to(self.device)

    def optimizer(self, parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(parameters, lr=rate, momentum=self.momentum, fused=True)

    def schedule(self, data: Data, setting: Setting) -> tuple[int, int]:
        """Passes, and the updates that the whole mini-batches of one give."""
        return self.epochs, math.ceil(len(data.train) // setting.samples / setting.batches)

    def batches(self, data: Data, setting: Setting, seed: int, epoch: int, first_update: int) -> Iterator[Batch]:
        """All images in an order of this pass; those left over when it is cut into mini-batches are not used."""
        shuffle = torch.Generator().manual_seed(1_000_003 * epoch + seed)
        order = torch.randperm(len(data.train), generator=shuffle)
        start, whole = first_update * setting.batches * setting.samples, len(order) // setting.samples
        for index in order[start : whole * setting.samples].split(setting.samples):
            yield data.train.batch(index)

    def identity(self) -> dict[str, Any]:
        """Not the device: another one gives other rounding, and each log tells its own."""
        return {name: value for name, value in super().identity().items() if name != "device"}

    def hardware(self) -> dict[str, str]:
        """The card's name, where one is used."""
        return {} if self.device == "cpu" else {"device": torch.cuda.get_device_name(self.device)}

    def watched(self, data: Data) -> Split:
        """The first test images."""
        return data.test.first(self.curve_images)

    @classmethod
    def guess(cls, classes: int) -> Scores:
        """One class in so many is right."""
        return {"loss": None, "accuracy": 1 / classes}

    def amounts(self, data: Mapping[str, Any]) -> dict[str, int]:
        """Images to train on, to choose rates on, and to train on meanwhile."""
        short = data.get("tune", data["train"])
        return {"limit": data["train"], "validation": data["validation"], "tune_limit": short}

    def seen(self, data: Mapping[str, Any], setting: Setting) -> int:
        """Images of all passes."""
        return int(data["train"]) * self.epochs

    def cost(self, data: Mapping[str, Any], setting: Setting) -> float:
        """The mini-batches and the weight updates, in mini-batches."""
        return float(data["train"]) / setting.samples * (1 + 1 / setting.batches)


@lru_cache(maxsize=1)
def _load(folder: Path, device: str) -> Data:
    data = load(folder)
    return data if device == "cpu" else data.to(device)


def _check_device(device: str) -> None:
    if re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device) is None:
        raise UserError(f"--device {device}: write cpu, cuda, or cuda:1 for the second card")
    number = int(device.partition(":")[2] or 0)
    if device != "cpu" and number >= torch.cuda.device_count():
        raise UserError(
            f"--device {device}: PyTorch finds {torch.cuda.device_count()} NVIDIA cards; leave it out for cpu"
        )
