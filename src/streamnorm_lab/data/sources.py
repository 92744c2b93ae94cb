"""The source that an option names: scikit-learn's digits, a folder of images in one of three forms, a function.

A source tells its sizes without reading the images, so that a wrong path is noticed at once.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.files import typed_path
from streamnorm_lab.common.functions import names_a_function
from streamnorm_lab.data.datasets import from_function
from streamnorm_lab.data.decoding import resized
from streamnorm_lab.data.image_folder import image_folder, is_image_folder
from streamnorm_lab.data.parquet import parquet_folder
from streamnorm_lab.data.source import Samples, Source, of_files

CIFAR10_CLASSES = 10
CIFAR10_RECORD = 1 + 3 * 32 * 32  # bytes of one image in the binary version: the label, then the pixels

DIGITS_TRAIN = 1297  # of 1,797
DIGITS_FIRST_LOOK = 800  # few enough for a first experiment of two minutes


def open_source(path: str | None, size: int | None = None) -> Source:
    """Find out what lies at ``path``; without a path, the digits.

    Args:
        path: a folder, or ``MODULE:FUNCTION``.
        size: height and width that images are scaled to; None leaves them as they are.

    Raises:
        UserError: nothing there, or nothing that is known.
    """
    if path is None:
        return digits(size)
    folder = typed_path(path)
    if not folder.exists():
        if names_a_function(path):
            return from_function(path, size)
        raise UserError(f"--data {path}: no such folder; see `streamnorm data --help` for what it may hold")
    if not folder.is_dir():
        raise UserError(f"--data {path}: this is a file; name the folder that it lies in")
    if any(folder.rglob("*.parquet")):
        return parquet_folder(folder, size)
    if any(folder.rglob("data_batch_*.bin")):
        return binary_folder(folder, size)
    if any(folder.rglob("data_batch_1")):
        message = (
            f"--data {path}: this is CIFAR-10's Python version, whose pickle files are not read for safety; "
            "get the binary version with `streamnorm data --download FOLDER`"
        )
        raise UserError(message)
    if is_image_folder(folder):
        return image_folder(folder, size)
    message = (
        f"--data {path}: neither Parquet files nor CIFAR-10's data_batch_*.bin nor folders of images are in it; "
        "see `streamnorm data --help` for what it may hold"
    )
    raise UserError(message)


def digits(size: int | None = None) -> Source:
    """Scikit-learn's handwritten digits, which come with the package: 8×8 pixels, 1,797 images."""

    def read() -> Samples:
        from sklearn.datasets import load_digits  # takes a second to import, and only this source needs it

        bunch = load_digits()
        order = np.random.default_rng(0).permutation(len(bunch.target))  # neighbours come from the same writer
        pixels = bunch.images[order, None] * 15  # 0 to 16 becomes 0 to 240
        return pixels.astype(np.uint8), bunch.target[order].astype(np.int64)

    def part(start: int, stop: int | None) -> Samples:
        pixels, labels = read()
        return resized(pixels[start:stop], size), labels[start:stop]

    return Source(
        name="digits",
        description="scikit-learn's handwritten digits, 10 classes, shuffled once with a fixed seed",
        classes=10,
        train_size=DIGITS_TRAIN,
        test_size=1797 - DIGITS_TRAIN,
        default_train=DIGITS_FIRST_LOOK,
        default_validation=DIGITS_TRAIN - 1000,
        train=partial(part, 0),
        test=partial(part, DIGITS_TRAIN, None),
    )


def binary_folder(folder: Path, size: int | None = None) -> Source:
    """CIFAR-10's official binary version: data_batch_1.bin and so on, and test_batch.bin.

    Raises:
        UserError: the test images are missing, or a file is cut short.
    """
    train = sorted(folder.rglob("data_batch_*.bin"))
    test = sorted(folder.rglob("test_batch.bin"))
    if not test:
        raise UserError(f"{folder}: test_batch.bin is missing; unpack the whole archive there")
    train_size = sum(map(_count_records, train))
    test_size = sum(map(_count_records, test))
    return of_files(
        "cifar10",
        f"CIFAR-10's binary files in {folder}",
        (train_size, test_size),
        partial(_read_binary, train, size),
        partial(_read_binary, test, size, test_size),
    )


def _count_records(path: Path) -> int:
    size = path.stat().st_size
    if size == 0 or size % CIFAR10_RECORD:
        message = f"{path} has {size} bytes, no multiple of {CIFAR10_RECORD}: it is cut short, fetch it again"
        raise UserError(message)
    return size // CIFAR10_RECORD


def _read_binary(paths: list[Path], size: int | None, count: int) -> Samples:
    parts = [np.fromfile(path, dtype=np.uint8).reshape(-1, CIFAR10_RECORD) for path in paths]
    records = np.concatenate(parts)[:count]
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= CIFAR10_CLASSES:
        message = f"{paths[0]}: label {labels.max()} found, labels are 0 to 9: damaged, or another data set"
        raise UserError(message)
    return resized(records[:, 1:].reshape(-1, 3, 32, 32), size), labels
