"""Sources of images: scikit-learn's digits, Parquet files in the Hub's layout, CIFAR-10's binary files.

A source tells its sizes without reading the images, so that a wrong path is noticed at once.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from streamnorm_lab.common.errors import UserError, first_line
from streamnorm_lab.common.files import typed_path

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_RECORD = 1 + 3 * 32 * 32  # bytes of one image in the binary version: the label, then the pixels

LARGEST_IMAGE = 1 << 20
"""Pixels. A few kilobytes can decode to gigabytes; the experiments are for small images."""

DIGITS_TRAIN = 1297  # of 1,797
DIGITS_FIRST_LOOK = 800  # few enough for a first experiment of two minutes

Images = tuple[np.ndarray, np.ndarray]
"""Pixels, uint8 of shape (N, C, H, W), and labels, int64 of shape (N,)."""


@dataclass(frozen=True)
class Source:
    """A data set of labelled images.

    ``train(n)`` reads the first n training images, ``test()`` all test images. ``default_train`` and
    ``default_validation`` are how many training images a first look trains on and chooses learning rates on.
    """

    name: str
    description: str
    classes: tuple[str, ...]
    train_size: int
    test_size: int
    default_train: int
    default_validation: int
    train: Callable[[int], Images]
    test: Callable[[], Images]


def open_source(path: str | None) -> Source:
    """Find out what lies at ``path``; without a path, the digits.

    Raises:
        UserError: nothing there, or nothing that is known.
    """
    if path is None:
        return digits()
    folder = typed_path(path)
    if not folder.exists():
        raise UserError(f"--data {path}: no such folder; see `streamnorm data --help` for what it may hold")
    if not folder.is_dir():
        raise UserError(f"--data {path}: this is a file; name the folder that it lies in")
    if any(folder.rglob("*.parquet")):
        return parquet_folder(folder)
    if any(folder.rglob("data_batch_*.bin")):
        return binary_folder(folder)
    if any(folder.rglob("data_batch_1")):
        message = (
            f"--data {path}: this is CIFAR-10's Python version, whose pickle files are not read for safety; "
            "get the binary version with `streamnorm data --download FOLDER`"
        )
        raise UserError(message)
    message = (
        f"--data {path}: neither Parquet files nor CIFAR-10's data_batch_*.bin are in it; "
        "see `streamnorm data --help` for what it may hold"
    )
    raise UserError(message)


def digits() -> Source:
    """Scikit-learn's handwritten digits, which come with the package: 8×8 pixels, 1,797 images."""

    def read() -> Images:
        from sklearn.datasets import load_digits  # takes a second to import, and only this source needs it

        bunch = load_digits()
        order = np.random.default_rng(0).permutation(len(bunch.target))  # neighbours come from the same writer
        pixels = bunch.images[order, None] * 15  # 0 to 16 becomes 0 to 240
        return pixels.astype(np.uint8), bunch.target[order].astype(np.int64)

    def part(start: int, stop: int | None) -> Images:
        pixels, labels = read()
        return pixels[start:stop], labels[start:stop]

    return Source(
        name="digits",
        description="scikit-learn's handwritten digits, 10 classes, shuffled once with a fixed seed",
        classes=tuple("0123456789"),
        train_size=DIGITS_TRAIN,
        test_size=1797 - DIGITS_TRAIN,
        default_train=DIGITS_FIRST_LOOK,
        default_validation=DIGITS_TRAIN - 1000,
        train=partial(part, 0),
        test=partial(part, DIGITS_TRAIN, None),
    )


def parquet_folder(folder: Path) -> Source:
    """Parquet files in the Hub's ``cifar10`` layout: a column of encoded images and a column of labels.

    Raises:
        UserError: a split is missing, or a file cannot be read.
    """
    train = _split_files(folder, "train")
    test = _split_files(folder, "test")
    train_size = sum(_parquet(path).metadata.num_rows for path in train)
    test_size = sum(_parquet(path).metadata.num_rows for path in test)
    _refuse_empty(folder, train_size, test_size)
    return _cifar(
        folder.resolve().name,
        f"Parquet files in {folder}",
        (train_size, test_size),
        partial(_read_parquet, train),
        partial(_read_parquet, test, test_size),
    )


def binary_folder(folder: Path) -> Source:
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
    return _cifar(
        "cifar10",
        f"CIFAR-10's binary files in {folder}",
        (train_size, test_size),
        partial(_read_binary, train),
        partial(_read_binary, test, test_size),
    )


