"""Parquet files in the layout of the Hub's data sets: a column of encoded images and a column of labels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from streamnorm_lab.common.errors import UserError, first_line
from streamnorm_lab.data.decoding import decode, stacked
from streamnorm_lab.data.source import Samples, Source, of_files, refuse_empty


def parquet_folder(folder: Path, size: int | None = None) -> Source:
    """Files train*.parquet and test*.parquet, at any depth.

    Raises:
        UserError: a split is missing, or a file cannot be read.
    """
    train = _split_files(folder, "train")
    test = _split_files(folder, "test")
    train_size = sum(_parquet(path).metadata.num_rows for path in train)
    test_size = sum(_parquet(path).metadata.num_rows for path in test)
    refuse_empty(folder, train_size, test_size)
    return of_files(
        folder.resolve().name,
        f"Parquet files in {folder}",
        (train_size, test_size),
        partial(_read, train, size),
        partial(_read, test, size, test_size),
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


def _read(paths: list[Path], size: int | None, count: int) -> Samples:
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    for path in paths:
        for encoded, label in _rows(path, count - len(labels)):
            pixels.append(decode(encoded, f"{path}: image {len(pixels)}", size))
            labels.append(label)
    return stacked(pixels, paths[0].parent), np.asarray(labels, dtype=np.int64)


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
