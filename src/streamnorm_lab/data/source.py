"""A source of labelled samples, which tells its sizes without reading them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from streamnorm_lab.common.errors import UserError

Samples = tuple[np.ndarray, np.ndarray]
"""Inputs of shape (N, …), and labels, int64 of shape (N,), or (N, places). Images are uint8 of shape (N, C, H, W)."""


@dataclass(frozen=True)
class Source:
    """A data set of labelled samples, most often images.

    ``train(n)`` reads the first n training samples, ``test()`` all test samples. ``default_train`` and
    ``default_validation`` are how many training samples a first look trains on and chooses learning rates on.
    ``classes`` is None where only the labels tell, and ``samples`` what they are called.
    """

    name: str
    description: str
    classes: int | None
    train_size: int
    test_size: int
    default_train: int
    default_validation: int
    train: Callable[[int], Samples]
    test: Callable[[], Samples]
    samples: str = "images"


def of_files(
    name: str, description: str, sizes: tuple[int, int], train: Callable[[int], Samples], test: Callable[[], Samples]
) -> Source:
    """A source of so many training and test samples, with the usual parts; the labels tell the classes."""
    validation = min(5000, sizes[0] // 5)
    return Source(
        name=name,
        description=description,
        classes=None,
        train_size=sizes[0],
        test_size=sizes[1],
        default_train=min(10_000, sizes[0] - validation),
        default_validation=validation,
        train=train,
        test=test,
    )


def refuse_empty(place: Path | str, train_size: int, test_size: int) -> None:
    """Refuse a source without samples.

    Raises:
        UserError: it has none to train on, or none to test on.
    """
    for split, size in (("train", train_size), ("test", test_size)):
        if size == 0:
            raise UserError(f"{place}: the {split} files hold no images: fetch them again")
