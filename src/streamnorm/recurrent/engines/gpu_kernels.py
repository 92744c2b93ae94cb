"""The Triton kernels of recurrent networks: one time step a launch; ``gpu.py`` launches them.

A program works on a few hidden units, in all gates and for all sequences of a step. With one statistic per feature
nothing of a unit depends on another one but by the matrix products, which PyTorch makes between the launches: no sum
crosses programs. For statistics the units of all gates lie side by side in a tile, ``ROWS × COLS``, so that a sum takes
one reduction for all gates; the gates themselves are computed on tiles of ``ROWS × UNITS``.

What one part of a kernel finds and the next one reads goes through memory, where the cache keeps it: mu and 1/s of
every feature (which backward reads too), and backward the gradients of the gates.

The formulas of the normalization are explained in ``ops/plain.py`` and computed by the functions of the other layers'
kernels; those of the networks are explained in ``steps.py``, their derivatives in ``by_hand.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...ops.gpu.arguments import Affine, Statistics
from ...ops.gpu.kernels.formulas import (
    advance,
    derivative_of_power,
    gain_and_bias,
    input_gradient_of,
    location,
    paths,
    save,
    to_power,
    wait_for_readers,
    weight_of_short,
)
from ...ops.gpu.kernels.tiles import load, sum_of


@triton.jit
def _wait_for_writers():
    """Before a value is read that another warp of this program has written."""
    tl.debug_barrier()


@triton.jit
def _features(H, GATES: tl.constexpr, UNITS: tl.constexpr, COLS: tl.constexpr):
    """The features of a program's units, gate after gate, and which of them exist."""
    column = tl.arange(0, COLS)[None, :]
    gate, unit = column // UNITS, tl.program_id(0) * UNITS + column % UNITS
    return gate * H + unit, (gate < GATES) & (unit < H)


@triton.jit
def _units(H, UNITS: tl.constexpr):
    """The hidden units of a program, and which of them exist."""
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[None, :]
    return unit, unit < H


@triton.jit
def _rows(t, rows, ROWS: tl.constexpr):
    """The sequences of tile t, and which of them have this step. 64 bits: offsets may be large."""
    row = t * ROWS + tl.arange(0, ROWS)[:, None]
    return row.to(tl.int64), row < rows


@triton.jit
def _collect_statistics(
    path,
    use,
    number,
    first,
    rows,
    after,
    g,
    live,
    G,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One use of a path's norm: the stream advances, and mu, 1/s, the slope and m of each feature are saved."""
    total = tl.zeros((ROWS, COLS), WIDE)
    for t in range(TILES):
        row, exists = _rows(t, rows, ROWS)
        total += load(path.products, (first + row) * G + g, exists & live, WIDE)
    b_mu = sum_of(total, True) / rows
    statistics = Statistics(g, live, rows, G)
    recent = weight_of_short(path.stream, after, use)
    mu = location(b_mu, statistics, path.stream, recent, use)

    powers = tl.zeros((ROWS, COLS), WIDE)
    for t in range(TILES):
        row, exists = _rows(t, rows, ROWS)
        d = load(path.products, (first + row) * G + g, exists & live, WIDE)
        if use.centered:
            d = d - mu
        powers += tl.where(exists, to_power(tl.abs(d), use.p), 0)
    b_m = sum_of(powers, True) / rows
    m, finite = advance(b_mu, b_m, statistics, path.stream, recent, use)
    save(_saved_at(path, number, G), statistics, mu, m, finite, use)


@triton.jit
def _saved_at(path, number, G):
    """The address of a step's statistics: ``saved`` is (steps, 4, G)."""
    return path.saved + number.to(tl.int64) * 4 * G


@triton.jit
def _normalized(path, number, gate, row, exists, unit, live, H, G, WIDE: tl.constexpr):
    """N(products) + bias of some units in one gate."""
    g = gate * H + unit
    value = load(path.products, row * G + g, exists & live, WIDE)
    gain, bias = gain_and_bias(path.affine, g, live, WIDE)
    if path.saved is not None:
        saved = _saved_at(path, number, G)
        inverse = tl.load(saved + G + g, mask=live, other=0)
        value = (value - tl.load(saved + g, mask=live, other=0)) * (inverse * gain)
    return value + bias


@triton.jit
def _sum_of_paths(x, h, number, gate, row, exists, unit, live, H, G, WIDE: tl.constexpr):
    """The sum of the normalized values of both paths in a gate."""
    from_x = _normalized(x, number, gate, row, exists, unit, live, H, G, WIDE)
    return from_x + _normalized(h, number, gate, row, exists, unit, live, H, G, WIDE)


@triton.jit
def _tanh(x):
    """By the first terms of its series near 0, where 1 − e^(−2|x|) has lost digits."""
    small: tl.constexpr = 0.01 if x.dtype == tl.float64 else 0.125
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1 - e) / (1 + e)
    square = x * x
    near = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return tl.where(tl.abs(x) < small, near, tl.where(x < 0, -far, far))


