"""Figures as plain values: matplotlib draws them into files, and a script draws them in a page.

Values are as a reader sees them, accuracies in percent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median


@dataclass(frozen=True)
class Line:
    """The values of one method.

    ``low`` and ``high`` bound the interval or the band around each value, and are empty where there is none; ``ring``
    is the place of a value that is ringed.
    """

    label: str
    colour: str
    marker: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    ring: float | None = None
    faint: bool = False

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Missing:
    """A place where a method cannot train, and why."""

    label: str
    colour: str
    x: float
    why: str


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    lines: Sequence[Line]
    missing: Sequence[Missing] = ()


@dataclass(frozen=True)
class Row:
    """Panels side by side that share a vertical axis; ``span`` is its range, ``sign`` follows each value."""

    label: str
    panels: Sequence[Panel]
    span: tuple[float, float]
    sign: str = ""
    digits: int = 1
    lower_is_better: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure.

    Args:
        title: what is shown, and of what data.
        subtitle: how the values came about.
        description: in short, for those who do not see it.
        caption: what stands below it.
        x: the label of the horizontal axis.
        rows: panels, row by row, the same settings in each.
        names: the words on a horizontal axis whose places are 0, 1, 2, …; empty for one with numbers.
        log: whether the horizontal axis is logarithmic.
        bands: whether bounds are drawn as bands around lines; else as bars through points.
        breaks: places at which a line begins again.
    """

    title: str
    subtitle: str
    description: str
    caption: str
    x: str
    rows: Sequence[Row]
    names: Sequence[str] = ()
    log: bool = False
    bands: bool = False
    breaks: Sequence[float] = ()

    @property
    def single(self) -> bool:
        """Whether there is one pair of axes."""
        return len(self.rows) == 1 and len(self.rows[0].panels) == 1

    def json(self) -> str:
        """The values for a page's script, numbers with as many digits as are seen."""
        return json.dumps(_rounded(asdict(self)), ensure_ascii=False, separators=(",", ":"))


def stretches(places: Sequence[float], breaks: Sequence[float]) -> Iterator[slice]:
    """The parts of a line between breaks.

    Example:
        >>> list(stretches([0, 1, 2, 3], breaks=[0, 2]))
        [slice(0, 2, None), slice(2, 4, None)]
    """
    starts = [at for at, place in enumerate(places) if at == 0 or place in breaks]
    yield from (slice(start, end) for start, end in zip(starts, [*starts[1:], len(places)], strict=True))


def span(values: Sequence[float], margin: float = 0.06) -> tuple[float, float]:
    """The range of an axis around these values.

    Example:
        >>> span([1.0, 2.0], margin=0.1)
        (0.9, 2.1)
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = margin * ((high - low) or abs(high) or 1.0)
    return low - room, high + room


def fit(lines: Iterable[Line]) -> tuple[float, float]:
    """The range of an axis around these lines; an interval much wider than most is cut."""
    lines = list(lines)
    values = [value for line in lines for value in line.y]
    below = [value - low for line in lines for value, low in zip(line.y, line.low)]
    above = [high - value for line in lines for value, high in zip(line.y, line.high)]
    most = 4 * median([*below, *above] or [0.0])
    if not below:
        return span(values)
    lows, highs = (
        [value + sign * min(half, most) for value, half in zip(values, halves, strict=True)]
        for sign, halves in ((-1, below), (1, above))
    )
    return span([*lows, *highs])


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items() if item not in ((), [], None)}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
