"""A folder of images, one folder for each class, as torchvision's ImageFolder reads it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.data.decoding import decode, stacked
from streamnorm_lab.data.source import Samples, Source, of_files

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"))
TEST = ("test", "val", "valid", "validation")
"""The names that the folder of test images may have, beside ``train``."""

TEST_SHARE = 5
"""The number of images of which one is for testing, where there is no such folder."""

Files = list[tuple[Path, int]]
"""Images with their labels."""


def is_image_folder(folder: Path) -> bool:
    """Whether there are folders with images in it."""
    return any(path.suffix.lower() in SUFFIXES for path in folder.glob("*/**/*"))


def image_folder(folder: Path, size: int | None = None) -> Source:
    """Images in ``train/CLASS`` and ``test/CLASS``, or in ``CLASS`` alone: then every fifth is for testing.

    Raises:
        UserError: there are fewer than two classes, or a class that is tested and not trained.
    """
    train, test, names = _split(folder)
    return of_files(
        folder.resolve().name,
        f"images in {folder}, in folders of {len(names)} classes, shuffled once with a fixed seed",
        (len(train), len(test)),
        lambda count: _read(train[:count], size, folder),
        partial(_read, test, size, folder),
    )


def _split(folder: Path) -> tuple[Files, Files, list[str]]:
    train = folder / "train"
    test = next((folder / name for name in TEST if (folder / name).is_dir()), None)
    if train.is_dir() and test is not None:
        names = _classes(train)
        unknown = [name for name in _classes(test) if name not in names]
        if unknown:
            raise UserError(f"{test}: class {unknown[0]!r} is not among those of {train}")
        return _shuffled(_files(train, names)), _shuffled(_files(test, names)), names
    names = _classes(folder)
    files = _shuffled(_files(folder, names))
    return files[len(files) // TEST_SHARE :], files[: len(files) // TEST_SHARE], names


def _classes(folder: Path) -> list[str]:
    """The names of folders that hold images."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and any(_images(path)))
    if len(names) < 2:
        found = f"found {names[0]!r} alone" if names else "found none"
        raise UserError(f"{folder}: a folder with images is needed for each of at least two classes; {found}")
    return names


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _files(folder: Path, names: list[str]) -> Files:
    return [(path, label) for label, name in enumerate(names) for path in _images(folder / name)]


def _shuffled(files: Files) -> Files:
    return [files[i] for i in np.random.default_rng(0).permutation(len(files))]


def _read(files: Files, size: int | None, folder: Path) -> Samples:
    pixels = [decode(path, str(path), size) for path, _ in files]
    return stacked(pixels, folder), np.asarray([label for _, label in files], dtype=np.int64)
