"""Training, validation and test images, decoded once and shared by all worker processes.

The parent decodes and writes plain arrays into the output folder; every worker maps them into its memory, so that
the pixels exist once however many workers there are.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.data.sources import Source

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Images kept as bytes, and standardized per channel whenever a batch of them is asked for."""

    pixels: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Standardized images, float32 of shape (n, C, H, W), and their labels."""
        return self.pixels[index].float().sub_(self.mean).div_(self.std), self.labels[index]

    def to(self, device: str) -> Split:
        """The same images on a device."""
        return Split(*(t.to(device) for t in (self.pixels, self.labels, self.mean, self.std)))

    def first(self, count: int) -> Split:
        """The first ``count`` images."""
        return Split(self.pixels[:count], self.labels[:count], self.mean, self.std)


@dataclass(frozen=True)
class Data:
    """The three splits. Rates are chosen on ``validation``; ``test`` is looked at once they are fixed."""

    classes: int
    train: Split
    validation: Split
    test: Split

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image, (C, H, W)."""
        return tuple(self.train.pixels.shape[1:])

    def to(self, device: str) -> Data:
        """The same images on a device."""
        return Data(self.classes, self.train.to(device), self.validation.to(device), self.test.to(device))


def split_sizes(
    source: Source, limit: int | None, validation: int | None, tune_limit: int | None = None
) -> tuple[int, int]:
    """The numbers of images to train on and to validate on.

    The training images are the first ones. Validation images are those right after them, or, if rates are chosen with
    runs on the first ``tune_limit`` images only, those right after these.

    Raises:
        UserError: the source has too few.
    """
    held_out = source.default_validation if validation is None else validation
    count = source.default_train if limit is None else limit
    if tune_limit is not None and not 1 <= tune_limit <= count:
        raise UserError(f"--tune-limit {tune_limit}: must be between 1 and the {count} training images of --limit")
    if count < 1 or held_out < 1 or max(count, (tune_limit or count) + held_out) > source.train_size:
        message = (
            f"--limit {count} and --validation {held_out} do not fit {source.name}: "
            f"it has {source.train_size} training images, and both must be at least 1"
        )
        raise UserError(message)
    return count, held_out


def prepare(
    source: Source, limit: int | None, validation: int | None, folder: Path, tune_limit: int | None = None
) -> dict[str, Any]:
    """Decode the images into ``folder`` and return what identifies them: name, sizes, classes, a fingerprint."""
    count, held_out = split_sizes(source, limit, validation, tune_limit)
    tune = tune_limit or count
    pixels, labels = source.train(max(count, tune + held_out))
    test_pixels, test_labels = source.test()
    arrays = {
        "train": (pixels[:count], labels[:count]),
        "validation": (pixels[tune : tune + held_out], labels[tune : tune + held_out]),
        "test": (test_pixels, test_labels),
    }
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for split, (images, targets) in arrays.items():
        for name, array in (("pixels", images), ("labels", targets)):
            values = np.ascontiguousarray(array).data
            (folder / f"{split}.{name}").write_bytes(values)
            digest.update(values)
    information = {
        "name": source.name,
        "description": source.description,
        "classes": len(source.classes),
        "shape": list(pixels.shape[1:]),
        **{split: len(targets) for split, (_, targets) in arrays.items()},
        "tune": tune,
        "fingerprint": digest.hexdigest()[:16],
    }
    (folder / "data.json").write_text(json.dumps(information), encoding="utf-8")
    return information


@lru_cache(maxsize=1)
def load(folder: Path) -> Data:
    """Map the prepared arrays into memory; one copy serves every run of a worker."""
    about = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    pixels = {s: _mapped(folder / f"{s}.pixels", np.uint8, (about[s], *about["shape"])) for s in SPLITS}
    labels = {s: _mapped(folder / f"{s}.labels", np.int64, (about[s],)) for s in SPLITS}
    mean, std = _channel_statistics(pixels["train"])
    splits = {s: Split(pixels[s], labels[s], mean, std) for s in SPLITS}
    return Data(about["classes"], **splits)


def _mapped(path: Path, kind: type[np.generic], shape: tuple[int, ...]) -> Tensor:
    # Copy on write, for torch wants memory that it may write to.
    return torch.from_numpy(np.memmap(path, dtype=kind, mode="c", shape=shape))


def _channel_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, of shape (C, 1, 1), from a thousand images at a time."""
    total = torch.zeros(pixels.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part in pixels.split(1000):
        values = part.double()
        total += values.sum((0, 2, 3))
        squares += values.square().sum((0, 2, 3))
    count = pixels.numel() / pixels.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
    return mean.float()[:, None, None], std.float()[:, None, None]
