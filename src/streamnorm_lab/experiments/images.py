"""The common part of experiments with images."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar

import torch
from torch import nn

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.forms import Between
from streamnorm_lab.common.score import ACCURACY, Score
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.data.image_task import ImageTask
from streamnorm_lab.data.images import Data
from streamnorm_lab.experiments.experiment import Experiment
from streamnorm_lab.experiments.options import FREE, Amount, Folder, Positive
from streamnorm_lab.experiments.wording import ImageWords, Words
from streamnorm_lab.methods.layers import METHODS, LayerMethod, NormFactory


@dataclass(frozen=True, kw_only=True)
class ImageTraining(Experiment[Data]):
    """Classifying images with SGD; whole passes over the training images, judged by accuracy."""

    score: ClassVar[Score] = ACCURACY
    kind: ClassVar[type[ImageTask]] = ImageTask
    words: ClassVar[Words] = ImageWords()
    augment: ClassVar[bool] = False
    """Whether images are shifted and mirrored at random."""

    data: Folder = None
    """Folder with images: Parquet files in the Hub's cifar10 layout, or CIFAR-10's binary files.

    Default: scikit-learn's digits, so that nothing is downloaded. `streamnorm data --help` tells more."""

    epochs: Positive = 1
    """Passes over the training images."""

    limit: Amount = None
    """Train on so many images, the first ones. Default: 10,000, or 800 of the digits."""

    validation: Amount = None
    """Choose rates on so many images, those after the training images. Default: 5,000, or 297 of the digits."""

    tune_limit: Amount = None
    """Choose rates with short runs, on the first so many training images; the validation images then are those right
    after these, and the final runs may train on them too. Default: rates are chosen with whole runs."""

    test_limit: Amount = None
    """Test on so many images, the first ones, where a network is slow. Default: all."""

    momentum: Annotated[float, Between(0, 1, below=True)] = 0.9
    """Momentum of SGD."""

    device: Annotated[str, FREE] = "cpu"
    """Device to train on: cpu, or cuda for an NVIDIA card, which then holds all images; --jobs runs share it."""

    curve_images: Positive = 1000
    """Test images used for the points of a curve; the final accuracy always uses all of them."""

    def check(self) -> None:
        """Look at the options before anything is read or written."""
        super().check()
        _check_device(self.device)

    @property
    def task(self) -> ImageTask:
        """The learning task of this kind, made from the options that it names."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        given |= {"path": self.data, "augment": self.augment}
        return self.kind(**{field.name: given[field.name] for field in fields(self.kind) if field.name in given})

    def optimizer(self, parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(parameters, lr=rate, momentum=self.momentum, fused=True)

    def work(self, setting: Setting) -> float:
        """The mini-batch, and its share of a weight update."""
        return 1 + 1 / setting.batches


@dataclass(frozen=True, kw_only=True)
class ImageExperiment(ImageTraining):
    """The same with a network made for the experiment, from layers of each method."""

    catalogue: ClassVar[Mapping[str, LayerMethod]] = METHODS

    @abstractmethod
    def network(self, shape: tuple[int, ...], classes: int, norm: NormFactory) -> nn.Module:
        """The network for images of ``shape`` (C, H, W), with layers made by ``norm``."""

    def model(self, data: Data, method: str) -> nn.Module:
        """The network with layers of this method."""
        chosen = self.catalogue[method]
        return chosen.finish(self.network(data.shape, data.classes, chosen.make)).to(self.device)


def _check_device(device: str) -> None:
    if re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device) is None:
        raise UserError(f"--device {device}: write cpu, cuda, or cuda:1 for the second card")
    number = int(device.partition(":")[2] or 0)
    if device != "cpu" and number >= torch.cuda.device_count():
        raise UserError(
            f"--device {device}: PyTorch finds {torch.cuda.device_count()} NVIDIA cards; leave it out for cpu"
        )
