"""The engine in C++, which gives what ``by_hand`` gives in less time.

A call does a time step, or with few sequences all of them: matrix products with the hidden state, statistics of both
paths, gates. This module decides what goes there and makes the tensors; ``csrc/recurrent`` advances the streams.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from functools import lru_cache
from itertools import zip_longest
from operator import attrgetter
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn

from ...core.reference import NormRef
from ...core.spec import FIELDS, GRADIENTS, State
from ...layers import GeneralBatchNorm, Norm, SampleNorm
from ...ops.another_pass import AnotherPass, another_pass
from ...ops.native import LIBRARY
from ...ops.native import extension as _tensors
from ..checks import check_forward
from ..norms import PerStepBatchNorm
from ..steps import GATES, Hidden, Norms, Weights
from . import by_hand, sequence
from .sequence import Gradient, Tensors, after_last, states_before

_CELLS = {"RNN_TANH": 0, "RNN_RELU": 1, "GRU": 2, "LSTM": 3}
_UNNORMALIZED, _FEATURES, _SEQUENCES = range(3)
_PER_FEATURE, _PER_SEQUENCE = NormRef.batch("channel"), NormRef.sample("layer")

_LANES = 16
"""The most numbers that a register of the kernel holds."""
_FEW_ROWS = 4
"""Up to so many rows a matrix is read as it is; for more it is packed into panels first."""
_BLOCK = 16
"""The number of time steps for which 1/s is kept at a time where a step has few rows: it is as large as the values."""
_SMALL_PRODUCT = 1 << 21
"""Multiplications in a product that one thread finishes before several of PyTorch's have begun."""
_GRAIN = 1 << 19
"""Multiplications in a product for each thread of the kernel's own."""


def _load() -> tuple[Any, bool]:
    """The extension, or None where it was not built; and whether it multiplies faster than PyTorch on one thread."""
    try:
        from ...ops import _recurrent  # type: ignore[attr-defined]
    except ImportError:
        return None, False
    _, outruns = _recurrent.setup(os.environ.get("STREAMNORM_ISA") or None, LIBRARY)
    return _recurrent, outruns


_recurrent, _outruns_torch = _load()


def supports(kind: str, data: Tensor, sizes: list[int], hidden: Hidden, weights: Weights, norms: Norms) -> bool:
    """Plain CPU tensors that fit each other, and the usual norms; ``by_hand`` takes what else ``sequence`` supports."""
    return (
        _recurrent is not None
        and _tensors is not None
        and kind in _CELLS
        and weights.hr is None
        and norms.cell is None
        and all(norm is None or _kind(norm) != _UNNORMALIZED for norm in norms)
        and _fit(kind, data, sizes[0], hidden, weights)
        and all(_is_plain(t) for t in (data, *hidden, *weights) if t is not None)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and sequence.supports(data, sizes, hidden, weights, norms)
    )


def _is_plain(t: Tensor) -> bool:
    """Whether memory holds the values as they are."""
    return type(t) in (Tensor, nn.Parameter) and t.is_cpu and not t.is_neg()


def _fit(kind: str, data: Tensor, rows: int, hidden: Hidden, weights: Weights) -> bool:
    """Whether the weights, the input and where the sequences start fit each other, and all of their memory is there."""
    units = weights.hh.shape[1]
    return (
        weights.ih.shape == (GATES[kind] * units, data.shape[1])
        and len(weights.hh) == len(weights.ih)
        and all(h.shape == (rows, units) for h in hidden)
        and _tensors.are_whole(data, *weights[:2], *hidden)
    )


