"""Where images come from: scikit-learn's digits, Parquet files in the Hub's layout, CIFAR-10's binary files.

A source tells its sizes without reading the images, so that a wrong path is noticed at once.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from streamnorm.experiments.errors import UserError

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

Images = tuple[np.ndarray, np.ndarray]
"""Pixels, uint8 of shape (N, C, H, W), and labels, int64 of shape (N,)."""


class Source(ABC):
    """A data set of labelled images, divided into training and test images."""

    name: str
    classes: tuple[str, ...]
    train_size: int
    test_size: int
    default_validation: int

    @abstractmethod
    def describe(self) -> str:
        """One sentence: what it is and where it lies."""

    @abstractmethod
    def train(self, count: int) -> Images:
        """The first ``count`` training images."""

    @abstractmethod
    def test(self) -> Images:
        """All test images."""


def open_source(path: str | None) -> Source:
    """Find out what lies at ``path``; without a path, the digits.

    Raises:
        UserError: nothing there, or nothing that is known.
    """
    if path is None:
        return Digits()
    folder = Path(path).expanduser()
    if not folder.exists():
        raise UserError(f"--data {path}: no such folder; see `streamnorm data --help` for what it may hold")
    if not folder.is_dir():
        raise UserError(f"--data {path}: this is a file; name the folder that it lies in")
    if any(folder.rglob("*.parquet")):
        return ParquetFolder(folder)
    if any(folder.rglob("data_batch_*.bin")):
        return BinaryFolder(folder)
    if any(folder.rglob("data_batch_1")):
        message = (
            f"--data {path}: this is CIFAR-10's Python version, whose pickle files are not read for safety; "
            "get the binary version with `streamnorm data --download FOLDER`"
        )
        raise UserError(message)
    message = f"--data {path}: neither Parquet files nor CIFAR-10's data_batch_*.bin are in it; see `streamnorm data --help`"
    raise UserError(message)


class Digits(Source):
    """Scikit-learn's handwritten digits, which come with the package: 8×8 pixels, 1,797 images."""

    name = "digits"
    classes = tuple("0123456789")
    train_size = 1297
    test_size = 500
    default_validation = 297

    def describe(self) -> str:
        return "scikit-learn's handwritten digits, 8×8 pixels, 10 classes, shuffled once with a fixed seed"

    def train(self, count: int) -> Images:
        pixels, labels = self._all()
        return pixels[:count], labels[:count]

    def test(self) -> Images:
        pixels, labels = self._all()
        return pixels[self.train_size :], labels[self.train_size :]

    def _all(self) -> Images:
        from sklearn.datasets import load_digits  # takes a second to import, and only this source needs it

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))  # neighbours come from the same writer
        pixels = digits.images[order, None] * 15  # 0 to 16 becomes 0 to 240
        return pixels.astype(np.uint8), digits.target[order].astype(np.int64)


