"""The division of an input into tiles, and of tiles into programs."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from ...core.spec import View

WHOLE_ELEMENTS = 1 << 14
"""A channel of at most so many elements is the work of one program, however few channels there are."""

WHOLE_ELEMENTS_OF_MANY = 1 << 17
"""The same where the channels alone keep the device busy."""

WHOLE_TILE = 8192
"""Elements that a program of the whole way takes at a time; half as many float64, of which more do not fit."""

TILE = 4096
"""Elements that a program of the split way takes at a time; 8 warps of 16 each."""

PROGRAMS_PER_PROCESSOR = 8
"""Programs of a collecting kernel per multiprocessor: enough loads under way to fill the memory's bandwidth."""

TILES_OF_AN_OUTPUT = 2
"""Tiles of a program that only writes an output: the fewer, the better the programs share the device at its end."""

MAX_PARTS = 1024
"""Partial results of a channel: one program adds them at once."""


@lru_cache(maxsize=4096)
def channels_per_statistic(view: View) -> int:
    """K, or 0 where a statistic is not that of K neighbouring channels over all samples and places."""
    of_channels = [i for i, axis in enumerate(view.axes) if axis == 1]
    leading = of_channels[: len(view.kept)]
    if list(view.kept) != leading:
        return 0
    return math.prod(view.split[i] for i in of_channels) // view.num_stats


class Layout(NamedTuple):
    """The layout of an input in memory: (A, C, B) as ``kernels`` explains."""

    columns: bool
    rows: int
    channels: int
    places: int


class Cut(NamedTuple):
    """The division of the elements into tiles and of tiles into programs."""

    block_rows: int
    block_cols: int
    tiles: int
    """Of a program that takes all elements of its channels."""
    blocks: int
    """Programs side by side, each with its own channels."""
    parts: int
    """Programs for the same channels."""
    warps: int

    @property
    def tiles_each(self) -> int:
        """Tiles of each part."""
        return ceil(self.tiles, self.parts)


def layout_of(x: Tensor) -> Layout | None:
    """The layout of a dense input in memory, or None where the input has to be copied first."""
    samples, channels, places = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    if x.is_contiguous() and places > 1 and channels > 1:
        return Layout(False, samples, channels, places)
    moved = x.movedim(1, -1)
    if moved.is_contiguous():
        return Layout(True, samples * places, channels, 1)
    if x.is_contiguous():
        return Layout(False, samples, channels, places)
    return None


def to_dense(x: Tensor) -> tuple[Tensor, Layout]:
    """The input, copied if it has gaps, and how it lies in memory."""
    layout = layout_of(x)
    if layout is None:
        x = x.contiguous()
        layout = layout_of(x)
        assert layout is not None
    return x, layout


@lru_cache(maxsize=4096)
def cut_whole(layout: Layout, processors: int, tile: int) -> Cut | None:
    """The cut of the whole way, or None where channels are too large for it."""
    elements = layout.rows * layout.places
    many = layout.channels >= 3 * processors // 4 and not layout.columns
    if elements > (WHOLE_ELEMENTS_OF_MANY if many else WHOLE_ELEMENTS) // (8 if layout.columns else 1):
        return None
    if layout.columns:
        rows = min(power_of_two(layout.rows), 256)
        cols = max(1, min(32, power_of_two(layout.channels), tile // rows))
        tiles, blocks = ceil(layout.rows, rows), ceil(layout.channels, cols)
    else:
        cols = min(power_of_two(layout.places), tile)
        if cols * layout.rows > tile:
            cols = _side_by_side(layout.places, tile)
        rows = min(power_of_two(layout.rows), max(1, tile // cols))
        tiles, blocks = ceil(layout.rows, rows) * ceil(layout.places, cols), layout.channels
    # All warps of a multiprocessor on one channel where it takes several tiles: fewer channels then share the cache.
    most = 16 if layout.columns else 32
    warps = most if tiles > 2 else max(1, min(16, rows * cols // 512))
    return Cut(rows, cols, tiles, blocks, 1, warps)


@lru_cache(maxsize=4096)
def cut_split(layout: Layout, programs: int, tiles_each: int | None = None) -> Cut:
    """The cut of the split way: about so many programs, or so many tiles for each of them."""
    if layout.columns:
        cols = min(power_of_two(layout.channels), 128)
        rows = max(1, TILE // cols)
        tiles, blocks = ceil(layout.rows, rows), ceil(layout.channels, cols)
    else:
        cols = _side_by_side(layout.places, TILE)
        rows = max(1, TILE // cols)
        tiles, blocks = ceil(layout.rows, rows) * ceil(layout.places, cols), layout.channels
    parts = ceil(programs, blocks) if tiles_each is None else ceil(tiles, tiles_each)
    parts = max(1, min(tiles, parts, MAX_PARTS if tiles_each is None else 65535))
    parts = ceil(tiles, ceil(tiles, parts))  # so that no part is empty
    return Cut(rows, cols, tiles, blocks, parts, 8)


def _side_by_side(places: int, most: int) -> int:
    """Places of a tile, a power of two: the largest whose tiles leave few lanes idle, but whole sectors of memory."""
    choices = [1 << k for k in range(4, 20) if 1 << k <= min(most, power_of_two(places))] or [power_of_two(places)]

    def idle(cols: int) -> float:
        return ceil(places, cols) * cols / places - 1

    return max((cols for cols in choices if idle(cols) < 1 / 6), default=min(choices, key=idle))


def ceil(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()