class _Lent(NamedTuple):
    """The tensors of its layer that a path reads and changes.

    They are held, and live on when others are put in their place: a buffer as it is, and a parameter as a second
    tensor on the same memory, since ``.data`` gives a parameter other memory.
    """

    gain: Tensor | None
    bias: Tensor | None
    state: State | None = None
    running: tuple[Tensor, Tensor, Tensor] | None = None
    """Mean, variance and number of batches."""
    steps: int | None = None
    """The number of time steps that have running statistics of their own; None where all share one set."""

    @classmethod
    def of(cls, norm: nn.Module | None, gain: Tensor | None, bias: Tensor | None) -> _Lent:
        """The tensors of a path with this norm, gain and bias."""
        if isinstance(norm, GeneralBatchNorm):
            steps = norm.max_steps if isinstance(norm, PerStepBatchNorm) else None
            return cls(gain, bias, None, (norm.running_mean, norm.running_var, norm.num_batches_tracked), steps)
        return cls(gain, bias, norm.state if isinstance(norm, Norm) and norm.stream is not None else None)

    def placed(self, values: Tensor) -> Fields:
        """The present addresses of all tensors, by the names in ``_Path``, for a path with these values.

        Raises:
            _Unfit: something is not what such a layer has.
        """
        mean, var, batches = self.running or (None, None, None)
        buffers = _NO_BUFFERS if self.state is None else _buffers(self.state)
        tensors = (self.gain, self.bias, mean, var, *buffers, batches)
        shapes = _shapes(values.shape[1], self.steps)
        found: tuple[int, ...] | None = _tensors.lend(values.dtype == torch.float64, tensors, shapes, _COUNTS)
        if found is None:
            raise _Unfit(
                "a gain, a bias or a buffer of a recurrent layer was changed between forward and backward: it has "
                "another size or dtype, or its storage was freed or shrunk"
            )
        return dict(zip(_LENT, found))


def _kind(norm: nn.Module) -> int:
    """The kernel's code for what the statistics of a norm are collected over; 0 for a norm that it does not know."""
    if not isinstance(norm, Norm) or norm.weight is None or norm.formula.p not in (1, 2) or not norm.formula.centered:
        return _UNNORMALIZED
    if norm.formula.own < math.inf:
        return _UNNORMALIZED
    if isinstance(norm, SampleNorm):
        return _SEQUENCES if norm.ref == _PER_SEQUENCE else _UNNORMALIZED
    if norm.ref != _PER_FEATURE or (isinstance(norm, GeneralBatchNorm) and norm.momentum is None):
        return _UNNORMALIZED
    return _FEATURES


class _Unfit(RuntimeError):
    """A gain, a bias or a buffer is not as the kernel takes it; nothing has changed."""


class _Path(NamedTuple):
    """``Path`` of csrc/recurrent."""

    kind: int = 0
    p: int = 0
    values: int = 0
    inverse: int = 0
    gain: int = 0
    bias: int = 0
    long: int = 0
    short: int = 0
    count: int = 0  # type: ignore[assignment]  # a tuple method of that name is of no use here
    samples: int = 0
    long_grad: int = 0
    short_grad: int = 0
    grad_count: int = 0
    grad_samples: int = 0
    running_mean: int = 0
    running_var: int = 0
    running_rows: int = 0
    tracked: int = 0
    marks: int = 0
    samples_before: int = 0
    dx: int = 0
    d_gain: int = 0
    d_bias: int = 0
    k: float = 1.0
    eps: float = 0.0
    evidence: float = 0.0
    grad_window: float = 0.0
    floor: float = 0.0
    alpha1: float = 0.0
    alpha2: float = 0.0
    alpha3: float = 1.0
    beta1: float = 0.0
    beta2: float = 0.0
    beta3: float = 1.0
    momentum: float = 0.0
    grad_scale: float = 1.0


_BUFFERS = sorted(FIELDS, key=lambda name: (FIELDS[name].is_count, name not in _Path._fields))
"""The buffers of a stream: averages, counts, and what the kernel does not read."""

_NO_BUFFERS = (None,) * len(_BUFFERS)
_LENT = ("gain", "bias", "running_mean", "running_var", *(name for name in _BUFFERS if name in _Path._fields))
_COUNTS = 1 + sum(FIELDS[name].is_count for name in _BUFFERS)  # of batches, too
_buffers = attrgetter(*_BUFFERS)


