"""The kernels of the forward pass."""

from __future__ import annotations

import triton
import triton.language as tl

from ..arguments import Statistics
from .formulas import (
    INF,
    advance,
    gain_and_bias,
    inverse_scale,
    is_finite,
    location,
    save,
    to_power,
    weight_of_short,
)
from .tiles import (
    channels_of,
    elements_in,
    in_elements,
    load,
    partials_of,
    places_of,
    reversed_program,
    sum_of,
    sum_of_all,
    tiles_of,
    zeros,
)


@triton.jit
def forward_whole(
    x_ptr, y_ptr, affine, saved_ptr, stream, sizes, USE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr
):
    """A whole forward pass, each program all elements of its channels: they are read once, later looks hit the cache.

    For one statistic per channel (G = C).
    """
    WIDE: tl.constexpr = saved_ptr.dtype.element_ty
    sizes = in_elements(sizes, TILE)
    block = tl.program_id(0)
    c, live = channels_of(block, sizes, TILE)
    n = sizes.rows * sizes.places
    statistics = Statistics(c, live, n, sizes.channels)

    offsets, inside = places_of(0, block, sizes, TILE)
    first = load(x_ptr, offsets, inside, WIDE)
    shift = sum_of(first, TILE.columns) / elements_in(0, sizes, TILE)
    shift = tl.where(is_finite(shift), shift, 0)
    rest = tl.where(inside, first - shift, 0)
    for t in range(1, TILES):
        offsets, inside = places_of(t, block, sizes, TILE)
        rest += tl.where(inside, load(x_ptr, offsets, inside, WIDE) - shift, 0)
    b_mu = shift + sum_of(rest, TILE.columns) / n
    recent = weight_of_short(stream, 0, USE)
    mu = location(b_mu, statistics, stream, recent, USE)

    powers = zeros(TILE, WIDE)
    for t in range(TILES):
        offsets, inside = places_of(t, block, sizes, TILE)
        d = load(x_ptr, offsets, inside, WIDE)
        if USE.centered:
            d = d - mu
        powers += tl.where(inside, to_power(tl.abs(d), USE.p), 0)
    b_m = sum_of(powers, TILE.columns) / n
    m, finite = advance(b_mu, b_m, statistics, stream, recent, USE)

    inverse = save(saved_ptr, statistics, mu, m, finite, USE)
    gain, bias = gain_and_bias(affine, c, live, WIDE)
    scale = inverse * gain
    for t in range(TILES):
        offsets, inside = places_of(t, block, sizes, TILE)
        y = (load(x_ptr, offsets, inside, WIDE) - mu) * scale + bias
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def collect_location(
    x_ptr, partial_ptr, sizes, tiles_each, P: tl.constexpr, CENTERED: tl.constexpr, TILE: tl.constexpr
):
    """One look at x by many programs per channel. Each writes its shift, Σ(x − shift), a moment, and the count.

    The moment is Σ(x − shift)² for p = 2 about the mean, from which follows that about any mu, and Σ|x|^p for centre
    zero. For other p about the mean it has to wait for mu, and is zero here.
    """
    WIDE: tl.constexpr = partial_ptr.dtype.element_ty
    sizes = in_elements(sizes, TILE)
    block, part = tl.program_id(0), tl.program_id(1)
    c, live = channels_of(block, sizes, TILE)
    begin, end = tiles_of(part, tiles_each, sizes, TILE)

    offsets, inside = places_of(begin, block, sizes, TILE)
    shift = sum_of(load(x_ptr, offsets, inside, WIDE), TILE.columns) / elements_in(begin, sizes, TILE)
    shift = tl.where(is_finite(shift), shift, 0)
    count = tl.full((), 0, tl.int64)
    rest = zeros(TILE, WIDE)
    powers = zeros(TILE, WIDE)
    for t in range(begin, end):
        offsets, inside = places_of(t, block, sizes, TILE)
        x = load(x_ptr, offsets, inside, WIDE)
        from_shift = tl.where(inside, x - shift, 0)
        count += elements_in(t, sizes, TILE)
        rest += from_shift
        if not CENTERED:
            powers += to_power(tl.abs(x), P)
        elif P == 2.0:
            powers += from_shift * from_shift
    _store_partial(partial_ptr, part, c, live, sizes.channels, shift, rest, powers, count, TILE.columns)


@triton.jit
def _store_partial(partial_ptr, part, c, live, C, shift, rest, powers, count, COLUMNS: tl.constexpr):
    """Partial results are (4, parts, C)."""
    rows = tl.num_programs(1) * C
    into = partial_ptr + part * C + c
    tl.store(into, shift, mask=live)
    tl.store(into + rows, sum_of(rest, COLUMNS), mask=live)
    tl.store(into + 2 * rows, sum_of(powers, COLUMNS), mask=live)
    tl.store(into + 3 * rows, count.to(partial_ptr.dtype.element_ty), mask=live)