@triton.jit
def _gru_gates(x, h, number, row, exists, unit, live, H, G, WIDE: tl.constexpr):
    """Reset and update gate, what the past brings to the new state, and the new state."""
    reset = tl.sigmoid(_sum_of_paths(x, h, number, 0, row, exists, unit, live, H, G, WIDE))
    update = tl.sigmoid(_sum_of_paths(x, h, number, 1, row, exists, unit, live, H, G, WIDE))
    past = _normalized(h, number, 2, row, exists, unit, live, H, G, WIDE)
    new = _tanh(_normalized(x, number, 2, row, exists, unit, live, H, G, WIDE) + reset * past)
    return reset, update, past, new


@triton.jit
def _lstm_gates(x, h, number, row, exists, unit, live, H, G, WIDE: tl.constexpr):
    """Input and forget gate, the candidate, and the output gate."""
    input = tl.sigmoid(_sum_of_paths(x, h, number, 0, row, exists, unit, live, H, G, WIDE))
    forget = tl.sigmoid(_sum_of_paths(x, h, number, 1, row, exists, unit, live, H, G, WIDE))
    candidate = _tanh(_sum_of_paths(x, h, number, 2, row, exists, unit, live, H, G, WIDE))
    output = tl.sigmoid(_sum_of_paths(x, h, number, 3, row, exists, unit, live, H, G, WIDE))
    return input, forget, candidate, output