@lru_cache(maxsize=256)
def _shapes(features: int, steps: int | None) -> tuple[tuple[int, ...], ...]:
    """Of what is lent, and of the number of batches."""
    own, each = (features,), () if steps is None else (steps,)
    running = (*each, features)
    return (own, own, running, running, *(FIELDS[name].shape(features) for name in _BUFFERS), each)


class _Plan(NamedTuple):
    """``Plan`` of csrc/recurrent without its two paths."""

    cell: int
    gates: int
    hidden: int
    is_double: int
    block: int
    starts: int
    output: int
    cells: int
    h0: int
    c0: int
    weight: int
    panels: int
    d_output: int = 0
    d_hidden: int = 0
    d_cells: int = 0
    scratch: int = 0
    first_h_flows: int = 0
    h0_wanted: int = 0
    threads: int = 1


Layout = tuple[tuple[str, str], ...]
"""The names of a struct's fields, each with its type in ``struct``'s letters."""


def _layout(kind: type) -> Layout:
    return tuple((name, "d" if of is float else "q") for name, of in get_type_hints(kind).items())


def check_layouts(theirs: tuple[Layout, Layout]) -> None:
    """Compare the structs of the extension with those that are packed for it here.

    Raises:
        ImportError: one has another field in some place; the extension was built from other sources.
    """
    for kind, fields in zip((_Plan, _Path), theirs):
        for place, (here, there) in enumerate(zip_longest(_layout(kind), fields)):
            if here != there:
                raise ImportError(
                    f"field {place} of {kind.__name__} is {here}, but the extension streamnorm.ops._recurrent has "
                    f"{there}: it was built from other sources, build it again"
                )


if _recurrent is not None:
    check_layouts(_recurrent.layouts())
_pack = struct.Struct("".join(letter for kind in (_Plan, _Path, _Path) for _, letter in _layout(kind))).pack

Fields = dict[str, Any]
"""The fields of a ``_Plan`` or a ``_Path``, in their order: a dict is changed in a tenth of a NamedTuple's time."""

_PLAN, _PATH = ({**dict.fromkeys(kind._fields, 0), **kind._field_defaults} for kind in (_Plan, _Path))


def _bytes(plan: Fields, path_x: Fields, path_h: Fields) -> bytes:
    """The bytes that the kernel reads: structs one behind the other."""
    return _pack(*plan.values(), *path_x.values(), *path_h.values())


def _path(norm: nn.Module | None, values: Tensor, lent: _Lent, marks: Tensor | None, tracked: Tensor | None) -> Fields:
    """The fields of a path that the kernel reads in both directions."""
    path = {**_PATH, **lent.placed(values)}
    path.update(values=values.data_ptr(), marks=_pointer(marks), tracked=_pointer(tracked))
    if norm is None:
        return path
    assert isinstance(norm, Norm)
    formula = norm.formula
    path.update(kind=_kind(norm), p=int(formula.p), k=formula.k, eps=formula.eps)
    if isinstance(norm, GeneralBatchNorm):
        path.update(momentum=norm.momentum, running_rows=lent.steps or 1)
    if formula.alpha is not None and formula.beta is not None:
        path.update(zip(("alpha1", "alpha2", "alpha3", "beta1", "beta2", "beta3"), formula.alpha + formula.beta))
    if lent.state is not None:
        path["floor"] = formula.floor
    if formula.window is not None:
        assert lent.state is not None
        path.update(evidence=formula.lasting(int(lent.state.seen)), grad_window=formula.grad_window)
        path["samples_before"] = int(lent.state.samples)
    return path


