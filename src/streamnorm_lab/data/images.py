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
from streamnorm_lab.data.source import Source

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Images kept as bytes, and standardized per channel whenever a batch of them is asked for.

    Samples of another kind, which have no ``mean`` and ``std``, are given as they are. They may have many labels each.
    """

    pixels: Tensor
    labels: Tensor
    mean: Tensor | None
    std: Tensor | None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def count(self) -> int:
        """The number of labels: one an image, or one for each place of a volume."""
        return self.labels.numel()

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Standardized images, float32 of shape (n, C, H, W), and their labels, those of each after the other."""
        pixels, labels = self.pixels[index], self.labels[index].flatten()
        if self.mean is None or self.std is None:
            return pixels.clone(), labels
        return pixels.float().sub_(self.mean).div_(self.std), labels

    def to(self, device: str) -> Split:
        """The same images on a device."""
        mean, std = (None if t is None else t.to(device) for t in (self.mean, self.std))
        return Split(self.pixels.to(device), self.labels.to(device), mean, std)

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
        raise UserError(
            f"--tune-limit {tune_limit}: must be between 1 and the {count} training {source.samples} of --limit"
        )
    if count < 1 or held_out < 1 or max(count, (tune_limit or count) + held_out) > source.train_size:
        message = (
            f"--limit {count} and --validation {held_out} do not fit {source.name}: "
            f"it has {source.train_size} training {source.samples}, and both must be at least 1"
        )
        raise UserError(message)
    return count, held_out


def prepare(
    source: Source,
    limit: int | None,
    validation: int | None,
    folder: Path,
    tune_limit: int | None = None,
    test_limit: int | None = None,
) -> dict[str, Any]:
    """Decode the images into ``folder`` and return what identifies them: name, sizes, classes, a fingerprint.

    Raises:
        UserError: the source has fewer images than are asked for.
    """
    count, held_out = split_sizes(source, limit, validation, tune_limit)
    tune = tune_limit or count
    pixels, labels = source.train(max(count, tune + held_out))
    test_pixels, test_labels = source.test()
    if test_limit is not None and test_limit > len(test_labels):
        raise UserError(f"--test-limit {test_limit}: {source.name} has {len(test_labels)} test {source.samples}")
    arrays = {
        "train": (pixels[:count], labels[:count]),
        "validation": (pixels[tune : tune + held_out], labels[tune : tune + held_out]),
        "test": (test_pixels[:test_limit], test_labels[:test_limit]),
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
        "classes": source.classes or _classes(source.name, *(targets for _, targets in arrays.values())),
        "shape": list(pixels.shape[1:]),
        **({} if pixels.dtype == np.uint8 else {"dtype": str(pixels.dtype)}),
        **({} if labels.ndim == 1 else {"targets": labels.shape[1]}),
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
    kind = np.dtype(about.get("dtype", "uint8"))
    pixels = {s: _mapped(folder / f"{s}.pixels", kind, (about[s], *about["shape"])) for s in SPLITS}
    each = (about["targets"],) if "targets" in about else ()
    labels = {s: _mapped(folder / f"{s}.labels", np.dtype(np.int64), (about[s], *each)) for s in SPLITS}
    mean, std = standardization(pixels["train"])
    splits = {s: Split(pixels[s], labels[s], mean, std) for s in SPLITS}
    return Data(about["classes"], **splits)


def _classes(name: str, *labels: np.ndarray) -> int:
    """The number of classes that labels from 0 on are of.

    Raises:
        UserError: there cannot be so many.
    """
    lowest, highest = min(int(part.min()) for part in labels), max(int(part.max()) for part in labels)
    count = sum(map(len, labels))
    if lowest < 0 or highest >= count:
        wrong = lowest if lowest < 0 else highest
        raise UserError(
            f"{name}: label {wrong} found among {count} samples; labels are 0, 1, and so on: damaged, or no labels"
        )
    return max(2, highest + 1)


def _mapped(path: Path, kind: np.dtype[Any], shape: tuple[int, ...]) -> Tensor:
    # Copy on write, for torch wants memory that it may write to.
    return torch.from_numpy(np.memmap(path, dtype=kind, mode="c", shape=shape))


def standardization(pixels: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Mean and standard deviation per channel, of shape (C, 1, 1), or nothing for samples that are no images."""
    if pixels.dtype != torch.uint8:
        return None, None
    total = torch.zeros(pixels.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part in pixels.split(1000):  # a thousand images at a time
        values = part.double()
        total += values.sum((0, 2, 3))
        squares += values.square().sum((0, 2, 3))
    count = pixels.numel() / pixels.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
    return mean.float()[:, None, None], std.float()[:, None, None]