@triton.jit(do_not_specialize=["number", "first", "before", "rows", "after"])
def forward_step(
    x,
    h,
    states,
    number,
    first,
    before,
    rows,
    after,
    H,
    OF_X: tl.constexpr,
    OF_H: tl.constexpr,
    KIND: tl.constexpr,
    GATES: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    UNITS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A step, from the products of both paths to the hidden state.

    Its rows begin at ``first``, those of the state before it at ``before`` of ``states.previous``; ``after`` samples of
    this sequence have been seen once it is done.
    """
    WIDE: tl.constexpr = x.products.dtype.element_ty
    G = GATES * H
    g, live = _features(H, GATES, UNITS, COLS)
    if x.saved is not None:
        _collect_statistics(x, OF_X, number, first, rows, after, g, live, G, ROWS, COLS, TILES, WIDE)
    if h.saved is not None:
        _collect_statistics(h, OF_H, number, first, rows, after, g, live, G, ROWS, COLS, TILES, WIDE)
    _wait_for_writers()

    unit, live = _units(H, UNITS)
    for t in range(TILES):
        row, exists = _rows(t, rows, ROWS)
        inside = exists & live
        at, at_before = (first + row) * H + unit, (before + row) * H + unit
        row = first + row
        if KIND == "GRU":
            _, update, _, new = _gru_gates(x, h, number, row, exists, unit, live, H, G, WIDE)
            state = new + update * (load(states.previous, at_before, inside, WIDE) - new)
        elif KIND == "LSTM":
            input, forget, candidate, output = _lstm_gates(x, h, number, row, exists, unit, live, H, G, WIDE)
            cell = forget * load(states.previous_cells, at_before, inside, WIDE) + input * candidate
            tl.store(states.cells + at, cell, mask=inside)
            state = output * _tanh(cell)
        else:
            state = _sum_of_paths(x, h, number, 0, row, exists, unit, live, H, G, WIDE)
            state = _tanh(state) if KIND == "RNN_TANH" else tl.where(state < 0, 0, state)  # NaN stays
        tl.store(states.output + at, state, mask=inside)


@triton.jit(do_not_specialize=["number", "first", "before", "rows", "after"])
def backward_step(
    x,
    h,
    into_x,
    into_h,
    states,
    gradients,
    number,
    first,
    before,
    rows,
    after,
    H,
    OF_X: tl.constexpr,
    OF_H: tl.constexpr,
    KIND: tl.constexpr,
    GATES: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    UNITS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A step, from the gradient of its hidden state to those of the products.

    ``gradients.hidden`` comes in as what the later steps send to the state, to which that of the output is added, and
    goes out as what goes to the state before past the matrix product. The gates are computed again: to keep them would
    cost more memory than time.
    """
    WIDE: tl.constexpr = x.products.dtype.element_ty
    G = GATES * H
    unit, live = _units(H, UNITS)
    for t in range(TILES):
        local, exists = _rows(t, rows, ROWS)
        inside = exists & live
        row = first + local
        at, at_before, at_gradient = row * H + unit, (before + local) * H + unit, local * H + unit
        d = load(gradients.hidden, at_gradient, inside, WIDE)
        if gradients.output is not None:
            d += load(gradients.output, at, inside, WIDE)
        d_x, d_h = into_x.dy + local * G + unit, into_h.dy + local * G + unit
        if KIND == "GRU":
            reset, update, past, new = _gru_gates(x, h, number, row, exists, unit, live, H, G, WIDE)
            d_new = d * (1 - update) * (1 - new * new)
            d_update = d * (load(states.previous, at_before, inside, WIDE) - new) * update * (1 - update)
            d_reset = d_new * past * reset * (1 - reset)
            _store_gates(d_x, H, inside, (d_reset, d_update, d_new))
            _store_gates(d_h, H, inside, (d_reset, d_update, d_new * reset))
            into_past = d * update
        elif KIND == "LSTM":
            input, forget, candidate, output = _lstm_gates(x, h, number, row, exists, unit, live, H, G, WIDE)
            squashed = _tanh(load(states.cells, at, inside, WIDE))
            d_cell = load(gradients.cells, at_gradient, inside, WIDE) + d * output * (1 - squashed * squashed)
            d_input = d_cell * candidate * input * (1 - input)
            d_forget = d_cell * load(states.previous_cells, at_before, inside, WIDE) * forget * (1 - forget)
            d_candidate = d_cell * input * (1 - candidate * candidate)
            _store_gates(d_x, H, inside, (d_input, d_forget, d_candidate, d * squashed * output * (1 - output)))
            into_past = tl.zeros_like(d)
            wait_for_readers()
            tl.store(gradients.cells + at_gradient, d_cell * forget, mask=inside)
        else:
            state = load(states.output, at, inside, WIDE)
            d_sum = d * (1 - state * state) if KIND == "RNN_TANH" else tl.where(state <= 0, 0, d)
            tl.store(d_x, d_sum, mask=inside)
            into_past = tl.zeros_like(d)
        wait_for_readers()
        tl.store(gradients.hidden + at_gradient, into_past, mask=inside)
    _wait_for_writers()

    g, live = _features(H, GATES, UNITS, COLS)
    _path_backward(h, into_h, OF_H, number, first, rows, after, g, live, G, ROWS, COLS, TILES, WIDE)
    _path_backward(x, into_x, OF_X, number, first, rows, after, g, live, G, ROWS, COLS, TILES, WIDE)


@triton.jit
def _store_gates(pointers, H, inside, gradients):
    """The gradients of a unit's gates, one after the other."""
    for gate in tl.static_range(len(gradients)):
        tl.store(pointers + gate * H, gradients[gate], mask=inside)


@triton.jit
def _path_backward(
    path,
    into,
    use,
    number,
    first,
    rows,
    after,
    g,
    live,
    G,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """From the gradient behind gain and bias to that of the products, where it is wanted; the stream advances then.

    The gradients of gain and bias grow by those of this step.
    """
    mu = tl.zeros((1, COLS), WIDE)
    inverse = tl.full((1, COLS), 1, WIDE)
    slope = tl.zeros((1, COLS), WIDE)
    if path.saved is not None:
        saved = _saved_at(path, number, G)
        mu = tl.load(saved + g, mask=live, other=0)
        inverse = tl.load(saved + G + g, mask=live, other=0)
        slope = tl.load(saved + 2 * G + g, mask=live, other=0)
    gain, _ = gain_and_bias(Affine(path.affine.gain, None), g, live, WIDE)

    sum_dy = tl.zeros((ROWS, COLS), WIDE)
    sum_dyx = tl.zeros((ROWS, COLS), WIDE)
    sum_u = tl.zeros((ROWS, COLS), WIDE)
    for t in range(TILES):
        row, exists = _rows(t, rows, ROWS)
        inside = exists & live
        dy = load(into.dy, row * G + g, inside, WIDE)
        sum_dy += dy
        if path.saved is not None:
            from_mu = load(path.products, (first + row) * G + g, inside, WIDE) - mu
            sum_dyx += tl.where(exists, dy * from_mu, 0)
            if use.centered:
                sum_u += tl.where(exists, derivative_of_power(from_mu, use.p), 0)
    d_bias, d_gain = sum_of(sum_dy, True), sum_of(sum_dyx, True)
    _grow(into.gradients.bias, g, live, d_bias)
    if path.saved is not None:
        _grow(into.gradients.gain, g, live, d_gain * inverse)
        location_path = tl.zeros((1, COLS), WIDE)
        moment_path = tl.zeros((1, COLS), WIDE)
        if into.dx is not None:
            total_u = sum_of(sum_u, True)
            statistics = Statistics(g, live, rows, G)
            location_path, moment_path = paths(
                gain * d_bias,
                gain * d_gain,
                total_u,
                statistics,
                inverse,
                slope,
                into.loss_scale,
                path.stream,
                after,
                use,
            )
    if into.dx is not None:
        cut = slope != slope  # NaN
        for t in range(TILES):
            row, exists = _rows(t, rows, ROWS)
            inside = exists & live
            dx = load(into.dy, row * G + g, inside, WIDE)
            at = (first + row) * G + g
            if path.saved is not None:
                x = load(path.products, at, inside, WIDE)
                dx = input_gradient_of(dx, x, mu, gain * inverse, location_path, moment_path, cut, use.p, use.centered)
            wait_for_readers()  # dx may lie where the products do
            tl.store(into.dx + at, dx, mask=inside)


@triton.jit
def _grow(pointer, g, live, more):
    """Add to what earlier steps have left."""
    grown = tl.load(pointer + g, mask=live, other=0) + more
    wait_for_readers()
    tl.store(pointer + g, grown, mask=live)