def _refuse_empty(folder: Path, train_size: int, test_size: int) -> None:
    for split, size in (("train", train_size), ("test", test_size)):
        if size == 0:
            raise UserError(f"{folder}: the {split} files hold no images: fetch them again")


def _cifar(
    name: str, place: str, sizes: tuple[int, int], train: Callable[[int], Images], test: Callable[[], Images]
) -> Source:
    validation = min(5000, sizes[0] // 5)
    return Source(
        name=name,
        description=f"{place}, labelled {', '.join(CIFAR10)}",
        classes=CIFAR10,
        train_size=sizes[0],
        test_size=sizes[1],
        default_train=min(10_000, sizes[0] - validation),
        default_validation=validation,
        train=train,
        test=test,
    )


def _split_files(folder: Path, split: str) -> list[Path]:
    files = sorted(folder.rglob(f"{split}*.parquet"))
    if not files:
        message = f"{folder}: no file {split}*.parquet in it; both train*.parquet and test*.parquet are needed"
        raise UserError(message)
    return files


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except PermissionError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({first_line(error)}): fetch it again") from None


def _read_parquet(paths: list[Path], count: int) -> Images:
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    for path in paths:
        for encoded, label in _rows(path, count - len(labels)):
            pixels.append(_decode(encoded, path, len(pixels)))
            labels.append(label)
    if len({image.shape for image in pixels}) > 1:
        raise UserError(f"{paths[0].parent}: the images are of different sizes; they must all have one size")
    return np.stack(pixels), _checked(np.asarray(labels, dtype=np.int64), paths[0])


def _rows(path: Path, count: int) -> Iterator[tuple[bytes, int]]:
    """The first ``count`` rows of a file as encoded images and labels."""
    import pyarrow as pa

    file = _parquet(path)
    names = file.schema_arrow.names
    column = next((name for name in ("img", "image") if name in names), None)
    if column is None or "label" not in names:
        raise UserError(f"{path} has the columns {', '.join(names)}: needed are img (or image) and label")
    try:
        for batch in file.iter_batches(batch_size=1000, columns=[column, "label"]):
            rows = batch.slice(0, count).to_pylist()
            yield from ((row[column]["bytes"], _whole(row["label"])) for row in rows)
            count -= len(rows)
            if count == 0:
                return
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): fetch it again") from None
    except (TypeError, KeyError, ValueError):
        message = f"{path}: {column} must hold structs with `bytes`, an encoded image, and label a whole number"
        raise UserError(message) from None


def _whole(label: Any) -> int:
    """A label, which may be a float without a fraction."""
    if isinstance(label, bool | str) or label != int(label):
        raise ValueError(label)
    return int(label)


def _decode(encoded: bytes, path: Path, number: int) -> np.ndarray:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(encoded)) as image:
                if image.width * image.height > LARGEST_IMAGE:
                    raise Image.DecompressionBombError
                return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        message = f"{path}: image {number} has more than {LARGEST_IMAGE:,} pixels: damaged, or not meant for this"
        raise UserError(message) from None
    except Exception as error:  # a decoder raises whatever damaged bytes lead to
        message = f"{path}: image {number} cannot be decoded ({first_line(error)}): fetch the file again"
        raise UserError(message) from None


def _count_records(path: Path) -> int:
    size = path.stat().st_size
    if size == 0 or size % CIFAR10_RECORD:
        message = f"{path} has {size} bytes, no multiple of {CIFAR10_RECORD}: it is cut short, fetch it again"
        raise UserError(message)
    return size // CIFAR10_RECORD


def _read_binary(paths: list[Path], count: int) -> Images:
    parts = [np.fromfile(path, dtype=np.uint8).reshape(-1, CIFAR10_RECORD) for path in paths]
    records = np.concatenate(parts)[:count]
    labels = _checked(records[:, 0].astype(np.int64), paths[0])
    return records[:, 1:].reshape(-1, 3, 32, 32), labels


def _checked(labels: np.ndarray, path: Path) -> np.ndarray:
    wrong = labels[(labels < 0) | (labels >= len(CIFAR10))]
    if wrong.size:
        message = f"{path}: label {wrong[0]} found, labels are 0 to {len(CIFAR10) - 1}: damaged, or another data set"
        raise UserError(message)
    return labels
