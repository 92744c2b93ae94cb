"""LpMoment: the p-th absolute moment that a scale is computed from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import arguments


@arguments.explained
@dataclass(frozen=True)
class LpMoment:
    """The scale σ = k·(E|d|^p)^(1/p) of Lp normalization (the paper's Lp).

    Args:
        p: the order, any real number ≥ 1. 2 gives the standard deviation; 1, the mean absolute deviation, is as
            good, cheaper, and stable in pure online learning.
        center: ``"mean"`` takes deviations d about the location μ, ``"zero"`` takes the raw moments of x.
        scale: ``"raw"`` is the moment's root itself (k = 1); ``"gaussian"`` multiplies it so that σ of normal data is
            their standard deviation.

    Raises:
        ValueError: if p < 1, or ``center`` or ``scale`` is unknown.
        TypeError: if p is no number.

    Example:
        >>> round(LpMoment(p=1, scale="gaussian").k, 4)
        1.2533
    """

    p: float = 2.0
    center: str = "mean"
    scale: str = "raw"

    def __post_init__(self) -> None:
        p = arguments.real(self.p, "p must be a finite number of at least 1, such as 1 or 2")
        if not (math.isfinite(p) and p >= 1):
            raise ValueError(f"p must be a finite number of at least 1, got {self.p}; 1 and 2 are the usual ones")
        if not isinstance(self.p, (int, float)):  # such as a tensor, which is no part of a hash
            object.__setattr__(self, "p", p)
        for name, value, choices in (
            ("center", self.center, ("mean", "zero")),
            ("scale", self.scale, ("raw", "gaussian")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be {choices[0]!r} or {choices[1]!r}, got {value!r}")

    @property
    def k(self) -> float:
        """The factor before the root, which is 1 or 1 / E|N(0,1)|^p^(1/p)."""
        if self.scale == "raw" or self.p == 2:
            return 1.0
        if self.p == 1:
            return math.sqrt(math.pi / 2)
        log_moment = self.p / 2 * math.log(2) + math.lgamma((self.p + 1) / 2) - math.log(math.pi) / 2
        return math.exp(-log_moment / self.p)
