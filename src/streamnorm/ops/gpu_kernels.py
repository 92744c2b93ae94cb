"""The Triton kernels of the GPU engine; ``gpu.py`` launches them and says which when.

All of them see the input as rows and channels. In *columns* (channels_last, or an input of shape (N, C)) a row is one
place of one sample, channels lie side by side, and a program works on a few neighbouring channels. Otherwise a row is
one sample, the places of a channel lie side by side, and a program works on one channel. A tile is ``ROWS × COLS``
elements; what is summed over a tile keeps both axes, so that one formula serves both layouts:

    columns       x is (A, C),    a tile is rows × channels,  a statistic of a tile has the shape (1, COLS)
    lines         x is (A, C, B), a tile is rows × places,    a statistic of a tile has the shape (1, 1)

A statistic belongs to K neighbouring channels (K = 1: one statistic per channel). The letters are those of
``plain.py``. Numbers that the formulas know beforehand are constexpr: a weight of zero then costs nothing, and a
float64 constant stays exact.

Sums are deterministic: every program adds in a fixed order and writes where no other writes; ``combine_*`` add what
the programs of one statistic found. Sums of x are taken about a shift near the mean (that of a program's first tile),
so that an offset of the data costs no digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..core import spec

INF = tl.constexpr(float("inf"))
PRIOR_SAMPLES = tl.constexpr(spec.PRIOR_SAMPLES)


@triton.jit
def _channels(block, C, COLUMNS: tl.constexpr, COLS: tl.constexpr):
    """The channels of a program, and which of them exist."""
    beside: tl.constexpr = COLS if COLUMNS else 1
    c = block * beside + tl.arange(0, beside)[None, :]
    return c, c < C


@triton.jit
def _tile(t, block, A, C, B, COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Where the elements of tile t lie, and which of them exist. Offsets have 64 bits: inputs may be large."""
    if COLUMNS:
        rows = t * ROWS + tl.arange(0, ROWS)
        cols = block * COLS + tl.arange(0, COLS)
        inside = (rows < A)[:, None] & (cols < C)[None, :]
        offsets = rows.to(tl.int64)[:, None] * C + cols[None, :]
    else:
        tiles_of_a_row = tl.cdiv(B, COLS)
        rows = (t // tiles_of_a_row) * ROWS + tl.arange(0, ROWS)
        cols = (t % tiles_of_a_row) * COLS + tl.arange(0, COLS)
        inside = (rows < A)[:, None] & (cols < B)[None, :]
        offsets = (rows.to(tl.int64) * C + block)[:, None] * B + cols[None, :]
    return offsets, inside


@triton.jit
def _count(t, A, B, COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """How many elements of each statistic exist in tile t."""
    if COLUMNS:
        return tl.minimum(A - t * ROWS, ROWS)
    else:
        tiles_of_a_row = tl.cdiv(B, COLS)
        return tl.minimum(A - t // tiles_of_a_row * ROWS, ROWS) * tl.minimum(B - t % tiles_of_a_row * COLS, COLS)


@triton.jit
def _tiles(A, B, COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """How many tiles cover the elements of a program's channels."""
    tiles = tl.cdiv(A, ROWS)
    if not COLUMNS:
        tiles *= tl.cdiv(B, COLS)
    return tiles


@triton.jit
def _range(part, tiles_each, A, B, COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The first tile of a part and the one behind its last, in 64 bits where there are so many rows."""
    begin = part * tiles_each
    end = tl.minimum(begin + tiles_each, _tiles(A, B, COLUMNS, ROWS, COLS))
    return begin.to(end.dtype), end


@triton.jit
def _total(tile, COLUMNS: tl.constexpr):
    """The sum over the elements of each statistic of a tile."""
    total = tl.sum(tile, 0, keep_dims=True)
    if not COLUMNS:
        total = tl.sum(total, 1, keep_dims=True)
    return total


@triton.jit
def _load(pointer, offsets, inside, WIDE: tl.constexpr):
    return tl.load(pointer + offsets, mask=inside, other=0).to(WIDE)


@triton.jit
def _finite(value):
    return tl.abs(value) < INF  # not so for NaN either


@triton.jit
def _ratio(a, b):
    """a / b, rounded correctly. In float32 ``/`` is faster and need not give 1 for a / a."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b.to(tl.float32))
    else:
        return a / b


@triton.jit
def _power(a, P: tl.constexpr):
    """a^P for a ≥ 0; the usual orders without a logarithm."""
    if P == 0.0:
        power = a * 0 + 1
    elif P == 0.5:
        power = tl.sqrt(a)
    elif P == 1.0:
        power = a
    elif P == 1.5:
        power = a * tl.sqrt(a)
    elif P == 2.0:
        power = a * a
    elif P == 3.0:
        power = a * a * a
    else:
        power = tl.exp2(tl.log2(a) * P)
    return power


@triton.jit
def _derivative_of_power(d, P: tl.constexpr):
    """u = |d|^(P−1)·sgn d."""
    u = d
    if P != 2.0:
        sign = (d > 0).to(d.dtype) - (d < 0).to(d.dtype)
        u = sign
        if P != 1.0:
            u = _power(tl.abs(d), P - 1.0) * sign
    return u


@triton.jit
def _inverse(m, P: tl.constexpr, K_P: tl.constexpr, EPS: tl.constexpr):
    """1/s, with s = √(k²·m^(2/p) + eps)."""
    square = _power(m, 2.0 / P) * (K_P * K_P) + EPS
    s = tl.sqrt_rn(square) if square.dtype == tl.float32 else tl.sqrt(square)
    return _ratio(tl.full(s.shape, 1, s.dtype), s)


@triton.jit
def _slope(m, inverse, finite, P: tl.constexpr, K_P: tl.constexpr, TINY: tl.constexpr):
    """sigma²/(p·m·s³), how the output falls as m grows; NaN marks an index whose statistic is not finite."""
    if P == 2.0:
        power = m * 0 + 1
    else:
        alive = m >= TINY
        if P == 1.0:
            power = tl.where(alive, m, 0)
        else:
            power = tl.where(alive, tl.exp2(tl.log2(tl.where(alive, m, 1)) * (2.0 / P - 1.0)), 0)
    slope = (power * inverse) * (inverse * inverse) * (K_P * K_P / P)
    return tl.where(finite, slope, float("nan"))


@triton.jit
def _recent(samples_ptr, seen_ptr, more, WINDOW: tl.constexpr):
    """The weight of the short-term average under the window rule, which alone asks for it.

    ``samples`` since the last weight update, those of this call included, and ``more`` that are not counted yet. Of
    gradients there is no ``seen``: they have the whole window from the start.
    """
    weight = 0.0
    if WINDOW > 0.0:
        samples = (tl.load(samples_ptr) + more).to(tl.float64)
        weight = samples / (_lasting(seen_ptr, WINDOW) + samples)
    return weight


@triton.jit
def _lasting(seen_ptr, window):
    """E of the window rule: the samples that the long-term average stands for."""
    if seen_ptr is not None:
        window = tl.minimum((tl.load(seen_ptr) + PRIOR_SAMPLES).to(tl.float64), window)
    return window


@triton.jit
def _mixed(
    long,
    short,
    present,
    recent,
    W1: tl.constexpr,
    W2: tl.constexpr,
    W3: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Long, short and present, weighted. A weight of zero keeps a value out altogether, so 0·inf is 0 here."""
    if WINDOW > 0.0:
        recent = recent.to(long.dtype)
        mixed = (1 - recent) * long + recent * short
    else:
        mixed = tl.zeros_like(present)
        if W1 != 0.0:
            mixed += long * W1
        if W2 != 0.0:
            mixed += short * W2
        if W3 != 0.0:
            mixed += present * W3
    return mixed


@triton.jit
def _fresh(average, count, value, n):
    """The average over ``count`` elements so far, and over n more whose average is ``value``."""
    after = count + n
    return average + (value - average) * _ratio((after - count).to(average.dtype), after)


@triton.jit
def _wait_for_readers():
    """Before a value is overwritten that this program has read: all of its warps read it, and one of them writes.

    Needed for values of a statistic, of which each warp has a copy, since a warp that lags would read what another one
    has written already.
    """
    tl.debug_barrier()


@triton.jit
def _location(
    b_mu,
    g,
    live,
    n,
    long_ptr,
    short_ptr,
    count_ptr,
    recent,
    A1: tl.constexpr,
    A2: tl.constexpr,
    A3: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """mu, from the mean of this call and the stream."""
    if long_ptr is None:
        mu = b_mu
    else:
        count = tl.load(count_ptr + g, mask=live, other=0)
        short = _fresh(tl.load(short_ptr + g, mask=live, other=0), count, b_mu, n)
        mu = _mixed(tl.load(long_ptr + g, mask=live, other=0), short, b_mu, recent, A1, A2, A3, WINDOW)
    return mu


@triton.jit
def _advance(
    b_mu,
    b_m,
    g,
    live,
    n,
    G,
    long_ptr,
    short_ptr,
    count_ptr,
    recent,
    A1: tl.constexpr,
    A2: tl.constexpr,
    A3: tl.constexpr,
    WINDOW: tl.constexpr,
    FLOOR: tl.constexpr,
):
    """m, and whether both statistics of this call are finite; where they are, short takes them in."""
    finite = _finite(b_mu) & _finite(b_m)
    if long_ptr is None:
        m = b_m
        _wait_for_readers()
    else:
        count = tl.load(count_ptr + g, mask=live, other=0)
        short_mu = _fresh(tl.load(short_ptr + g, mask=live, other=0), count, b_mu, n)
        short_m = _fresh(tl.load(short_ptr + G + g, mask=live, other=0), count, b_m, n)
        m = _mixed(tl.load(long_ptr + G + g, mask=live, other=0), short_m, b_m, recent, A1, A2, A3, WINDOW)
        if FLOOR > 0.0:
            m = tl.where(b_m * FLOOR > m, b_m * FLOOR, m)
        _wait_for_readers()
        tl.store(short_ptr + g, short_mu, mask=live & finite)
        tl.store(short_ptr + G + g, short_m, mask=live & finite)
        tl.store(count_ptr + g, count + n, mask=live & finite)
    return m, finite


@triton.jit
def _save(
    saved_ptr,
    g,
    live,
    G,
    mu,
    m,
    finite,
    P: tl.constexpr,
    K_P: tl.constexpr,
    EPS: tl.constexpr,
    TINY: tl.constexpr,
):
    """Write mu, 1/s, the slope and m of each statistic; return 1/s."""
    inverse = _inverse(m, P, K_P, EPS)
    tl.store(saved_ptr + g, mu, mask=live)
    tl.store(saved_ptr + G + g, inverse, mask=live)
    tl.store(saved_ptr + 2 * G + g, _slope(m, inverse, finite, P, K_P, TINY), mask=live)
    tl.store(saved_ptr + 3 * G + g, m, mask=live)
    return inverse


@triton.jit
def _gain_and_bias(weight_ptr, bias_ptr, c, live, WIDE: tl.constexpr):
    """Both of each channel, 1 and 0 where there is none."""
    gain = tl.full(c.shape, 1, WIDE)
    if weight_ptr is not None:
        gain = tl.load(weight_ptr + c, mask=live, other=0).to(WIDE)
    bias = tl.zeros(c.shape, WIDE)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=live, other=0).to(WIDE)
    return gain, bias


@triton.jit
def forward_whole(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    saved_ptr,
    long_ptr,
    short_ptr,
    count_ptr,
    samples_ptr,
    seen_ptr,
    A,
    C_UNITS,
    B_UNITS,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
    WIDE: tl.constexpr,
    TINY: tl.constexpr,
    P: tl.constexpr,
    CENTERED: tl.constexpr,
    K_P: tl.constexpr,
    EPS: tl.constexpr,
    A1: tl.constexpr,
    A2: tl.constexpr,
    A3: tl.constexpr,
    WINDOW: tl.constexpr,
    FLOOR: tl.constexpr,
):
    """A whole forward pass, each program all elements of its channels: they are read once, later looks hit the cache.

    For one statistic per channel (G = C).
    """
    C, B = _sizes(C_UNITS, B_UNITS, UNIT, COLUMNS)
    block = tl.program_id(0)
    c, live = _channels(block, C, COLUMNS, COLS)
    n = A * B

    offsets, inside = _tile(0, block, A, C, B, COLUMNS, ROWS, COLS)
    first = _load(x_ptr, offsets, inside, WIDE)
    shift = _total(first, COLUMNS) / _count(0, A, B, COLUMNS, ROWS, COLS)
    shift = tl.where(_finite(shift), shift, 0)
    rest = tl.where(inside, first - shift, 0)
    for t in range(1, TILES):
        offsets, inside = _tile(t, block, A, C, B, COLUMNS, ROWS, COLS)
        rest += tl.where(inside, _load(x_ptr, offsets, inside, WIDE) - shift, 0)
    b_mu = shift + _total(rest, COLUMNS) / n
    recent = _recent(samples_ptr, seen_ptr, 0, WINDOW)
    mu = _location(b_mu, c, live, n, long_ptr, short_ptr, count_ptr, recent, A1, A2, A3, WINDOW)

    powers = tl.zeros((ROWS, COLS), WIDE)
    for t in range(TILES):
        offsets, inside = _tile(t, block, A, C, B, COLUMNS, ROWS, COLS)
        d = _load(x_ptr, offsets, inside, WIDE)
        if CENTERED:
            d = d - mu
        powers += tl.where(inside, _power(tl.abs(d), P), 0)
    b_m = _total(powers, COLUMNS) / n
    m, finite = _advance(b_mu, b_m, c, live, n, C, long_ptr, short_ptr, count_ptr, recent, A1, A2, A3, WINDOW, FLOOR)

    inverse = _save(saved_ptr, c, live, C, mu, m, finite, P, K_P, EPS, TINY)
    gain, bias = _gain_and_bias(weight_ptr, bias_ptr, c, live, WIDE)
    scale = inverse * gain
    for t in range(TILES):
        offsets, inside = _tile(t, block, A, C, B, COLUMNS, ROWS, COLS)
        y = (_load(x_ptr, offsets, inside, WIDE) - mu) * scale + bias
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sizes(C_UNITS, B_UNITS, UNIT: tl.constexpr, COLUMNS: tl.constexpr):
    """C and B. The size that lies side by side comes in units of a vector load, so that the compiler may use it."""
    if COLUMNS:
        return C_UNITS * UNIT, B_UNITS
    else:
        return C_UNITS, B_UNITS * UNIT


@triton.jit
def collect_location(
    x_ptr,
    partial_ptr,
    A,
    C_UNITS,
    B_UNITS,
    tiles_each,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
    P: tl.constexpr,
    CENTERED: tl.constexpr,
):
    """One look at x by many programs per channel. Each writes its shift, Σ(x − shift), a moment, and the count.

    The moment is Σ(x − shift)² for p = 2 about the mean, from which follows that about any mu, and Σ|x|^p for centre
    zero. For other p about the mean it has to wait for mu, and is zero here.
    """
    C, B = _sizes(C_UNITS, B_UNITS, UNIT, COLUMNS)
    block, part = tl.program_id(0), tl.program_id(1)
    c, live = _channels(block, C, COLUMNS, COLS)
    begin, end = _range(part, tiles_each, A, B, COLUMNS, ROWS, COLS)

    offsets, inside = _tile(begin, block, A, C, B, COLUMNS, ROWS, COLS)
    shift = _total(_load(x_ptr, offsets, inside, WIDE), COLUMNS) / _count(begin, A, B, COLUMNS, ROWS, COLS)
    shift = tl.where(_finite(shift), shift, 0)
    count = tl.full((), 0, tl.int64)
    rest = tl.zeros((ROWS, COLS), WIDE)
    powers = tl.zeros((ROWS, COLS), WIDE)
    for t in range(begin, end):
        offsets, inside = _tile(t, block, A, C, B, COLUMNS, ROWS, COLS)
        x = _load(x_ptr, offsets, inside, WIDE)
        from_shift = tl.where(inside, x - shift, 0)
        count += _count(t, A, B, COLUMNS, ROWS, COLS)
        rest += from_shift
        if not CENTERED:
            powers += _power(tl.abs(x), P)
        elif P == 2.0:
            powers += from_shift * from_shift
    _store_partial(partial_ptr, part, c, live, C, shift, _total(rest, COLUMNS), _total(powers, COLUMNS), count.to(WIDE))


@triton.jit
def _store_partial(partial_ptr, part, c, live, C, shift, rest, powers, count):
    """Partial results are (4, parts, C)."""
    rows = tl.num_programs(1) * C
    into = partial_ptr + part * C + c
    tl.store(into, shift, mask=live)
    tl.store(into + rows, rest, mask=live)
    tl.store(into + 2 * rows, powers, mask=live)
    tl.store(into + 3 * rows, count, mask=live)


@triton.jit
def collect_moment(
    x_ptr,
    saved_ptr,
    partial_ptr,
    A,
    C_UNITS,
    B_UNITS,
    K,
    tiles_each,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
    P: tl.constexpr,
):
    """Σ|x − mu|^p, into row 2 of the partial results.

    Programs come in the reverse order of those of ``collect_location``: they begin with what these have left in the
    cache.
    """
    C, B = _sizes(C_UNITS, B_UNITS, UNIT, COLUMNS)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    c, live = _channels(block, C, COLUMNS, COLS)
    begin, end = _range(part, tiles_each, A, B, COLUMNS, ROWS, COLS)
    mu = tl.load(saved_ptr + c // K, mask=live, other=0)
    powers = tl.zeros((ROWS, COLS), WIDE)
    for t in range(begin, end):
        offsets, inside = _tile(t, block, A, C, B, COLUMNS, ROWS, COLS)
        d = _load(x_ptr, offsets, inside, WIDE) - mu
        powers += tl.where(inside, _power(tl.abs(d), P), 0)
    rows = tl.num_programs(1) * C
    tl.store(partial_ptr + 2 * rows + part * C + c, _total(powers, COLUMNS), mask=live)


@triton.jit
def combine_statistics(
    partial_ptr,
    saved_ptr,
    long_ptr,
    short_ptr,
    count_ptr,
    samples_ptr,
    seen_ptr,
    parts,
    n,
    K,
    LOCATION: tl.constexpr,
    MOMENT: tl.constexpr,
    ABOUT_SHIFT: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    TINY: tl.constexpr,
    P: tl.constexpr,
    K_P: tl.constexpr,
    EPS: tl.constexpr,
    A1: tl.constexpr,
    A2: tl.constexpr,
    A3: tl.constexpr,
    WINDOW: tl.constexpr,
    FLOOR: tl.constexpr,
):
    """One program per statistic: what the parts found, over its K channels, joined with the stream.

    With LOCATION and without MOMENT, mu and b_mu wait in ``saved`` for the moments about mu. ABOUT_SHIFT: moments are
    second moments about each part's shift, and are moved to mu.
    """
    g = tl.program_id(0) + tl.arange(0, 1)[None, :]
    live = g >= 0
    G = tl.num_programs(0)
    C = G * K
    rows = parts * C
    part = tl.arange(0, PARTS)[:, None]

    recent = _recent(samples_ptr, seen_ptr, 0, WINDOW)
    if LOCATION:
        # About the first shift of all: shifts are near each other, so their differences are small and exact.
        origin = tl.load(partial_ptr + g * K)
        total = tl.zeros((PARTS, CHANNELS), WIDE)
        for k in range(0, K, CHANNELS):
            at, inside = _partials(g, k, part, parts, C, K, CHANNELS)
            shift = tl.load(partial_ptr + at, mask=inside, other=0)
            count = tl.load(partial_ptr + 3 * rows + at, mask=inside, other=0)
            rest = tl.load(partial_ptr + rows + at, mask=inside, other=0)
            total += rest + count * (shift - origin)
        b_mu = origin + _sum_all(total) / n
        mu = _location(b_mu, g, live, n, long_ptr, short_ptr, count_ptr, recent, A1, A2, A3, WINDOW)
        if not MOMENT:
            tl.store(saved_ptr + g, mu)
            tl.store(saved_ptr + 3 * G + g, b_mu)
    else:
        mu = tl.load(saved_ptr + g)
        b_mu = tl.load(saved_ptr + 3 * G + g)

    if MOMENT:
        total = tl.zeros((PARTS, CHANNELS), WIDE)
        for k in range(0, K, CHANNELS):
            at, inside = _partials(g, k, part, parts, C, K, CHANNELS)
            powers = tl.load(partial_ptr + 2 * rows + at, mask=inside, other=0)
            if ABOUT_SHIFT:
                count = tl.load(partial_ptr + 3 * rows + at, mask=inside, other=0)
                rest = tl.load(partial_ptr + rows + at, mask=inside, other=0)
                away = mu - tl.load(partial_ptr + at, mask=inside, other=0)
                powers += tl.where(inside, away * (count * away - 2 * rest), 0)
            total += powers
        b_m = _sum_all(total) / n
        if ABOUT_SHIFT:
            b_m = tl.where(b_m < 0, 0, b_m)  # by rounding alone
            b_m = tl.where((b_m != b_m) & _finite(b_mu), INF, b_m)  # NaN by an overflow, inf − inf, and not from x
        m, finite = _advance(
            b_mu, b_m, g, live, n, G, long_ptr, short_ptr, count_ptr, recent, A1, A2, A3, WINDOW, FLOOR
        )
        _save(saved_ptr, g, live, G, mu, m, finite, P, K_P, EPS, TINY)


@triton.jit
def _partials(g, k, part, parts, C, K, CHANNELS: tl.constexpr):
    """Where the partial results of a statistic's channels k, k + 1, … lie."""
    channel = k + tl.arange(0, CHANNELS)[None, :]
    return part * C + g * K + channel, (part < parts) & (channel < K)


@triton.jit
def _sum_all(tile):
    return tl.sum(tl.sum(tile, 0, keep_dims=True), 1, keep_dims=True)


@triton.jit
def output(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    saved_ptr,
    long_ptr,
    partial_ptr,
    A,
    C_UNITS,
    B_UNITS,
    K,
    tiles_each,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
    P: tl.constexpr,
    CENTERED: tl.constexpr,
    K_P: tl.constexpr,
    EPS: tl.constexpr,
    ONE_PASS: tl.constexpr,
):
    """y = (x − mu)/s·gain + bias, in the reverse order of ``collect_location``.

    ONE_PASS: mu and m are the long-term ones, and what this call adds to the short-term ones is collected on the way.
    """
    C, B = _sizes(C_UNITS, B_UNITS, UNIT, COLUMNS)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    c, live = _channels(block, C, COLUMNS, COLS)
    begin, end = _range(part, tiles_each, A, B, COLUMNS, ROWS, COLS)
    G = C // K
    if ONE_PASS:
        mu = tl.load(long_ptr + c // K, mask=live, other=0)
        inverse = _inverse(tl.load(long_ptr + G + c // K, mask=live, other=1), P, K_P, EPS)
    else:
        mu = tl.load(saved_ptr + c // K, mask=live, other=0)
        inverse = tl.load(saved_ptr + G + c // K, mask=live, other=0)
    gain, bias = _gain_and_bias(weight_ptr, bias_ptr, c, live, WIDE)
    scale = inverse * gain
    count = tl.full((), 0, tl.int64)
    rest = tl.zeros((ROWS, COLS), WIDE)
    powers = tl.zeros((ROWS, COLS), WIDE)
    for t in range(begin, end):
        offsets, inside = _tile(t, block, A, C, B, COLUMNS, ROWS, COLS)
        x = _load(x_ptr, offsets, inside, WIDE)
        from_mu = x - mu
        tl.store(y_ptr + offsets, (from_mu * scale + bias).to(y_ptr.dtype.element_ty), mask=inside)
        if ONE_PASS:
            count += _count(t, A, B, COLUMNS, ROWS, COLS)
            rest += tl.where(inside, from_mu, 0)
            powers += tl.where(inside, _power(tl.abs(from_mu if CENTERED else x), P), 0)
    if ONE_PASS:
        _store_partial(
            partial_ptr, part, c, live, C, mu, _total(rest, COLUMNS), _total(powers, COLUMNS), count.to(WIDE)
        )


@triton.jit
def _paths(
    sum_g,
    sum_gx,
    sum_u,
    g,
    live,
    n,
    G,
    inverse,
    slope,
    scale_ptr,
    long_ptr,
    short_ptr,
    count_ptr,
    recent,
    P: tl.constexpr,
    CENTERED: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    B3: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """ĝ_mu and p·ĝ_m of each statistic, from Σdx̂, Σdx̂·(x − mu) and Σu; short_grad takes this call's in."""
    cut = slope != slope  # NaN
    if WINDOW > 0.0:  # the streams are in units of 1/s and 1/s^p
        unit = inverse
        unit_m = _power(inverse, P)
        s = tl.where(inverse > 0, 1 / tl.where(inverse > 0, inverse, 1), 0)
        s_p = _power(s, P)
    else:
        unit = inverse * 0 + 1
        unit_m = unit
        s = unit
        s_p = unit
    g_m = -(sum_gx / n) * slope * s_p
    g_mu = -(sum_g / n) * inverse
    if scale_ptr is not None:
        unscale = tl.load(scale_ptr).to(g_m.dtype)
        g_m = g_m / unscale
        g_mu = g_mu / unscale
    if long_ptr is None:
        moment_path = g_m
    else:
        count = tl.load(count_ptr + g, mask=live, other=0)
        short_m = _fresh(tl.load(short_ptr + G + g, mask=live, other=0), count, g_m, n)
        long_m = tl.load(long_ptr + G + g, mask=live, other=0)
        moment_path = _mixed(long_m, short_m, g_m, recent, B1, B2, B3, WINDOW) * unit_m
    moment_path = tl.where(cut, 0, moment_path) * P
    if CENTERED:
        g_mu = g_mu - moment_path * (tl.where(cut, 0, sum_u) / n)
    if long_ptr is None:
        location_path = g_mu
    else:
        g_mu = g_mu * s
        short_mu = _fresh(tl.load(short_ptr + g, mask=live, other=0), count, g_mu, n)
        long_mu = tl.load(long_ptr + g, mask=live, other=0)
        location_path = _mixed(long_mu, short_mu, g_mu, recent, B1, B2, B3, WINDOW) * unit
        takes = live & _finite(g_m) & _finite(g_mu)
        _wait_for_readers()
        tl.store(short_ptr + g, short_mu, mask=takes)
        tl.store(short_ptr + G + g, short_m, mask=takes)
        tl.store(count_ptr + g, count + n, mask=takes)
    if scale_ptr is not None:
        moment_path = moment_path * unscale
        location_path = location_path * unscale
    return location_path, moment_path


@triton.jit
def _input_gradient_tile(
    dy,
    x,
    mu,
    scale,
    location_path,
    moment_path,
    cut,
    P: tl.constexpr,
    CENTERED: tl.constexpr,
):
    """dx = dx̂/s + ĝ_mu + ĝ_m·p·u."""
    u = tl.where(cut, 0, _derivative_of_power(x - mu if CENTERED else x, P))  # it may not be finite either
    return dy * scale + location_path + moment_path * u


@triton.jit
def backward_whole(
    x_ptr,
    dy_ptr,
    dx_ptr,
    weight_ptr,
    dweight_ptr,
    dbias_ptr,
    saved_ptr,
    scale_ptr,
    long_ptr,
    short_ptr,
    count_ptr,
    samples_ptr,
    A,
    C_UNITS,
    B_UNITS,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
    WIDE: tl.constexpr,
    P: tl.constexpr,
    CENTERED: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    B3: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """A whole backward pass, each program all elements of its channels; the counterpart of ``forward_whole``."""
    C, B = _sizes(C_UNITS, B_UNITS, UNIT, COLUMNS)
    block = tl.program_id(0)
    c, live = _channels(block, C, COLUMNS, COLS)
    mu = tl.load(saved_ptr + c, mask=live, other=0)
    inverse = tl.load(saved_ptr + C + c, mask=live, other=0)
    slope = tl.load(saved_ptr + 2 * C + c, mask=live, other=0)
    gain, _ = _gain_and_bias(weight_ptr, None, c, live, WIDE)

    sum_dy = tl.zeros((ROWS, COLS), WIDE)
    sum_dyx = tl.zeros((ROWS, COLS), WIDE)
    sum_u = tl.zeros((ROWS, COLS), WIDE)
    for t in range(TILES):
        offsets, inside = _tile(t, block, A, C, B, COLUMNS, ROWS, COLS)
        dy = _load(dy_ptr, offsets, inside, WIDE)
        from_mu = _load(x_ptr, offsets, inside, WIDE) - mu
        sum_dy += dy
        sum_dyx += tl.where(inside, dy * from_mu, 0)
        if CENTERED:
            sum_u += tl.where(inside, _derivative_of_power(from_mu, P), 0)
    dbias = _total(sum_dy, COLUMNS)
    dgain = _total(sum_dyx, COLUMNS)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, dbias.to(dbias_ptr.dtype.element_ty), mask=live)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, (dgain * inverse).to(dweight_ptr.dtype.element_ty), mask=live)
    location_path, moment_path = _paths(
        gain * dbias,
        gain * dgain,
        _total(sum_u, COLUMNS),
        c,
        live,
        A * B,
        C,
        inverse,
        slope,
        scale_ptr,
        long_ptr,
        short_ptr,
        count_ptr,
        _recent(samples_ptr, None, 0, WINDOW),
        P,
        CENTERED,
        B1,
        B2,
        B3,
        WINDOW,
    )
    cut = slope != slope  # NaN
    scale = gain * inverse
    for t in range(TILES):
        offsets, inside = _tile(t, block, A, C, B, COLUMNS, ROWS, COLS)
        dy = _load(dy_ptr, offsets, inside, WIDE)
        x = _load(x_ptr, offsets, inside, WIDE)
        dx = _input_gradient_tile(dy, x, mu, scale, location_path, moment_path, cut, P, CENTERED)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def collect_gradients(
    x_ptr,
    dy_ptr,
    dx_ptr,
    weight_ptr,
    saved_ptr,
    scale_ptr,
    long_ptr,
    partial_ptr,
    A,
    C_UNITS,
    B_UNITS,
    K,
    tiles_each,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
    P: tl.constexpr,
    CENTERED: tl.constexpr,
    ONE_PASS: tl.constexpr,
):
    """Σdy, Σdy·(x − mu) and Σu of each channel, by many programs; partial results are (3, parts, C).

    ONE_PASS: the streamed gradients are the long-term ones, and dx is written on the way.
    """
    C, B = _sizes(C_UNITS, B_UNITS, UNIT, COLUMNS)
    block, part = tl.program_id(0), tl.program_id(1)
    c, live = _channels(block, C, COLUMNS, COLS)
    begin, end = _range(part, tiles_each, A, B, COLUMNS, ROWS, COLS)
    G = C // K
    mu = tl.load(saved_ptr + c // K, mask=live, other=0)
    if ONE_PASS:
        gain, _ = _gain_and_bias(weight_ptr, None, c, live, WIDE)
        scale = gain * tl.load(saved_ptr + G + c // K, mask=live, other=0)
        slope = tl.load(saved_ptr + 2 * G + c // K, mask=live, other=0)
        cut = slope != slope  # NaN
        location_path = tl.load(long_ptr + c // K, mask=live, other=0)
        moment_path = tl.where(cut, 0, tl.load(long_ptr + G + c // K, mask=live, other=0) * P)
        if scale_ptr is not None:
            loss_scale = tl.load(scale_ptr).to(WIDE)
            location_path = location_path * loss_scale
            moment_path = moment_path * loss_scale
    sum_dy = tl.zeros((ROWS, COLS), WIDE)
    sum_dyx = tl.zeros((ROWS, COLS), WIDE)
    sum_u = tl.zeros((ROWS, COLS), WIDE)
    for t in range(begin, end):
        offsets, inside = _tile(t, block, A, C, B, COLUMNS, ROWS, COLS)
        dy = _load(dy_ptr, offsets, inside, WIDE)
        x = _load(x_ptr, offsets, inside, WIDE)
        from_mu = x - mu
        sum_dy += dy
        sum_dyx += tl.where(inside, dy * from_mu, 0)
        if CENTERED:
            sum_u += tl.where(inside, _derivative_of_power(from_mu, P), 0)
        if ONE_PASS:
            dx = _input_gradient_tile(dy, x, mu, scale, location_path, moment_path, cut, P, CENTERED)
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    rows = tl.num_programs(1) * C
    into = partial_ptr + part * C + c
    tl.store(into, _total(sum_dy, COLUMNS), mask=live)
    tl.store(into + rows, _total(sum_dyx, COLUMNS), mask=live)
    tl.store(into + 2 * rows, _total(sum_u, COLUMNS), mask=live)


@triton.jit
def combine_gradients(
    partial_ptr,
    paths_ptr,
    weight_ptr,
    dweight_ptr,
    dbias_ptr,
    saved_ptr,
    scale_ptr,
    long_ptr,
    short_ptr,
    count_ptr,
    samples_ptr,
    parts,
    n,
    K,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    P: tl.constexpr,
    CENTERED: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    B3: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """One program per statistic: gradients of gain and bias, and the streamed gradients into ``paths``, (2, G)."""
    g = tl.program_id(0) + tl.arange(0, 1)[None, :]
    live = g >= 0
    G = tl.num_programs(0)
    C = G * K
    rows = parts * C
    part = tl.arange(0, PARTS)[:, None]
    inverse = tl.load(saved_ptr + G + g)
    sum_g = tl.zeros((1, CHANNELS), WIDE)
    sum_gx = tl.zeros((1, CHANNELS), WIDE)
    sum_u = tl.zeros((1, CHANNELS), WIDE)
    for k in range(0, K, CHANNELS):
        at, inside = _partials(g, k, part, parts, C, K, CHANNELS)
        dbias = tl.sum(tl.load(partial_ptr + at, mask=inside, other=0), 0, keep_dims=True)
        dgain = tl.sum(tl.load(partial_ptr + rows + at, mask=inside, other=0), 0, keep_dims=True)
        sum_u += tl.sum(tl.load(partial_ptr + 2 * rows + at, mask=inside, other=0), 0, keep_dims=True)
        channel = k + tl.arange(0, CHANNELS)[None, :]
        c, exists = g * K + channel, channel < K
        if dbias_ptr is not None:
            tl.store(dbias_ptr + c, dbias.to(dbias_ptr.dtype.element_ty), mask=exists)
        if dweight_ptr is not None:
            tl.store(dweight_ptr + c, (dgain * inverse).to(dweight_ptr.dtype.element_ty), mask=exists)
        gain, _ = _gain_and_bias(weight_ptr, None, c, exists, WIDE)
        sum_g += gain * dbias
        sum_gx += gain * dgain
    location_path, moment_path = _paths(
        tl.sum(sum_g, 1, keep_dims=True),
        tl.sum(sum_gx, 1, keep_dims=True),
        tl.sum(sum_u, 1, keep_dims=True),
        g,
        live,
        n,
        G,
        inverse,
        tl.load(saved_ptr + 2 * G + g),
        scale_ptr,
        long_ptr,
        short_ptr,
        count_ptr,
        _recent(samples_ptr, None, 0, WINDOW),
        P,
        CENTERED,
        B1,
        B2,
        B3,
        WINDOW,
    )
    if paths_ptr is not None:
        tl.store(paths_ptr + g, location_path)
        tl.store(paths_ptr + G + g, moment_path)


@triton.jit
def input_gradient(
    x_ptr,
    dy_ptr,
    dx_ptr,
    weight_ptr,
    saved_ptr,
    paths_ptr,
    A,
    C_UNITS,
    B_UNITS,
    K,
    tiles_each,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
    P: tl.constexpr,
    CENTERED: tl.constexpr,
):
    """dx, in the reverse order of ``collect_gradients``."""
    C, B = _sizes(C_UNITS, B_UNITS, UNIT, COLUMNS)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    c, live = _channels(block, C, COLUMNS, COLS)
    begin, end = _range(part, tiles_each, A, B, COLUMNS, ROWS, COLS)
    g = c // K
    G = C // K
    mu = tl.load(saved_ptr + g, mask=live, other=0)
    gain, _ = _gain_and_bias(weight_ptr, None, c, live, WIDE)
    scale = gain * tl.load(saved_ptr + G + g, mask=live, other=0)
    slope = tl.load(saved_ptr + 2 * G + g, mask=live, other=0)
    location_path = tl.load(paths_ptr + g, mask=live, other=0)
    moment_path = tl.load(paths_ptr + G + g, mask=live, other=0)
    cut = slope != slope  # NaN
    for t in range(begin, end):
        offsets, inside = _tile(t, block, A, C, B, COLUMNS, ROWS, COLS)
        dy = _load(dy_ptr, offsets, inside, WIDE)
        x = _load(x_ptr, offsets, inside, WIDE)
        dx = _input_gradient_tile(dy, x, mu, scale, location_path, moment_path, cut, P, CENTERED)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def commit_streams(pointers_ptr, rates_ptr, G_MAX: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """A weight update (docs/mathematics.md) for many streams at once: one program per stream and direction.

    ``pointers`` is (programs, 6): where long, short, count and samples lie, and seen, which is 0 for gradients; and G.
    ``rates`` is (programs, 3): what a weight update keeps and takes, and the window, which stands in their place where
    it is above zero.
    """
    program = tl.program_id(0)
    row = pointers_ptr + 6 * program
    long_ptr = tl.load(row).to(tl.pointer_type(WIDE))
    short_ptr = tl.load(row + 1).to(tl.pointer_type(WIDE))
    count_ptr = tl.load(row + 2).to(tl.pointer_type(tl.int64))
    samples_ptr = tl.load(row + 3).to(tl.pointer_type(tl.int64))
    has_seen = tl.load(row + 4) != 0
    seen_ptr = tl.load(row + 4).to(tl.pointer_type(tl.int64))
    G = tl.load(row + 5)
    keep = tl.load(rates_ptr + 3 * program)
    take = tl.load(rates_ptr + 3 * program + 1)
    window = tl.load(rates_ptr + 3 * program + 2)
    samples = tl.load(samples_ptr)
    seen = tl.load(seen_ptr, mask=has_seen, other=0)
    lasting = tl.where(has_seen, tl.minimum((seen + PRIOR_SAMPLES).to(tl.float64), window), window)
    total = tl.where(window > 0, lasting + samples.to(tl.float64), 1)
    keep = tl.where(window > 0, lasting / total, keep).to(WIDE)
    take = tl.where(window > 0, samples.to(tl.float64) / total, take).to(WIDE)
    for begin in range(0, G_MAX, BLOCK):
        g = begin + tl.arange(0, BLOCK)
        inside = g < G
        used = tl.load(count_ptr + g, mask=inside, other=0) > 0
        for statistic in range(2):
            at = statistic * G + g
            long = tl.load(long_ptr + at, mask=inside, other=0)
            short = tl.load(short_ptr + at, mask=inside, other=0)
            tl.store(long_ptr + at, keep * long + take * short, mask=inside & used)
            tl.store(short_ptr + at, tl.zeros((BLOCK,), WIDE), mask=inside)
        tl.store(count_ptr + g, tl.zeros((BLOCK,), tl.int64), mask=inside)
    _wait_for_readers()
    tl.store(seen_ptr, seen + samples, mask=has_seen)
    tl.store(samples_ptr, 0)