class ParquetFolder(Source):
    """Parquet files in the Hub's ``cifar10`` layout: a column of encoded images and a column of labels."""

    classes = CIFAR10

    def __init__(self, folder: Path) -> None:
        self.name = folder.resolve().name
        self._folder = folder
        self._train = self._files("train")
        self._test = self._files("test")
        self.train_size = sum(_parquet(path).metadata.num_rows for path in self._train)
        self.test_size = sum(_parquet(path).metadata.num_rows for path in self._test)
        self.default_validation = min(5000, self.train_size // 5)

    def describe(self) -> str:
        return f"Parquet files of labelled images ({', '.join(self.classes)}) in {self._folder}"

    def train(self, count: int) -> Images:
        return self._read(self._train, count)

    def test(self) -> Images:
        return self._read(self._test, self.test_size)

    def _files(self, split: str) -> list[Path]:
        files = sorted(self._folder.rglob(f"{split}*.parquet"))
        if not files:
            raise UserError(f"{self._folder}: no file {split}*.parquet in it; both train*.parquet and test*.parquet are needed")
        return files

    def _read(self, paths: list[Path], count: int) -> Images:
        pixels: list[np.ndarray] = []
        labels: list[int] = []
        for path in paths:
            for image, label in _rows(path, count - len(labels)):
                pixels.append(_decode(image, path, len(pixels)))
                labels.append(label)
        if len({image.shape for image in pixels}) > 1:
            raise UserError(f"{self._folder}: the images are of different sizes; they must all have one size")
        return np.stack(pixels), _checked(np.asarray(labels, dtype=np.int64), self.classes, self._folder)


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except PermissionError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({_first_line(error)}): fetch it again") from None


def _rows(path: Path, count: int) -> list[tuple[bytes, int]]:
    """The first ``count`` rows of a file as encoded images and labels."""
    import pyarrow as pa

    file = _parquet(path)
    names = file.schema_arrow.names
    column = next((name for name in ("img", "image") if name in names), None)
    if column is None or "label" not in names:
        raise UserError(f"{path} has the columns {', '.join(names)}: needed are img (or image) and label")
    rows: list[tuple[bytes, int]] = []
    try:
        for batch in file.iter_batches(batch_size=1000, columns=[column, "label"]):
            if len(rows) >= count:
                break
            images, labels = batch.column(column).to_pylist(), batch.column("label").to_pylist()
            rows += [(image["bytes"], int(label)) for image, label in zip(images, labels, strict=True)]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged ({_first_line(error)}): fetch it again") from None
    except (TypeError, KeyError):
        message = f"{path}: column {column!r} must hold structs with `bytes`, an encoded image, and label a number"
        raise UserError(message) from None
    return rows[:count]


def _decode(encoded: bytes, path: Path, number: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except (OSError, TypeError, SyntaxError) as error:  # what Pillow raises for bytes that are no image
        raise UserError(f"{path}: image {number} cannot be decoded ({_first_line(error)}): fetch the file again") from None


class BinaryFolder(Source):
    """CIFAR-10's official binary version: records of one label byte and 3·32·32 pixel bytes."""

    name = "cifar10"
    classes = CIFAR10
    _RECORD = 1 + 3 * 32 * 32

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._train = sorted(folder.rglob("data_batch_*.bin"))
        self._test = sorted(folder.rglob("test_batch.bin"))
        if not self._test:
            raise UserError(f"{folder}: test_batch.bin is missing; unpack the whole archive there")
        self.train_size = sum(self._count(path) for path in self._train)
        self.test_size = sum(self._count(path) for path in self._test)
        self.default_validation = min(5000, self.train_size // 5)

    def describe(self) -> str:
        return f"CIFAR-10 ({', '.join(self.classes)}), binary version, in {self._folder}"

    def train(self, count: int) -> Images:
        return self._read(self._train, count)

    def test(self) -> Images:
        return self._read(self._test, self.test_size)

    def _count(self, path: Path) -> int:
        size = path.stat().st_size
        if size == 0 or size % self._RECORD:
            message = f"{path} has {size} bytes, which is no multiple of {self._RECORD}: it is cut short, fetch it again"
            raise UserError(message)
        return size // self._RECORD

    def _read(self, paths: list[Path], count: int) -> Images:
        records = np.concatenate([np.fromfile(path, dtype=np.uint8).reshape(-1, self._RECORD) for path in paths])[:count]
        labels = _checked(records[:, 0].astype(np.int64), self.classes, self._folder)
        return records[:, 1:].reshape(-1, 3, 32, 32), labels


def _checked(labels: np.ndarray, classes: tuple[str, ...], folder: Path) -> np.ndarray:
    wrong = labels[(labels < 0) | (labels >= len(classes))]
    if wrong.size:
        message = f"{folder}: label {wrong[0]} found; labels must be 0 to {len(classes) - 1}: the file is damaged or another data set"
        raise UserError(message)
    return labels


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
