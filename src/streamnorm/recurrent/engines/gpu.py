"""The engine on NVIDIA GPUs, which gives what ``by_hand`` gives in fewer launches.

Each time step is one matrix product with the hidden state and one Triton kernel: statistics of both paths and their
streams, gates, the new state; backward likewise, from the last step to the first. The input's products of all steps
are one product, and so are the weights' gradients. ``gpu_kernels.py`` has the kernels, and ``ops/gpu`` says when
Triton runs here. Nothing is read back from the device, so a training step can be captured into a CUDA graph: what the
window rule asks for is a counter on the device, to which a kernel adds how far the sequence has come.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial, wraps
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from ...core.reference import NormRef
from ...layers import Norm
from ...ops.another_pass import another_pass
from ...ops.checks import check_state
from ...ops.gpu import device
from ...ops.gpu.arguments import Affine, Stream, backward_stream, forward_stream, use_of
from ...ops.gpu.cut import ceil, power_of_two
from ...ops.gpu.engine import fits, flat
from ..steps import GATES, Hidden, Norms, Weights
from . import sequence
from .sequence import Gradient, Tensors, after_last, states_before

KINDS = ("RNN_TANH", "RNN_RELU", "GRU", "LSTM")
_PER_FEATURE = NormRef.batch("channel")

MOST_UNITS = 8
"""Hidden units of a program: few, since there are few of them for so many processors, but whole sectors of memory."""

MOST_ROWS = 64
"""Sequences of a tile."""

ELEMENTS_PER_WARP = 256
"""Elements of a tile for each of at most 8 warps: with twice as many, a step does not fit into registers."""


def supports(kind: str, data: Tensor, sizes: list[int], hidden: Hidden, weights: Weights, norms: Norms) -> bool:
    """Plain tensors on the device and streaming norms of each feature; ``by_hand`` takes what else is supported."""
    return (
        kind in KINDS
        and weights.hr is None
        and norms.cell is None
        and all(norm is None or _is_known(norm) for norm in norms)
        and all(_is_plain(t) and t.device == data.device for t in (data, *hidden, *weights) if t is not None)
        and all(norm is None or norm.long.device == data.device for norm in norms)
        and not torch._C._len_torch_dispatch_stack()
        and not device.is_watched()
        and torch._C._get_tracing_state() is None
        and sequence.supports(data, sizes, hidden, weights, norms)
    )


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and device.holds(t)


def _is_known(norm: nn.Module) -> bool:
    return (
        isinstance(norm, Norm)
        and norm.stream is not None
        and norm.ref == _PER_FEATURE
        and norm.formula.own == math.inf
        and fits(norm.state)
    )


class _Path(NamedTuple):
    """A path as the kernels see it; without a norm it has products and a bias alone. The stream is one direction's."""

    products: Tensor
    affine: Affine
    saved: Tensor | None = None
    stream: Stream = Stream()


class _Into(NamedTuple):
    """Room for the gradients of a path: ``dy`` for the gates of one step, ``dx`` for the products of all steps."""

    dy: Tensor
    dx: Tensor | None
    gradients: Affine
    loss_scale: Tensor | None


class _States(NamedTuple):
    """The hidden states and cells of all steps, and the tensors that hold those before this step."""

    output: Tensor
    cells: Tensor | None
    previous: Tensor
    previous_cells: Tensor | None


class _Gradients(NamedTuple):
    """Of the hidden states of all steps, and of the hidden state and cell between two steps."""

    output: Tensor | None
    hidden: Tensor
    cells: Tensor | None


class Cut(NamedTuple):
    """The division of a step into programs."""

    units: int
    rows: int
    tiles: int
    programs: int
    warps: int
    columns: int