@triton.jit
def collect_moment(x_ptr, saved_ptr, partial_ptr, sizes, tiles_each, P: tl.constexpr, TILE: tl.constexpr):
    """Σ|x − mu|^p, into row 2 of the partial results, in the reverse order of ``collect_location``."""
    WIDE: tl.constexpr = saved_ptr.dtype.element_ty
    sizes = in_elements(sizes, TILE)
    block, part = reversed_program()
    c, live = channels_of(block, sizes, TILE)
    begin, end = tiles_of(part, tiles_each, sizes, TILE)
    mu = tl.load(saved_ptr + c // sizes.per_statistic, mask=live, other=0)
    powers = zeros(TILE, WIDE)
    for t in range(begin, end):
        offsets, inside = places_of(t, block, sizes, TILE)
        d = load(x_ptr, offsets, inside, WIDE) - mu
        powers += tl.where(inside, to_power(tl.abs(d), P), 0)
    rows = tl.num_programs(1) * sizes.channels
    tl.store(partial_ptr + 2 * rows + part * sizes.channels + c, sum_of(powers, TILE.columns), mask=live)


@triton.jit
def combine_statistics(
    partial_ptr,
    saved_ptr,
    stream,
    amounts,
    USE: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LOCATION: tl.constexpr,
    MOMENT: tl.constexpr,
    ABOUT_SHIFT: tl.constexpr,
):
    """One program per statistic: what the parts found, over its K channels, joined with the stream.

    With LOCATION and without MOMENT, mu and b_mu wait in ``saved`` for the moments about mu. ABOUT_SHIFT: moments are
    second moments about each part's shift, and are moved to mu.
    """
    WIDE: tl.constexpr = saved_ptr.dtype.element_ty
    g = tl.program_id(0) + tl.arange(0, 1)[None, :]
    G = tl.num_programs(0)
    C = G * amounts.channels
    rows = amounts.parts * C
    part = tl.arange(0, PARTS)[:, None]
    statistics = Statistics(g, g >= 0, amounts.elements, G)

    recent = weight_of_short(stream, 0, USE)
    if LOCATION:
        # About the first shift of all: shifts are near each other, so their differences are small and exact.
        origin = tl.load(partial_ptr + g * amounts.channels)
        total = tl.zeros((PARTS, CHANNELS), WIDE)
        for k in range(0, amounts.channels, CHANNELS):
            at, inside = partials_of(statistics, k, part, amounts, C, CHANNELS)
            shift = tl.load(partial_ptr + at, mask=inside, other=0)
            count = tl.load(partial_ptr + 3 * rows + at, mask=inside, other=0)
            rest = tl.load(partial_ptr + rows + at, mask=inside, other=0)
            total += rest + count * (shift - origin)
        b_mu = origin + sum_of_all(total) / amounts.elements
        mu = location(b_mu, statistics, stream, recent, USE)
        if not MOMENT:
            tl.store(saved_ptr + g, mu)
            tl.store(saved_ptr + 3 * G + g, b_mu)
    else:
        mu = tl.load(saved_ptr + g)
        b_mu = tl.load(saved_ptr + 3 * G + g)

    if MOMENT:
        total = tl.zeros((PARTS, CHANNELS), WIDE)
        for k in range(0, amounts.channels, CHANNELS):
            at, inside = partials_of(statistics, k, part, amounts, C, CHANNELS)
            powers = tl.load(partial_ptr + 2 * rows + at, mask=inside, other=0)
            if ABOUT_SHIFT:
                count = tl.load(partial_ptr + 3 * rows + at, mask=inside, other=0)
                rest = tl.load(partial_ptr + rows + at, mask=inside, other=0)
                away = mu - tl.load(partial_ptr + at, mask=inside, other=0)
                powers += tl.where(inside, away * (count * away - 2 * rest), 0)
            total += powers
        b_m = sum_of_all(total) / amounts.elements
        if ABOUT_SHIFT:
            b_m = tl.where(b_m < 0, 0, b_m)  # by rounding alone
            b_m = tl.where((b_m != b_m) & is_finite(b_mu), INF, b_m)  # NaN by an overflow, inf − inf, and not from x
        m, finite = advance(b_mu, b_m, statistics, stream, recent, USE)
        save(saved_ptr, statistics, mu, m, finite, USE)


@triton.jit
def output(
    x_ptr, y_ptr, affine, saved_ptr, long_ptr, partial_ptr, sizes, tiles_each, USE: tl.constexpr, TILE: tl.constexpr
):
    """y = (x − mu)/s·gain + bias, in the reverse order of ``collect_location``.

    One pass, with ``long`` and ``partial``: mu and m are the long-term ones, and what this call adds to the short-term
    ones is collected on the way.
    """
    ONE_PASS: tl.constexpr = long_ptr is not None
    WIDE: tl.constexpr = saved_ptr.dtype.element_ty
    sizes = in_elements(sizes, TILE)
    block, part = reversed_program()
    c, live = channels_of(block, sizes, TILE)
    begin, end = tiles_of(part, tiles_each, sizes, TILE)
    g, G = c // sizes.per_statistic, sizes.channels // sizes.per_statistic
    if ONE_PASS:
        mu = tl.load(long_ptr + g, mask=live, other=0)
        inverse = inverse_scale(tl.load(long_ptr + G + g, mask=live, other=1), USE)
    else:
        mu = tl.load(saved_ptr + g, mask=live, other=0)
        inverse = tl.load(saved_ptr + G + g, mask=live, other=0)
    gain, bias = gain_and_bias(affine, c, live, WIDE)
    scale = inverse * gain
    count = tl.full((), 0, tl.int64)
    rest = zeros(TILE, WIDE)
    powers = zeros(TILE, WIDE)
    for t in range(begin, end):
        offsets, inside = places_of(t, block, sizes, TILE)
        x = load(x_ptr, offsets, inside, WIDE)
        from_mu = x - mu
        tl.store(y_ptr + offsets, (from_mu * scale + bias).to(y_ptr.dtype.element_ty), mask=inside)
        if ONE_PASS:
            count += elements_in(t, sizes, TILE)
            rest += tl.where(inside, from_mu, 0)
            powers += tl.where(inside, to_power(tl.abs(from_mu if USE.centered else x), USE.p), 0)
    if ONE_PASS:
        _store_partial(partial_ptr, part, c, live, sizes.channels, mu, rest, powers, count, TILE.columns)
