"""Generated volumes with bodies of two kinds, from one scanner or from many, and the class of every place in them."""

from __future__ import annotations

from functools import partial

import numpy as np

from streamnorm_lab.data.source import Samples, Source

CLASSES = 3
"""Background, and two kinds of bodies, which are brighter by 1 and by 2."""

CLOUDS, NOISE = 0.3, 0.3
"""The deviations of a smooth field and of white noise, which every volume has."""

GAIN, OFFSET = 0.5, 1.0
"""The deviations of the logarithm of a scanner's gain, and of its offset."""
GAIN_WORDS = f"with a gain of exp({GAIN:g}·z) and an offset of {OFFSET:g}·z, z from the normal distribution"

TRAIN, TEST, FIRST_LOOK = 2000, 64, 120

MANY = "many"
"""The word for volumes of which each is from a scanner of its own."""


def volumes(size: int, scanners: str, standardize: bool) -> Source:
    """Volumes of ``size`` places along each axis; their labels are the classes of all places, one after the other.

    Args:
        size: the length of an edge.
        scanners: "many" if each volume has a gain and an offset of its own; the bodies in it stay the same.
        standardize: True if each volume is given mean 0 and deviation 1.
    """
    many = scanners == MANY
    differ = f"each {GAIN_WORDS}" if many else "all of one gain and offset"
    after = ", then brought to mean 0 and deviation 1" if standardize else ""
    return Source(
        name=f"{scanners}-scanner{'s' * many}{'-standardized' * standardize}",
        description=f"generated volumes with ellipsoids of two brightnesses in clouds and noise, {differ}{after}",
        classes=CLASSES,
        train_size=TRAIN,
        test_size=TEST,
        default_train=FIRST_LOOK,
        default_validation=TEST,
        train=partial(_first, 0, size, many, standardize),
        test=partial(_first, 1, size, many, standardize, TEST),
        samples="volumes",
    )


def _first(part: int, size: int, differ: bool, standardize: bool, count: int) -> Samples:
    """The first ``count`` volumes of a part: each has a generator of its own."""
    made = [_volume(np.random.default_rng([part, i]), size) for i in range(count)]
    inputs, labels = np.stack([x for x, _ in made]), np.stack([label for _, label in made])
    for i in range(count) if differ else ():
        scanner = np.random.default_rng([2 + part, i])
        inputs[i] = np.exp(GAIN * scanner.standard_normal()) * inputs[i] + OFFSET * scanner.standard_normal()
    if standardize:
        axes = (1, 2, 3)
        inputs = (inputs - inputs.mean(axes, keepdims=True)) / inputs.std(axes, keepdims=True)
    return inputs[:, None].astype(np.float32), labels.reshape(count, -1)


def _volume(random: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A volume in which every class is found, and the classes of its places."""
    label = np.zeros((size, size, size), np.int64)
    while len(np.unique(label)) < CLASSES:
        label[...] = 0
        for kind in range(1, CLASSES):
            for _ in range(random.integers(1, 3)):
                label[_ellipsoid(random, size)] = kind
    return label + CLOUDS * _clouds(random, size) + NOISE * random.standard_normal(label.shape), label


def _ellipsoid(random: np.random.Generator, size: int) -> np.ndarray:
    """The places of an ellipsoid whose half-axes are 18% to 32% of the edge."""
    center, half = random.uniform(0.2, 0.8, 3), random.uniform(0.18, 0.32, 3)
    places = (np.arange(size) + 0.5) / size
    x, y, z = (((places - c) / h) ** 2 for c, h in zip(center, half, strict=True))
    inside: np.ndarray = x[:, None, None] + y[:, None] + z <= 1
    return inside


def _clouds(random: np.random.Generator, size: int) -> np.ndarray:
    """Normal values at 4×4×4 knots, and what lies between them in proportion."""
    at, knots = np.linspace(0, 3, size), np.arange(4)
    weights = np.clip(1 - np.abs(at[:, None] - knots), 0, None)
    field = random.standard_normal((4, 4, 4))
    mixed: np.ndarray = np.einsum("xa,yb,zc,abc->xyz", weights, weights, weights, field)
    return mixed
