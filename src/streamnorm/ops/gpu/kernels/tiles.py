"""Tiles: which elements of the input a program works on, and sums over them."""

from __future__ import annotations

import triton
import triton.language as tl

from ..arguments import Sizes


@triton.jit
def in_elements(sizes, TILE: tl.constexpr):
    """Sizes whose unit is one element."""
    if TILE.columns:
        return Sizes(sizes.rows, sizes.channels * TILE.unit, sizes.places, sizes.per_statistic)
    else:
        return Sizes(sizes.rows, sizes.channels, sizes.places * TILE.unit, sizes.per_statistic)


@triton.jit
def channels_of(block, sizes, TILE: tl.constexpr):
    """The channels of a program, and which of them exist."""
    beside: tl.constexpr = TILE.cols if TILE.columns else 1
    c = block * beside + tl.arange(0, beside)[None, :]
    return c, c < sizes.channels


@triton.jit
def places_of(t, block, sizes, TILE: tl.constexpr):
    """The offsets of the elements of tile t, and which of them exist. Offsets have 64 bits: inputs may be large."""
    if TILE.columns:
        rows = t * TILE.rows + tl.arange(0, TILE.rows)
        cols = block * TILE.cols + tl.arange(0, TILE.cols)
        inside = (rows < sizes.rows)[:, None] & (cols < sizes.channels)[None, :]
        offsets = rows.to(tl.int64)[:, None] * sizes.channels + cols[None, :]
    else:
        tiles_of_a_row = tl.cdiv(sizes.places, TILE.cols)
        rows = (t // tiles_of_a_row) * TILE.rows + tl.arange(0, TILE.rows)
        cols = (t % tiles_of_a_row) * TILE.cols + tl.arange(0, TILE.cols)
        inside = (rows < sizes.rows)[:, None] & (cols < sizes.places)[None, :]
        offsets = (rows.to(tl.int64) * sizes.channels + block)[:, None] * sizes.places + cols[None, :]
    return offsets, inside


@triton.jit
def elements_in(t, sizes, TILE: tl.constexpr):
    """The number of elements of each statistic that exist in tile t."""
    if TILE.columns:
        return tl.minimum(sizes.rows - t * TILE.rows, TILE.rows)
    else:
        tiles_of_a_row = tl.cdiv(sizes.places, TILE.cols)
        rows = tl.minimum(sizes.rows - t // tiles_of_a_row * TILE.rows, TILE.rows)
        return rows * tl.minimum(sizes.places - t % tiles_of_a_row * TILE.cols, TILE.cols)


@triton.jit
def tiles_of(part, tiles_each, sizes, TILE: tl.constexpr):
    """The first tile of a part and the one behind its last, in 64 bits where there are so many rows."""
    tiles = tl.cdiv(sizes.rows, TILE.rows)
    if not TILE.columns:
        tiles *= tl.cdiv(sizes.places, TILE.cols)
    begin = part * tiles_each
    end = tl.minimum(begin + tiles_each, tiles)
    return begin.to(end.dtype), end


@triton.jit
def zeros(TILE: tl.constexpr, WIDE: tl.constexpr):
    """A tile of zeros."""
    ROWS: tl.constexpr = TILE.rows
    COLS: tl.constexpr = TILE.cols
    return tl.zeros((ROWS, COLS), WIDE)


@triton.jit
def sum_of(tile, COLUMNS: tl.constexpr):
    """The sum over the elements of each statistic of a tile."""
    total = tl.sum(tile, 0, keep_dims=True)
    if not COLUMNS:
        total = tl.sum(total, 1, keep_dims=True)
    return total


@triton.jit
def sum_of_all(tile):
    """The sum over a whole tile."""
    return tl.sum(tl.sum(tile, 0, keep_dims=True), 1, keep_dims=True)


@triton.jit
def load(pointer, offsets, inside, WIDE: tl.constexpr):
    """Elements in the dtype of the statistics, zero where there are none."""
    return tl.load(pointer + offsets, mask=inside, other=0).to(WIDE)


@triton.jit
def reversed_program():
    """Block and part of a program in reverse order: it begins with what the kernel before has left in the cache."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    return block, part


@triton.jit
def partials_of(statistics, k, part, amounts, C, CHANNELS: tl.constexpr):
    """The offsets of the partial results of a statistic's channels k, k + 1, …, and which of them exist."""
    channel = k + tl.arange(0, CHANNELS)[None, :]
    at = part * C + statistics.index * amounts.channels + channel
    return at, (part < amounts.parts) & (channel < amounts.channels)
