"""The formulas of ``plain.py`` on values of a statistic, streams among them; kernels of recurrent networks share them.

Weights, orders and constants are constexpr: ``Use`` in ``arguments.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....core import spec

INF = tl.constexpr(float("inf"))
PRIOR_SAMPLES = tl.constexpr(spec.PRIOR_SAMPLES)


@triton.jit
def is_finite(value):
    """Neither infinite nor NaN."""
    return tl.abs(value) < INF  # not so for NaN either


@triton.jit
def quotient(a, b):
    """a / b, rounded correctly. In float32 ``/`` is faster and need not give 1 for a / a."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b.to(tl.float32))
    else:
        return a / b


@triton.jit
def to_power(a, P: tl.constexpr):
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
def derivative_of_power(d, P: tl.constexpr):
    """u = |d|^(P−1)·sgn d."""
    u = d
    if P != 2.0:
        sign = (d > 0).to(d.dtype) - (d < 0).to(d.dtype)
        u = sign
        if P != 1.0:
            u = to_power(tl.abs(d), P - 1.0) * sign
    return u


@triton.jit
def inverse_scale(m, USE: tl.constexpr):
    """1/s, with s = √(k²·m^(2/p) + eps)."""
    square = to_power(m, 2.0 / USE.p) * (USE.k * USE.k) + USE.eps
    s = tl.sqrt_rn(square) if square.dtype == tl.float32 else tl.sqrt(square)
    return quotient(tl.full(s.shape, 1, s.dtype), s)


@triton.jit
def slope_of(m, inverse, finite, USE: tl.constexpr):
    """sigma²/(p·m·s³), how the output falls as m grows; NaN marks an index whose statistic is not finite."""
    if USE.p == 2.0:
        power = m * 0 + 1
    else:
        alive = m >= USE.tiny
        if USE.p == 1.0:
            power = tl.where(alive, m, 0)
        else:
            power = tl.where(alive, tl.exp2(tl.log2(tl.where(alive, m, 1)) * (2.0 / USE.p - 1.0)), 0)
    slope = (power * inverse) * (inverse * inverse) * (USE.k * USE.k / USE.p)
    return tl.where(finite, slope, float("nan"))


@triton.jit
def weight_of_short(stream, more, USE: tl.constexpr):
    """The weight of the short-term average under the window rule, which alone asks for it.

    ``samples`` since the last weight update, those of this call included, and ``more`` that are not counted yet. The
    long-term average stands for E samples: of gradients, for which there is no ``seen``, the whole window from the
    start.
    """
    weight = 0.0
    if USE.window > 0.0:
        samples = (tl.load(stream.samples) + more).to(tl.float64)
        lasting = USE.window
        if stream.seen is not None:
            lasting = tl.minimum((tl.load(stream.seen) + PRIOR_SAMPLES).to(tl.float64), USE.window)
        weight = samples / (lasting + samples)
    return weight


@triton.jit
def own_share(stream, USE: tl.constexpr):
    """The weight of the present gradient under the window rule: S/(S + P) for a use of S samples."""
    own = 0.0
    if USE.own > 0.0:
        samples = (tl.load(stream.samples) * 0 + stream.use).to(tl.float64)  # a number alone would be float32
        own = samples / (samples + USE.own)
    return own


@triton.jit
def mixed(long, short, present, recent, own, USE: tl.constexpr):
    """Long, short and present, weighted. A weight of zero keeps a value out altogether, so 0·inf is 0 here."""
    if USE.window > 0.0:
        recent = recent.to(long.dtype)
        mix = (1 - recent) * long + recent * short
        if USE.own > 0.0:
            own = own.to(long.dtype)
            mix = (1 - own) * mix + own * present
    else:
        mix = tl.zeros_like(present)
        if USE.w1 != 0.0:
            mix += long * USE.w1
        if USE.w2 != 0.0:
            mix += short * USE.w2
        if USE.w3 != 0.0:
            mix += present * USE.w3
    return mix


@triton.jit
def average(before, count, value, n):
    """The average over ``count`` elements so far, and over n more whose average is ``value``."""
    after = count + n
    return before + (value - before) * quotient((after - count).to(before.dtype), after)


@triton.jit
def wait_for_readers():
    """Before a value is overwritten that this program has read: all of its warps read it, and one of them writes.

    Needed for values of a statistic, of which each warp has a copy, since a warp that lags would read what another one
    has written already.
    """
    tl.debug_barrier()


@triton.jit
def location(b_mu, statistics, stream, recent, USE: tl.constexpr):
    """mu, from the mean of this call and the stream."""
    if stream.long is None:
        mu = b_mu
    else:
        g, live = statistics.index, statistics.live
        count = tl.load(stream.count + g, mask=live, other=0)
        short = average(tl.load(stream.short + g, mask=live, other=0), count, b_mu, statistics.elements)
        mu = mixed(tl.load(stream.long + g, mask=live, other=0), short, b_mu, recent, 0.0, USE)
    return mu


