"""The number that an experiment judges by: which way is better, and how a reader sees it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from streamnorm_lab.common.stats import Interval


@dataclass(frozen=True)
class Score:
    """A final number of each run.

    Args:
        key: its name in logs and tables.
        lower_is_better: as it is for a loss.
        factor: what it is multiplied by for a reader.
        digits: how many decimal places a reader sees.
        sign: what follows a value.
        unit: what follows a difference.
    """

    key: str
    lower_is_better: bool
    factor: float
    digits: int
    sign: str
    unit: str

    def number(self, value: float) -> str:
        """A value, or half the width of its interval, without its unit."""
        return f"{self.factor * value:.{self.digits}f}"

    def value(self, value: float) -> str:
        """A value with its unit.

        Example:
            >>> ACCURACY.value(0.9312)
            '93.1%'
            >>> LOSS.value(1.85234)
            '1.852 nats'
        """
        return self.number(value) + self.sign

    def difference(self, value: float) -> str:
        """A difference of two values with its sign, without its unit.

        Example:
            >>> ACCURACY.difference(-0.0123)
            '−1.2'
            >>> LOSS.difference(0.0123)
            '+0.012'
        """
        return f"{self.factor * value:+.{self.digits}f}".replace("-", "−")

    def best(self, values: Mapping[float, float]) -> float | None:
        """The learning rate of the best value, the smaller one of two equals; None if there is none."""
        sign = 1 if self.lower_is_better else -1
        return min(values, key=lambda rate: (sign * values[rate], rate)) if values else None

    def outcome(self, difference: Interval) -> str:
        """The reading of a difference, ours less theirs, by its 95% interval."""
        if not difference.known or difference.low <= 0 <= difference.high:
            return "not clearly different from"
        return "ahead of" if (difference.high < 0) == self.lower_is_better else "behind"


ACCURACY = Score("accuracy", lower_is_better=False, factor=100, digits=1, sign="%", unit="points")
DICE = Score("dice", lower_is_better=False, factor=100, digits=1, sign="%", unit="points")
LOSS = Score("loss", lower_is_better=True, factor=1, digits=3, sign=" nats", unit="nats")


def bits(nats: float) -> float:
    """The same loss in bits.

    Example:
        >>> round(bits(1.0), 3)
        1.443
    """
    return nats / math.log(2)