@lru_cache(maxsize=4096)
def _cut(rows: int, hidden: int, gates: int) -> Cut:
    units = min(MOST_UNITS, power_of_two(hidden))
    columns = units * power_of_two(gates)
    tile = min(MOST_ROWS, power_of_two(rows))
    warps = max(1, min(8, tile * columns // ELEMENTS_PER_WARP))
    return Cut(units, tile, ceil(rows, tile), ceil(hidden, units), warps, columns)


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _at_device(method: _Method) -> _Method:
    """Launch on the device of the tensors that come first."""

    @wraps(method)
    def launched(self: Any, t: Tensors, *rest: Any) -> Any:
        with device.current(t.data):
            return method(self, t, *rest)

    return cast(_Method, launched)


class _Pass:
    """A pass over a sequence: what forward leaves for backward, inputs and outputs apart."""

    def __init__(self, kind: str, sizes: list[int], norms: Norms, t: Tensors) -> None:
        self.kind, self.sizes, self.norms = kind, sizes, norms
        self.was_passed = False
        self.formulas = [norm.formula if isinstance(norm, Norm) else None for norm in norms[:2]]
        # Backward moves the streams that forward had, whatever is in their place by then.
        self.states = [norm.state if isinstance(norm, Norm) else None for norm in norms[:2]]
        self.starts = [0, *accumulate(sizes)]
        self.hidden, self.features = t.w_hh.shape[1], GATES[kind] * t.w_hh.shape[1]
        self.cut = _cut(sizes[0], self.hidden, GATES[kind])
        self.h0, self.c0 = t.h.resolve_neg().contiguous(), flat(t.c)
        new = t.data.new_empty
        self.cells = new(self.starts[-1], self.hidden) if kind == "LSTM" else None
        self.x = self._path(norms.ih, t.data @ t.w_ih.t(), t.gain_ih, t.b_ih)
        self.h = self._path(norms.hh, new(self.starts[-1], self.features), t.gain_hh, t.b_hh)

    def _path(self, norm: nn.Module | None, products: Tensor, gain: Tensor | None, bias: Tensor | None) -> _Path:
        saved = None if norm is None else products.new_empty(len(self.sizes), 4, self.features)
        return _Path(products, Affine(*(None if t is None else flat(t.detach()) for t in (gain, bias))), saved)

    @_at_device
    def forward(self, t: Tensors) -> tuple[Tensor, ...]:
        """All steps."""
        output = self.h.products.new_empty(self.starts[-1], self.hidden)
        x, h = (path._replace(stream=forward_stream(state)) for path, state in zip((self.x, self.h), self.states))
        constants = self._constants(backward=False)
        w_t, products = t.w_hh.t(), self.h.products.split(self.sizes)
        for number, before in enumerate(states_before(self.h0, output, self.sizes)):
            torch.mm(before, w_t, out=products[number])
            numbers = self._numbers(number, after=self.starts[number + 1])
            _launch("forward_step", self.cut, (x, h, self._states(number, output), *numbers), constants)
        for path in (x, h):
            _count(path, self.starts[-1])
        return output, *(after_last(states, self.sizes) for states in (output, self.cells) if states is not None)

    def _constants(self, *, backward: bool) -> dict[str, Any]:
        """The compile-time constants of the kernels of one direction."""
        dtype = self.h.products.dtype
        of_x, of_h = (f if f is None else use_of(f, dtype, backward=backward) for f in self.formulas)
        return {
            "OF_X": of_x,
            "OF_H": of_h,
            "KIND": self.kind,
            "GATES": GATES[self.kind],
            "ROWS": self.cut.rows,
            "TILES": self.cut.tiles,
            "UNITS": self.cut.units,
            "COLS": self.cut.columns,
        }

    def _states(self, number: int, output: Tensor) -> _States:
        """The hidden states and cells that a step reads and writes."""
        previous = (self.h0, self.c0) if number == 0 else (output, self.cells)
        return _States(output, self.cells, *previous)

    def _numbers(self, number: int, after: int) -> tuple[int, ...]:
        """The position of a step in the sequence, as the integer arguments of its kernel."""
        before = self.starts[number - 1] if number else 0
        return number, self.starts[number], before, self.sizes[number], after, self.hidden

    @_at_device
    def backward(
        self, t: Tensors, needs: Tensors, output: Tensor, d_output: Gradient, d_finals: tuple[Gradient, ...]
    ) -> dict[str, Gradient]:
        """All steps in reverse."""
        if d_output is not None:
            d_output = d_output.resolve_neg().contiguous()
        d_hidden, d_cells = (
            None if start is None else torch.zeros_like(start) if d is None else _copy(d)
            for d, start in zip((*d_finals, None), (self.h0, self.c0))
        )
        assert d_hidden is not None
        gradients = _Gradients(d_output, d_hidden, d_cells)
        flows_into_x, first_flows = needs.data or needs.w_ih, needs.w_hh or needs.h
        # If no later backward goes through this graph, gradients may lie where the products were.
        keeps = sequence.keeps_graph()
        d_x, d_h = (torch.empty_like(path.products) if keeps else path.products for path in (self.x, self.h))
        into_x, into_h = self._into(d_x if flows_into_x else None, d_h)
        for state in self.states:
            if state is not None:
                check_state(state, self.features, output.dtype, output.get_device())
        constants, total, d_products = self._constants(backward=True), self.starts[-1], d_h.split(self.sizes)
        uses = total if flows_into_x else 0, total if first_flows else total - self.sizes[0]
        others = [another_pass(state, n) if self.was_passed else None for state, n in zip(self.states, uses)]
        self.was_passed = True
        now = (state if other is None else other.scratch for state, other in zip(self.states, others))
        x, h = (path._replace(stream=backward_stream(state)) for path, state in zip((self.x, self.h), now))
        for number in reversed(range(len(self.sizes))):
            into = (into_x, into_h if number > 0 or first_flows else into_h._replace(dx=None))
            numbers = self._numbers(number, after=total - self.starts[number])
            arguments = (x, h, *into, self._states(number, output), gradients, *numbers)
            _launch("backward_step", self.cut, arguments, constants)
            if number > 0 or needs.h:
                d_hidden[: self.sizes[number]].addmm_(d_products[number], t.w_hh)
        for path, n, other in zip((x, h), uses, others):
            _count(path, n)
            if other is not None:
                other.finish()

        found: dict[str, Gradient] = {
            "gain_ih": into_x.gradients.gain,
            "b_ih": into_x.gradients.bias,
            "gain_hh": into_h.gradients.gain,
            "b_hh": into_h.gradients.bias,
        }
        found["h"] = d_hidden
        if d_cells is not None:
            found["c"] = d_cells
        if needs.data:
            found["data"] = d_x @ t.w_ih
        if needs.w_ih:
            found["w_ih"] = d_x.t() @ t.data
        if needs.w_hh:
            found["w_hh"] = d_h.t() @ torch.cat(states_before(self.h0, output, self.sizes))
        return found

    def _into(self, d_x: Tensor | None, d_h: Tensor) -> tuple[_Into, _Into]:
        """Room for the gradients of both paths. Only in a GRU those of their gates differ."""
        gain_x, bias_x, gain_h, bias_h = d_h.new_zeros(4, self.features)
        dy_x = d_h.new_empty(self.sizes[0], self.features)
        dy_h = torch.empty_like(dy_x) if self.kind == "GRU" else dy_x
        scale_x, scale_h = (_grad_scale(norm, d_h) for norm in self.norms[:2])
        return _Into(dy_x, d_x, Affine(gain_x, bias_x), scale_x), _Into(dy_h, d_h, Affine(gain_h, bias_h), scale_h)


def _copy(t: Tensor) -> Tensor:
    return t.resolve_neg().clone(memory_format=torch.contiguous_format)


def _count(path: _Path, samples: int) -> None:
    """Once the kernels of a sequence have counted for themselves."""
    if path.stream.samples is not None:
        path.stream.samples.add_(samples)


def _grad_scale(norm: nn.Module | None, like: Tensor) -> Tensor | None:
    scale = norm._ties.grad_scale if isinstance(norm, Norm) else None
    return None if scale is None else scale.to(like.device)


run = partial(sequence.run, _Pass)
"""Run one layer in one direction; ``loop.run`` explains the arguments."""


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    """The kernels, imported when they are needed: Triton takes a while to import."""
    from . import gpu_kernels

    return gpu_kernels


def _launch(name: str, cut: Cut, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Launch the kernel of a step."""
    getattr(_kernels(), name)[cut.programs,](*arguments, **constants, num_warps=cut.warps)
