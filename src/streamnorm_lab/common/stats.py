"""Means with 95% intervals, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean and half the width of its 95% interval (Student's t; not a number for a single value)."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        """The lower bound."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper bound."""
        return self.mean + self.half

    @property
    def known(self) -> bool:
        """True if there were enough values for an interval."""
        return not math.isnan(self.half)


def interval(values: Sequence[float]) -> Interval:
    """The mean of ``values`` and its 95% interval.

    Example:
        >>> interval([1.0, 2.0, 3.0]).mean
        2.0
        >>> round(interval([1.0, 2.0, 3.0]).half, 3)
        2.484
    """
    from scipy import stats  # takes a second to import, and training processes do not need it

    array = np.asarray(values, dtype=np.float64)
    if array.size < 2:
        return Interval(float(array.mean()), math.nan)
    quantile = float(stats.t.ppf(0.975, array.size - 1))
    return Interval(float(array.mean()), quantile * float(array.std(ddof=1)) / math.sqrt(array.size))


def spread_words(seeds: Iterable[int]) -> str:
    """The description of values that come from so many seeds.

    Example:
        >>> spread_words([5, 5]), spread_words([1, 0])
        ('mean and 95% interval of 5 seeds', 'one seed, so no interval')
    """
    most = max(seeds, default=0)
    return f"mean and 95% interval of {most} seeds" if most > 1 else "one seed, so no interval"


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """The mean difference over the seeds that both have; None if they share none.

    The same seed means the same initial weights and the same order of the data, so much of the noise cancels.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    return interval([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None