def _in_scratch(another: AnotherPass | None) -> Fields:
    """The addresses of a state's gradient half in a backward pass that is not the first through its graph."""
    return {} if another is None else {name: getattr(another.scratch, name).data_ptr() for name in GRADIENTS}


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class _Pass:
    """A pass over a sequence: the memory that forward leaves for backward, inputs and outputs apart.

    ``x`` and ``h`` hold the products of both paths for all steps, and then their deviations from mu. From these the
    inverse of s can be found again; with few sequences only ``marks`` of the streams are kept for that.
    """

    def __init__(self, kind: str, sizes: list[int], norms: Norms, t: Tensors) -> None:
        rows, self.width = t.data.shape[0], t.w_hh.shape[1]
        self.kind, self.sizes, self.norms = kind, sizes, norms
        self.features = GATES[kind] * self.width
        new = t.data.new_empty
        self.x, self.h = product(t.data, t.w_ih.t()), new(rows, self.features)
        self.block = _BLOCK if sizes[0] <= _FEW_ROWS and len(sizes) > 2 * _BLOCK else len(sizes)
        self.inverses: list[Tensor] | None = None
        self.marks = [self._marks(new, norm) for norm in norms[:2]]
        self.cells = new(rows, self.width) if kind == "LSTM" else None
        self.h0: Tensor = t.h.detach().contiguous()
        self.c0: Tensor | None = None if t.c is None else t.c.detach().contiguous()
        self.starts = _starts(sizes)
        self.weight = t.w_hh.detach().contiguous() if self._multiplies(t.w_hh) else None
        affine = [None if p is None else p.detach() for p in (t.gain_ih, t.b_ih, t.gain_hh, t.b_hh)]
        self.lent_x, self.lent_h = _Lent.of(norms.ih, *affine[:2]), _Lent.of(norms.hh, *affine[2:])
        self.was_passed = False
        self.tracked = [
            torch.zeros(len(sizes), dtype=torch.int64) if isinstance(norm, GeneralBatchNorm) else None
            for norm in norms[:2]
        ]
        self.path_x, self.path_h = map(
            _path, norms[:2], (self.x, self.h), (self.lent_x, self.lent_h), self.marks, self.tracked
        )

    def _marks(self, new: Callable[..., Tensor], norm: nn.Module | None) -> Tensor | None:
        """Room for the state of a stream before each block of steps."""
        if self.block == len(self.sizes) or not isinstance(norm, Norm) or norm.stream is None:
            return None
        return new(1 + 2 * (len(self.sizes) // self.block + 1), self.features)

    def _inverses(self) -> list[Tensor]:
        """Room for the inverse of s of both paths: of each row, or of each feature in a block of steps."""
        kinds = self.path_x["kind"], self.path_h["kind"]
        return [self.x.new_empty(len(self.x) if kind == _SEQUENCES else self.block * self.features) for kind in kinds]

    def _multiplies(self, w_hh: Tensor) -> bool:
        """Whether the kernel multiplies with the hidden states too; else PyTorch does, with a call for each step."""
        rows = self.sizes[0]
        if rows <= _FEW_ROWS:
            return True
        if len(self.sizes) < 4:
            return False
        several = torch.get_num_threads() > 1
        return _outruns_torch or not (rows > 64 or (several and rows * w_hh.numel() > _SMALL_PRODUCT))

    def _panels(self, forward: bool) -> Tensor | None:
        """The weight as the kernel multiplies many rows by it."""
        if self.weight is None or self.sizes[0] <= _FEW_ROWS:
            return None
        return _panels(self.weight.t() if forward else self.weight)

    def plan(self, output: Tensor, panels: Tensor | None) -> Fields:
        """The fields of the plan that forward and backward share."""
        return {
            **_PLAN,
            "cell": _CELLS[self.kind],
            "gates": GATES[self.kind],
            "hidden": self.width,
            "is_double": int(output.dtype == torch.float64),
            "block": self.block,
            "starts": self.starts.data_ptr(),
            "output": output.data_ptr(),
            "cells": _pointer(self.cells),
            "h0": self.h0.data_ptr(),
            "c0": _pointer(self.c0),
            "weight": _pointer(self.weight),
            "panels": _pointer(panels),
            # However few the rows, the whole weight is read.
            "threads": _threads(max(self.sizes[0], _FEW_ROWS) * self.width * self.features),
        }

    def forward(self, t: Tensors) -> tuple[Tensor, ...]:
        """All steps: the hidden states, and the hidden tensors after each sequence's last step."""
        output = self.x.new_empty(len(self.x), self.width)
        inverses, panels = self._inverses(), self._panels(forward=True)
        if self.block == len(self.sizes) or _SEQUENCES in (self.path_x["kind"], self.path_h["kind"]):
            self.inverses = inverses
        path_x, path_h = (
            {**path, "inverse": inverse.data_ptr()} for path, inverse in zip((self.path_x, self.path_h), inverses)
        )
        plan = _bytes(self.plan(output, panels), path_x, path_h)
        if self.weight is not None:
            _recurrent.forward_all(plan, len(self.sizes))
        else:
            step, w_t = _recurrent.forward, t.w_hh.t()
            befores = states_before(self.h0, output, self.sizes)
            for number, (before, into) in enumerate(zip(befores, self.h.split(self.sizes))):
                torch.mm(before, w_t, out=into)
                step(plan, number)
        for norm, tracked in zip(self.norms, self.tracked):
            if isinstance(norm, GeneralBatchNorm) and tracked is not None:
                _count(norm, tracked)
        return output, *(after_last(h, self.sizes) for h in (output, self.cells) if h is not None)

    def _all_before(self, output: Tensor) -> Tensor:
        """The hidden states before all steps, one after the other."""
        if self.sizes[0] == self.sizes[-1]:
            return torch.cat((self.h0, output[: -self.sizes[0]]))
        return torch.cat(states_before(self.h0, output, self.sizes))

    def backward(
        self, t: Tensors, needs: Tensors, output: Tensor, d_output: Gradient, d_finals: tuple[Gradient, ...]
    ) -> dict[str, Gradient]:
        """All steps in reverse."""
        if d_output is not None:
            d_output = d_output.resolve_neg().contiguous()
        inverses = self._inverses() if self.inverses is None else self.inverses
        # If no later backward goes through this graph, gradients may lie where the deviations were.
        d_x, d_h = (torch.empty_like(values) if sequence.keeps_graph() else values for values in (self.x, self.h))
        starts = (self.h0,) if self.c0 is None else (self.h0, self.c0)
        d_hidden = [
            torch.zeros_like(start) if d is None else d.clone(memory_format=torch.contiguous_format)
            for d, start in zip(d_finals, starts)
        ]
        d_affine = output.new_zeros(4, self.features)
        scratch = output.new_empty((GATES[self.kind] + 1) * self.sizes[0] * (self.width + _LANES))
        panels = self._panels(forward=False)
        first_h_flows = needs.w_hh or needs.h
        plan = self.plan(output, panels)
        plan.update(
            d_output=_pointer(d_output),
            d_hidden=d_hidden[0].data_ptr(),
            d_cells=0 if len(d_hidden) == 1 else d_hidden[1].data_ptr(),
            scratch=scratch.data_ptr(),
            first_h_flows=int(first_h_flows),
            h0_wanted=int(needs.h),
        )
        d_gain_x, d_bias_x, d_gain_h, d_bias_h = d_affine.unbind()
        path_x, path_h = {**self.path_x, **self.lent_x.placed(self.x)}, {**self.path_h, **self.lent_h.placed(self.h)}
        path_x.update(
            inverse=inverses[0].data_ptr(),
            dx=d_x.data_ptr() if needs.data or needs.w_ih else 0,
            d_gain=d_gain_x.data_ptr(),
            d_bias=d_bias_x.data_ptr(),
            grad_scale=_grad_scale(self.norms.ih),
        )
        path_h.update(
            inverse=inverses[1].data_ptr(),
            dx=d_h.data_ptr(),
            d_gain=d_gain_h.data_ptr(),
            d_bias=d_bias_h.data_ptr(),
            grad_scale=_grad_scale(self.norms.hh),
        )
        others: list[AnotherPass | None] = [None, None]
        if self.was_passed:
            uses_of_h = len(self.x) - (0 if first_h_flows else self.sizes[0])
            uses = (self.lent_x, len(self.x)), (self.lent_h, uses_of_h)
            others = [another_pass(lent.state, n) for lent, n in uses]
        self.was_passed = True
        for path, other in zip((path_x, path_h), others):
            path.update(_in_scratch(other))
        self._steps_backward(_bytes(plan, path_x, path_h), d_hidden[0], d_h, t.w_hh, needs.h)
        for other in others:
            if other is not None:
                other.finish()

        found: dict[str, Gradient] = {"gain_ih": d_gain_x, "b_ih": d_bias_x, "gain_hh": d_gain_h, "b_hh": d_bias_h}
        found.update(zip(("h", "c"), d_hidden))
        if needs.data:
            found["data"] = product(d_x, t.w_ih)
        if needs.w_ih:
            found["w_ih"] = product(d_x.t(), t.data)
        if needs.w_hh:
            found["w_hh"] = product(d_h.t(), self._all_before(output))
        return found

    def _steps_backward(self, plan: bytes, d_hidden: Tensor, d_h: Tensor, w_hh: Tensor, h0_wanted: bool) -> None:
        if self.weight is not None:
            _recurrent.backward_all(plan, len(self.sizes))
            return
        d_products = d_h.split(self.sizes)
        for number in range(len(self.sizes) - 1, -1, -1):
            _recurrent.backward(plan, number)
            if number > 0 or h0_wanted:
                d_hidden[: self.sizes[number]].addmm_(d_products[number], w_hh)


def run(
    kind: str, data: Tensor, sizes: list[int], hidden: Hidden, weights: Weights, norms: Norms
) -> tuple[Tensor, Hidden]:
    """Run one layer in one direction; ``loop.run`` explains the arguments."""
    try:
        return sequence.run(_Pass, kind, data, sizes, hidden, weights, norms)
    except _Unfit:  # as where a gain has gaps
        check_forward(kind, data, sizes, hidden, weights, norms)
        return by_hand.run(kind, data, sizes, hidden, weights, norms)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a·b, by the kernel where that is likely to be faster than PyTorch."""
    (rows, terms), columns = a.shape, b.shape[1]
    if not _outruns_torch or min(rows, terms, columns) < 32 or a.is_neg() or b.is_neg() or a.dtype != b.dtype:
        return a @ b
    out, panels, is_double = a.new_empty(rows, columns), _panels(b), int(a.dtype == torch.float64)
    sizes = (rows, columns, terms, _threads(rows * columns * terms))
    _recurrent.multiply(is_double, a.data_ptr(), *a.stride(), panels.data_ptr(), out.data_ptr(), *sizes)
    return out


def _threads(multiplications: int) -> int:
    """The number of threads for so many multiplications."""
    return max(1, min(torch.get_num_threads(), multiplications // _GRAIN))


def _panels(b: Tensor) -> Tensor:
    """A matrix in panels of columns, in the order in which the kernel reads it."""
    terms, columns = b.shape
    panels = b.new_empty(terms * (columns + 2 * _LANES))
    _recurrent.pack(int(b.dtype == torch.float64), b.data_ptr(), *b.stride(), terms, columns, panels.data_ptr())
    return panels


def _starts(sizes: list[int]) -> Tensor:
    """The first row of each step, and the end of the last step."""
    if sizes[0] == sizes[-1]:
        return torch.arange(0, sizes[0] * len(sizes) + 1, sizes[0])
    return torch.tensor([0, *sizes]).cumsum(0)


def _count(norm: GeneralBatchNorm, tracked: Tensor) -> None:
    """Count batches and select the last time step, as the running statistics' own update would have done."""
    if isinstance(norm, PerStepBatchNorm):
        norm.select(len(tracked) - 1)
        own, shared = tracked[: norm.max_steps], tracked[norm.max_steps :]
        norm.num_batches_tracked[: len(own)] += own
        norm.num_batches_tracked[-1] += shared.sum()
    else:
        norm.num_batches_tracked += tracked.sum()


def _grad_scale(norm: nn.Module | None) -> float:
    return 1.0 if not isinstance(norm, Norm) or norm._ties.grad_scale is None else float(norm._ties.grad_scale)
