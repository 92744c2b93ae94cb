"""Classifying images: whole passes over the training images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.forms import Size
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.data.augment import Shifts
from streamnorm_lab.data.images import Data, Split, load, prepare, split_sizes
from streamnorm_lab.data.source import Source
from streamnorm_lab.data.sources import open_source
from streamnorm_lab.data.task import Batch, Scores, Task
from streamnorm_lab.logs.records import DataRecord

_SHIFT_SEED = 500_009  # the shifts of a pass are drawn apart from its order


class _ImageFacts(DataRecord):
    shape: list[Size]


class ImageFacts(_ImageFacts, total=False):
    """The facts that identify images; folders of earlier versions have no short runs, ``tune``.

    Samples that are no images have a ``dtype``.
    """

    tune: Size
    dtype: str


@dataclass(frozen=True)
class Images:
    """A source and how many of its images are used."""

    source: Source
    limit: int | None
    validation: int | None
    tune_limit: int | None
    test_limit: int | None

    @property
    def name(self) -> str:
        """The source's name."""
        return self.source.name

    def prepare(self, folder: Path) -> dict[str, Any]:
        """Decode the images into ``folder``."""
        return prepare(self.source, self.limit, self.validation, folder, self.tune_limit, self.test_limit)


@dataclass(frozen=True)
class ImageTask(Task[Data]):
    """Images, shuffled at each pass.

    Args:
        path: where they lie; None for scikit-learn's digits.
        limit: how many to train on; None for the source's default.
        validation: how many to choose rates on; None for the source's default.
        tune_limit: how many to train on while rates are chosen; None for as many as otherwise.
        test_limit: how many to test on; None for all.
        epochs: passes.
        curve_images: test images for the points of a curve.
        device: where they are held and trained on.
        augment: whether they are shifted by up to an eighth of their size, and those in colour mirrored.
        size: height and width that they are scaled to; None leaves them as they are.
    """

    path: str | None
    limit: int | None
    validation: int | None
    tune_limit: int | None
    test_limit: int | None
    epochs: int
    curve_images: int
    device: str
    augment: bool = False
    size: int | None = None

    unit: ClassVar[str] = "images"
    form: ClassVar[type] = ImageFacts

    @property
    def units_per_sample(self) -> int:
        """A sample is an image."""
        return 1

    def open(self, settings: Sequence[Setting]) -> Images:
        """Find the images, without reading them."""
        return self._of(open_source(self.path, self.size), settings)

    def _of(self, source: Source, settings: Sequence[Setting]) -> Images:
        """As many images of a source as are asked for.

        Raises:
            UserError: they do not fit the settings, or there are too few.
        """
        images, _ = split_sizes(source, self.limit, self.validation, self.tune_limit)
        images = self.tune_limit or images
        for setting in settings:
            if setting.samples > images:
                raise UserError(
                    f"setting {setting}: a mini-batch cannot have more than the {images} training {source.samples}"
                )
        return Images(source, self.limit, self.validation, self.tune_limit, self.test_limit)

    def load(self, folder: Path) -> Data:
        """Map the decoded images into memory, or copy them to the device."""
        return _load(folder, self.device)

    def part(self, data: Data, stage: str) -> Data:
        """Fewer training images where rates are chosen with short runs."""
        short = self.tune_limit if stage == "tune" else None
        return replace(data, train=data.train.first(short)) if short else data

    def schedule(self, data: Data, setting: Setting) -> tuple[int, int]:
        """Passes, and the updates that the whole mini-batches of one give."""
        return self.epochs, math.ceil(len(data.train) // setting.samples / setting.batches)

    def batches(self, data: Data, setting: Setting, seed: int, epoch: int, first_update: int) -> Iterator[Batch]:
        """Yield all images, shuffled for this pass; those left over when it is cut into mini-batches are not used."""
        shuffle = torch.Generator().manual_seed(1_000_003 * epoch + seed)
        order = torch.randperm(len(data.train), generator=shuffle)
        start, whole = first_update * setting.batches * setting.samples, len(order) // setting.samples
        batches = map(data.train.batch, order[start : whole * setting.samples].split(setting.samples))
        return self._shifted(data, batches, seed, epoch, start) if self.augment else batches

    def _shifted(self, data: Data, batches: Iterator[Batch], seed: int, epoch: int, start: int) -> Iterator[Batch]:
        channels, height, _ = data.shape
        mirror = channels > 1  # a digit's mirror image is no digit
        shifts = Shifts.draw(len(data.train), height // 8, mirror, _SHIFT_SEED + 1_000_003 * epoch + seed, self.device)
        for images, labels in batches:
            yield shifts.apply(images, start), labels
            start += len(labels)

    def watched(self, data: Data) -> Split:
        """The first test images."""
        return data.test.first(self.curve_images)

    def mini_batches(self, facts: Mapping[str, Any], setting: Setting, stage: str) -> int:
        """The mini-batches of all passes."""
        short = self.tune_limit if stage == "tune" else None
        return self.epochs * (int(short or facts["train"]) // setting.samples)

    def amounts(self, facts: Mapping[str, Any]) -> dict[str, int]:
        """Images to train on, to choose rates on, and to train on meanwhile."""
        short = facts.get("tune", facts["train"])
        return {"limit": facts["train"], "validation": facts["validation"], "tune_limit": short}

    @staticmethod
    def guess(classes: int) -> Scores:
        """One class in so many is right."""
        return {"loss": None, "accuracy": 1 / classes}


@lru_cache(maxsize=1)
def _load(folder: Path, device: str) -> Data:
    data = load(folder)
    return data if device == "cpu" else data.to(device)
