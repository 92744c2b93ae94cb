"""Arguments of the kernels in groups. Triton takes a named tuple as one argument and reads its fields by name.

``Tile`` and ``Use`` are constants at compile time: a weight of zero then costs nothing, and a float64 constant stays
exact.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.spec import Formula, State


class Sizes(NamedTuple):
    """An input of shape (A, C, B), and K: every K neighbouring channels share a statistic.

    Outside of the kernels, the size that lies side by side in memory is in units of a vector load, so that the
    compiler may use one.
    """

    rows: int
    channels: int
    places: int
    per_statistic: int


class Tile(NamedTuple):
    """The elements that a program takes at a time; ``kernels`` explains both layouts."""

    columns: bool
    rows: int
    cols: int
    unit: int
    """Elements of a vector load."""


class Affine(NamedTuple):
    """Gain and bias, or where their gradients go."""

    gain: Tensor | None
    bias: Tensor | None


class Stream(NamedTuple):
    """One direction of a stream; without one, all fields are None.

    Gradients have no ``seen``, but the samples of the ``use``.
    """

    long: Tensor | None = None
    short: Tensor | None = None
    count: Tensor | None = None  # type: ignore[assignment]  # a tuple method of that name is of no use here
    samples: Tensor | None = None
    seen: Tensor | None = None
    use: int | None = None


def forward_stream(state: State | None) -> Stream:
    """The stream's statistics."""
    return Stream() if state is None else Stream(state.long, state.short, state.count, state.samples, state.seen)


def backward_stream(state: State | None, use: int | None = None) -> Stream:
    """The stream's gradients, for a use of so many samples; None where they have no share of their own."""
    if state is None:
        return Stream()
    return Stream(state.long_grad, state.short_grad, state.grad_count, state.grad_samples, None, use)


class OnePass(NamedTuple):
    """The arguments for writing dx while gradients are collected; all None where dx is written later."""

    dx: Tensor | None = None
    gain: Tensor | None = None
    loss_scale: Tensor | None = None
    long: Tensor | None = None


class Amounts(NamedTuple):
    """Behind one statistic: partial results of each channel, elements, channels."""

    parts: int
    elements: int
    channels: int


class Statistics(NamedTuple):
    """The statistics of a program, made by the kernels: indices, which of them exist, elements behind each, and G."""

    index: Any
    live: Any
    elements: Any
    number: Any


class Use(NamedTuple):
    """The formula in one direction: the moment, the scale, and α or β."""

    p: float
    centered: bool
    k: float
    eps: float
    tiny: float
    w1: float
    w2: float
    w3: float
    window: float
    own: float
    floor: float


def use_of(formula: Formula, dtype: torch.dtype, *, backward: bool) -> Use:
    """A formula for kernels that compute in ``dtype``."""
    mix, window = (formula.beta, formula.grad_window) if backward else (formula.alpha, formula.window)
    own = formula.own if backward and window and formula.own < math.inf else 0.0
    numbers = (*(mix or (0.0, 0.0, 0.0)), window or 0.0, own, formula.floor)
    return Use(formula.p, formula.centered, formula.k, formula.eps, torch.finfo(dtype).tiny, *numbers)
