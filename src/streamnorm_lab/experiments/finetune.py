"""Fine-tuning: a network that was trained with Batch Normalization learns something else, a few images at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from tyro import conf

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.forms import Between
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.data.halves import halves
from streamnorm_lab.data.image_task import ImageFacts, Images, ImageTask
from streamnorm_lab.data.images import Data, load, prepare
from streamnorm_lab.data.source import Source
from streamnorm_lab.data.sources import open_source
from streamnorm_lab.experiments.images import ImageTraining
from streamnorm_lab.experiments.options import MethodNames, Positive, Rates, SettingNames
from streamnorm_lab.experiments.wording import FinetuneWords, Words
from streamnorm_lab.logs.records import Share
from streamnorm_lab.methods.finetuning import FINETUNE_METHODS, FinetuneMethod
from streamnorm_lab.networks.trained import (
    SMALL,
    Range,
    check_backbone,
    expected_range,
    of_package,
    small,
    train_small,
    with_new_head,
)

FIRST, BACKBONE = "first", "backbone.pt"
"""Below the folder of the data: the images of the first half of the classes, and what was trained on them."""

CALIBRATION = 256
"""Training images that Group Normalization is calibrated on."""


class FinetuneFacts(ImageFacts, total=False):
    """The facts that identify images; and of a small network that was trained first, its accuracy there."""

    first_accuracy: Share


@dataclass(frozen=True)
class FinetuneData(Data):
    """Images to go on with, and the weights of a network that was trained first, if that was done here."""

    weights: Mapping[str, Tensor] | None
    first_classes: int


@dataclass(frozen=True)
class FinetuneImages(Images):
    """A source to go on with; ``first`` is what a small network is trained on before, ``width`` and ``epochs`` how."""

    first: Source | None
    backbone: str
    width: int
    epochs: int

    def prepare(self, folder: Path) -> dict[str, Any]:
        """Decode the images into ``folder``, and train the small network if that is asked for."""
        facts = super().prepare(folder)
        if self.first is None:
            _save(folder, expected_range(self.backbone), None, 0)
            return facts
        place = folder / FIRST
        prepare(self.first, self.first.train_size - 1, 1, place)
        data = load.__wrapped__(place)
        model, accuracy = train_small(data, self.width, self.epochs)
        assert data.train.mean is not None
        assert data.train.std is not None
        seen = Range(tuple(data.train.mean.flatten().tolist()), tuple(data.train.std.flatten().tolist()))
        _save(folder, seen, model.state_dict(), data.classes)
        return {**facts, "first_accuracy": accuracy}


@dataclass(frozen=True)
class FinetuneTask(ImageTask):
    """Images to go on with, in the range that the trained network expects.

    Args:
        backbone: the network; the small one is trained first, on the first half of the classes.
        width: of the small network.
        first_epochs: its passes.
    """

    backbone: str = SMALL
    width: int = 8
    first_epochs: int = 10

    form: ClassVar[type] = FinetuneFacts

    def open(self, settings: Sequence[Setting]) -> FinetuneImages:
        """Find the images; the classes are halved for a network that is trained first, which reads all of them."""
        source, first = open_source(self.path, self.size), None
        if self.backbone == SMALL:
            first, source = halves(source)
        images = self._of(source, settings)
        return FinetuneImages(
            source,
            images.limit,
            images.validation,
            images.tune_limit,
            images.test_limit,
            first,
            self.backbone,
            self.width,
            self.first_epochs,
        )

    def load(self, folder: Path) -> FinetuneData:
        """Map the decoded images into memory, or copy them to the device."""
        return _load(folder, self.device)


def _save(folder: Path, expected: Range, weights: Mapping[str, Tensor] | None, classes: int) -> None:
    torch.save({"range": vars(expected), "weights": weights, "classes": classes}, folder / BACKBONE)


@lru_cache(maxsize=1)
def _load(folder: Path, device: str) -> FinetuneData:
    data, trained = load(folder), torch.load(folder / BACKBONE, weights_only=True)
    mean, std = (torch.tensor(trained["range"][name])[:, None, None] for name in ("mean", "std"))
    train, validation, test = (
        replace(part, mean=mean, std=std).to(device) for part in (data.train, data.validation, data.test)
    )
    return FinetuneData(data.classes, train, validation, test, trained["weights"], trained["classes"])


@dataclass(frozen=True, kw_only=True)
class Finetune(ImageTraining):
    """Fine-tune a network that was trained with Batch Normalization, with large mini-batches and with small ones.

    Its last layer is replaced, and all of its weights are trained on, with each normalization in the place of Batch
    Normalization. Each one gets its best learning rate at each setting, chosen on validation images; then several seeds
    are run at that rate and evaluated on the test images. Without options the network is a small one, which is trained
    on one half of the classes first; the other half is what it is fine-tuned on. For trained weights of ImageNet:

    streamnorm run finetune --backbone efficientnet-lite0 --data FOLDER --size 96 --rates 1e-5 3e-5 1e-4 3e-4
    """

    name: ClassVar[str] = "finetune"
    title: ClassVar[str] = "Fine-tuning a trained network, down to one image at a time"
    summary: ClassVar[str] = "what to do with Batch Normalization when a trained network is fine-tuned on few images"
    question: ClassVar[str] = (
        "A network was trained with Batch Normalization on large mini-batches, and goes on with few images at a time. "
        "People hold the statistics still. Is it better to convert the layers to Streaming Normalization, which "
        "goes on from the statistics that are there, or to put Group Normalization in their place?"
    )
    catalogue: ClassVar[Mapping[str, FinetuneMethod]] = FINETUNE_METHODS
    kind: ClassVar[type[FinetuneTask]] = FinetuneTask
    words: ClassVar[Words] = FinetuneWords()
    per_sample: ClassVar[bool] = True
    reference: ClassVar[str] = "batch-frozen"
    comparisons: ClassVar[tuple[tuple[str, str], ...]] = (
        ("streaming-l1", "batch-frozen"),
        ("streaming-l1", "batch"),
        ("streaming-l1", "batch-recalibrated"),
        ("streaming-l1", "group"),
        ("streaming-l1", "streaming-l2"),
    )

    backbone: Annotated[str, conf.arg(metavar="NAME")] = SMALL
    """The trained network: small, which is trained first; efficientnet-lite0, whose weights a package has (extra
    "finetune"); or timm:NAME, with --weights."""

    weights: Annotated[str | None, conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """File with the weights of a network of timm, as state_dict (.pt, .pth, .safetensors)."""

    size: Annotated[int | None, conf.arg(metavar="INT", help_behavior_hint=""), Between(1)] = None
    """Scale images to this height and width. Default: as they are."""

    methods: MethodNames = ("batch-frozen", "batch", "group", "streaming-l1")
    """Normalizations to compare: Batch Normalization with its statistics held still (batch-frozen) or not (batch),
    Group Normalization, calibrated, and streaming-l1 and streaming-l2, as `sn.convert` makes them. Options make
    variants, for example streaming-l1,window=1000 or group,groups=4."""

    settings: SettingNames = ("32x1", "1x16", "4x1", "1x1")
    """Samples per mini-batch x mini-batches per weight update, for example 2x16."""

    rates: Rates = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Learning rates to try, per sample of a weight update: 0.001 is 0.032 where 32 samples make an update (the linear
    scaling rule). Each method gets its best one per setting, chosen on data held out for that."""

    width: Positive = 8
    """Channels of the small network's first convolution; the second has twice and the third four times as many."""

    first_epochs: Positive = 10
    """Passes over the first half of the classes, for the small network."""

    def check(self) -> None:
        """Look at the options before anything is read or written."""
        super().check()
        check_backbone(self.backbone, self.weights)
        if self.backbone != SMALL and self.data is None:
            raise UserError(f"--backbone {self.backbone}: name images in colour with --data, for the digits are not")

    def model(self, data: Data, method: str) -> nn.Module:
        """The trained network with a new head, and this method in the place of Batch Normalization."""
        assert isinstance(data, FinetuneData)
        images, _ = data.train.batch(slice(0, CALIBRATION))
        model = self._trained(data).to(images.device)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self.catalogue[method].prepare(model, images)

    def _trained(self, data: FinetuneData) -> nn.Module:
        if data.weights is None:
            return of_package(self.backbone, self.weights, data.classes)
        model = small(data.shape[0], data.first_classes, self.width)
        model.load_state_dict(data.weights)
        return with_new_head(model, data.classes)

    def work(self, setting: Setting) -> float:
        """A mini-batch costs as much by itself as its work for three images."""
        return 3.0 + setting.samples
