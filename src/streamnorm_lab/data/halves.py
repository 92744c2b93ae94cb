"""The two halves of a data set's classes: one to learn from first, the other to go on with."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.data.source import Samples, Source, of_files


def halves(source: Source) -> tuple[Source, Source]:
    """The first half of the classes, and the second, each with labels from 0 on; reads all of it.

    Raises:
        UserError: there are fewer than four classes.
    """
    train, test = source.train(source.train_size), source.test()
    classes = int(max(train[1].max(), test[1].max())) + 1
    if classes < 4:
        raise UserError(f"{source.name} has {classes} classes, and each half needs at least two")
    return _part(source, train, test, 0, classes // 2), _part(source, train, test, classes // 2, classes)


def _part(source: Source, train: Samples, test: Samples, first: int, end: int) -> Source:
    train, test = _of_classes(train, first, end), _of_classes(test, first, end)
    classes = f"classes {first} to {end - 1}"
    made = of_files(
        f"{source.name}-{first}-{end - 1}",
        f"{source.description}; of these {classes} alone",
        (len(train[1]), len(test[1])),
        partial(_first, train),
        partial(_first, test, len(test[1])),
    )
    return replace(made, classes=end - first)


def _of_classes(samples: Samples, first: int, end: int) -> Samples:
    inputs, labels = samples
    chosen = (labels >= first) & (labels < end)
    return inputs[chosen], labels[chosen] - first


def _first(samples: Samples, count: int) -> tuple[np.ndarray, np.ndarray]:
    inputs, labels = samples
    return inputs[:count], labels[:count]
