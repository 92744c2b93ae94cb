"""The kernels of the backward pass."""

from __future__ import annotations

import triton
import triton.language as tl

from ..arguments import Affine, Statistics
from .formulas import derivative_of_power, gain_and_bias, input_gradient_of, paths
from .tiles import channels_of, in_elements, load, partials_of, places_of, reversed_program, sum_of, tiles_of, zeros


@triton.jit
def backward_whole(
    x_ptr,
    dy_ptr,
    dx_ptr,
    gain_ptr,
    gradients,
    saved_ptr,
    loss_scale_ptr,
    stream,
    sizes,
    USE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """A whole backward pass, each program all elements of its channels; the counterpart of ``forward_whole``."""
    WIDE: tl.constexpr = saved_ptr.dtype.element_ty
    sizes = in_elements(sizes, TILE)
    block = tl.program_id(0)
    c, live = channels_of(block, sizes, TILE)
    C = sizes.channels
    statistics = Statistics(c, live, sizes.rows * sizes.places, C)
    mu = tl.load(saved_ptr + c, mask=live, other=0)
    inverse = tl.load(saved_ptr + C + c, mask=live, other=0)
    slope = tl.load(saved_ptr + 2 * C + c, mask=live, other=0)
    gain, _ = gain_and_bias(Affine(gain_ptr, None), c, live, WIDE)

    sum_dy = zeros(TILE, WIDE)
    sum_dyx = zeros(TILE, WIDE)
    sum_u = zeros(TILE, WIDE)
    for t in range(TILES):
        offsets, inside = places_of(t, block, sizes, TILE)
        dy = load(dy_ptr, offsets, inside, WIDE)
        from_mu = load(x_ptr, offsets, inside, WIDE) - mu
        sum_dy += dy
        sum_dyx += tl.where(inside, dy * from_mu, 0)
        if USE.centered:
            sum_u += tl.where(inside, derivative_of_power(from_mu, USE.p), 0)
    d_bias = sum_of(sum_dy, TILE.columns)
    d_gain = sum_of(sum_dyx, TILE.columns)
    total_u = sum_of(sum_u, TILE.columns)
    _store_affine(gradients, c, live, d_gain * inverse, d_bias)
    location_path, moment_path = paths(
        gain * d_bias, gain * d_gain, total_u, statistics, inverse, slope, loss_scale_ptr, stream, 0, USE
    )
    cut = slope != slope  # NaN
    scale = gain * inverse
    for t in range(TILES):
        offsets, inside = places_of(t, block, sizes, TILE)
        dy = load(dy_ptr, offsets, inside, WIDE)
        x = load(x_ptr, offsets, inside, WIDE)
        dx = input_gradient_of(dy, x, mu, scale, location_path, moment_path, cut, USE.p, USE.centered)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_affine(gradients, c, live, d_gain, d_bias):
    """The gradients of gain and bias, where they are wanted."""
    if gradients.bias is not None:
        tl.store(gradients.bias + c, d_bias.to(gradients.bias.dtype.element_ty), mask=live)
    if gradients.gain is not None:
        tl.store(gradients.gain + c, d_gain.to(gradients.gain.dtype.element_ty), mask=live)


@triton.jit
def collect_gradients(
    x_ptr,
    dy_ptr,
    saved_ptr,
    partial_ptr,
    one_pass,
    sizes,
    tiles_each,
    P: tl.constexpr,
    CENTERED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Σdy, Σdy·(x − mu) and Σu of each channel, by many programs; partial results are (3, parts, C).

    One pass: the streamed gradients are the long-term ones, and dx is written on the way.
    """
    WIDE: tl.constexpr = saved_ptr.dtype.element_ty
    sizes = in_elements(sizes, TILE)
    block, part = tl.program_id(0), tl.program_id(1)
    c, live = channels_of(block, sizes, TILE)
    begin, end = tiles_of(part, tiles_each, sizes, TILE)
    g, G = c // sizes.per_statistic, sizes.channels // sizes.per_statistic
    mu = tl.load(saved_ptr + g, mask=live, other=0)
    if one_pass.dx is not None:
        gain, _ = gain_and_bias(Affine(one_pass.gain, None), c, live, WIDE)
        scale = gain * tl.load(saved_ptr + G + g, mask=live, other=0)
        slope = tl.load(saved_ptr + 2 * G + g, mask=live, other=0)
        cut = slope != slope  # NaN
        location_path = tl.load(one_pass.long + g, mask=live, other=0)
        moment_path = tl.where(cut, 0, tl.load(one_pass.long + G + g, mask=live, other=0) * P)
        if one_pass.loss_scale is not None:
            loss_scale = tl.load(one_pass.loss_scale).to(WIDE)
            location_path = location_path * loss_scale
            moment_path = moment_path * loss_scale
    sum_dy = zeros(TILE, WIDE)
    sum_dyx = zeros(TILE, WIDE)
    sum_u = zeros(TILE, WIDE)
    for t in range(begin, end):
        offsets, inside = places_of(t, block, sizes, TILE)
        dy = load(dy_ptr, offsets, inside, WIDE)
        x = load(x_ptr, offsets, inside, WIDE)
        from_mu = x - mu
        sum_dy += dy
        sum_dyx += tl.where(inside, dy * from_mu, 0)
        if CENTERED:
            sum_u += tl.where(inside, derivative_of_power(from_mu, P), 0)
        if one_pass.dx is not None:
            dx = input_gradient_of(dy, x, mu, scale, location_path, moment_path, cut, P, CENTERED)
            tl.store(one_pass.dx + offsets, dx.to(one_pass.dx.dtype.element_ty), mask=inside)
    rows = tl.num_programs(1) * sizes.channels
    into = partial_ptr + part * sizes.channels + c
    tl.store(into, sum_of(sum_dy, TILE.columns), mask=live)
    tl.store(into + rows, sum_of(sum_dyx, TILE.columns), mask=live)
    tl.store(into + 2 * rows, sum_of(sum_u, TILE.columns), mask=live)


@triton.jit
def combine_gradients(
    partial_ptr,
    paths_ptr,
    gain_ptr,
    gradients,
    saved_ptr,
    loss_scale_ptr,
    stream,
    amounts,
    USE: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One program per statistic: gradients of gain and bias, and the streamed gradients into ``paths``, (2, G)."""
    WIDE: tl.constexpr = saved_ptr.dtype.element_ty
    g = tl.program_id(0) + tl.arange(0, 1)[None, :]
    G = tl.num_programs(0)
    C = G * amounts.channels
    rows = amounts.parts * C
    part = tl.arange(0, PARTS)[:, None]
    statistics = Statistics(g, g >= 0, amounts.elements, G)
    inverse = tl.load(saved_ptr + G + g)
    sum_g = tl.zeros((1, CHANNELS), WIDE)
    sum_gx = tl.zeros((1, CHANNELS), WIDE)
    sum_u = tl.zeros((1, CHANNELS), WIDE)
    for k in range(0, amounts.channels, CHANNELS):
        at, inside = partials_of(statistics, k, part, amounts, C, CHANNELS)
        d_bias = tl.sum(tl.load(partial_ptr + at, mask=inside, other=0), 0, keep_dims=True)
        d_gain = tl.sum(tl.load(partial_ptr + rows + at, mask=inside, other=0), 0, keep_dims=True)
        sum_u += tl.sum(tl.load(partial_ptr + 2 * rows + at, mask=inside, other=0), 0, keep_dims=True)
        channel = k + tl.arange(0, CHANNELS)[None, :]
        c, exists = g * amounts.channels + channel, channel < amounts.channels
        _store_affine(gradients, c, exists, d_gain * inverse, d_bias)
        gain, _ = gain_and_bias(Affine(gain_ptr, None), c, exists, WIDE)
        sum_g += gain * d_bias
        sum_gx += gain * d_gain
    total_g = tl.sum(sum_g, 1, keep_dims=True)
    total_gx = tl.sum(sum_gx, 1, keep_dims=True)
    total_u = tl.sum(sum_u, 1, keep_dims=True)
    slope = tl.load(saved_ptr + 2 * G + g)
    location_path, moment_path = paths(
        total_g, total_gx, total_u, statistics, inverse, slope, loss_scale_ptr, stream, 0, USE
    )
    if paths_ptr is not None:
        tl.store(paths_ptr + g, location_path)
        tl.store(paths_ptr + G + g, moment_path)


@triton.jit
def input_gradient(
    x_ptr,
    dy_ptr,
    dx_ptr,
    gain_ptr,
    saved_ptr,
    paths_ptr,
    sizes,
    tiles_each,
    P: tl.constexpr,
    CENTERED: tl.constexpr,
    TILE: tl.constexpr,
):
    """dx, in the reverse order of ``collect_gradients``."""
    WIDE: tl.constexpr = saved_ptr.dtype.element_ty
    sizes = in_elements(sizes, TILE)
    block, part = reversed_program()
    c, live = channels_of(block, sizes, TILE)
    begin, end = tiles_of(part, tiles_each, sizes, TILE)
    g, G = c // sizes.per_statistic, sizes.channels // sizes.per_statistic
    mu = tl.load(saved_ptr + g, mask=live, other=0)
    gain, _ = gain_and_bias(Affine(gain_ptr, None), c, live, WIDE)
    scale = gain * tl.load(saved_ptr + G + g, mask=live, other=0)
    slope = tl.load(saved_ptr + 2 * G + g, mask=live, other=0)
    location_path = tl.load(paths_ptr + g, mask=live, other=0)
    moment_path = tl.load(paths_ptr + G + g, mask=live, other=0)
    cut = slope != slope  # NaN
    for t in range(begin, end):
        offsets, inside = places_of(t, block, sizes, TILE)
        dy = load(dy_ptr, offsets, inside, WIDE)
        x = load(x_ptr, offsets, inside, WIDE)
        dx = input_gradient_of(dy, x, mu, scale, location_path, moment_path, cut, P, CENTERED)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