@triton.jit
def advance(b_mu, b_m, statistics, stream, recent, USE: tl.constexpr):
    """m, and whether both statistics of this call are finite; where they are, short takes them in."""
    finite = is_finite(b_mu) & is_finite(b_m)
    if stream.long is None:
        m = b_m
        wait_for_readers()
    else:
        g, live, n, G = statistics.index, statistics.live, statistics.elements, statistics.number
        count = tl.load(stream.count + g, mask=live, other=0)
        short_mu = average(tl.load(stream.short + g, mask=live, other=0), count, b_mu, n)
        short_m = average(tl.load(stream.short + G + g, mask=live, other=0), count, b_m, n)
        m = mixed(tl.load(stream.long + G + g, mask=live, other=0), short_m, b_m, recent, 0.0, USE)
        if USE.floor > 0.0:
            m = tl.where(b_m * USE.floor > m, b_m * USE.floor, m)
        wait_for_readers()
        tl.store(stream.short + g, short_mu, mask=live & finite)
        tl.store(stream.short + G + g, short_m, mask=live & finite)
        tl.store(stream.count + g, count + n, mask=live & finite)
    return m, finite


@triton.jit
def save(saved_ptr, statistics, mu, m, finite, USE: tl.constexpr):
    """Write mu, 1/s, the slope and m of each statistic; return 1/s."""
    g, live, G = statistics.index, statistics.live, statistics.number
    inverse = inverse_scale(m, USE)
    tl.store(saved_ptr + g, mu, mask=live)
    tl.store(saved_ptr + G + g, inverse, mask=live)
    tl.store(saved_ptr + 2 * G + g, slope_of(m, inverse, finite, USE), mask=live)
    tl.store(saved_ptr + 3 * G + g, m, mask=live)
    return inverse


@triton.jit
def gain_and_bias(affine, c, live, WIDE: tl.constexpr):
    """Both of each channel, 1 and 0 where there is none."""
    gain = tl.full(c.shape, 1, WIDE)
    if affine.gain is not None:
        gain = tl.load(affine.gain + c, mask=live, other=0).to(WIDE)
    bias = tl.zeros(c.shape, WIDE)
    if affine.bias is not None:
        bias = tl.load(affine.bias + c, mask=live, other=0).to(WIDE)
    return gain, bias


@triton.jit
def paths(sum_g, sum_gx, sum_u, statistics, inverse, slope, loss_scale_ptr, stream, more, USE: tl.constexpr):
    """ĝ_mu and p·ĝ_m of each statistic, from Σdx̂, Σdx̂·(x − mu) and Σu; short_grad takes this call's in.

    ``more`` samples are not counted yet, as for ``weight_of_short``.
    """
    recent, own = weight_of_short(stream, more, USE), own_share(stream, USE)
    g, live, n, G = statistics.index, statistics.live, statistics.elements, statistics.number
    cut = slope != slope  # NaN
    if USE.window > 0.0:  # the streams are in units of 1/s and 1/s^p
        unit = inverse
        unit_m = to_power(inverse, USE.p)
        s = tl.where(inverse > 0, 1 / tl.where(inverse > 0, inverse, 1), 0)
        s_p = to_power(s, USE.p)
    else:
        unit = inverse * 0 + 1
        unit_m = unit
        s = unit
        s_p = unit
    g_m = -(sum_gx / n) * slope * s_p
    g_mu = -(sum_g / n) * inverse
    if loss_scale_ptr is not None:
        loss_scale = tl.load(loss_scale_ptr).to(g_m.dtype)
        g_m = g_m / loss_scale
        g_mu = g_mu / loss_scale
    if stream.long is None:
        moment_path = g_m
    else:
        count = tl.load(stream.count + g, mask=live, other=0)
        short_m = average(tl.load(stream.short + G + g, mask=live, other=0), count, g_m, n)
        long_m = tl.load(stream.long + G + g, mask=live, other=0)
        moment_path = mixed(long_m, short_m, g_m, recent, own, USE) * unit_m
    moment_path = tl.where(cut, 0, moment_path) * USE.p
    if USE.centered:
        g_mu = g_mu - moment_path * (tl.where(cut, 0, sum_u) / n)
    if stream.long is None:
        location_path = g_mu
    else:
        g_mu = g_mu * s
        short_mu = average(tl.load(stream.short + g, mask=live, other=0), count, g_mu, n)
        long_mu = tl.load(stream.long + g, mask=live, other=0)
        location_path = mixed(long_mu, short_mu, g_mu, recent, own, USE) * unit
        takes = live & is_finite(g_m) & is_finite(g_mu)
        wait_for_readers()
        tl.store(stream.short + g, short_mu, mask=takes)
        tl.store(stream.short + G + g, short_m, mask=takes)
        tl.store(stream.count + g, count + n, mask=takes)
    if loss_scale_ptr is not None:
        moment_path = moment_path * loss_scale
        location_path = location_path * loss_scale
    return location_path, moment_path


@triton.jit
def input_gradient_of(dy, x, mu, scale, location_path, moment_path, cut, P: tl.constexpr, CENTERED: tl.constexpr):
    """dx = dx̂/s + ĝ_mu + ĝ_m·p·u."""
    u = tl.where(cut, 0, derivative_of_power(x - mu if CENTERED else x, P))  # it may not be finite either
    return dy * scale + location_path + moment_path * u
