"""The whole-sequence engine with a C++ time step: statistics of both paths and all gates in one call.

This module decides what goes there, makes the tensors and multiplies the matrices; ``ops/recurrent.cpp`` does the rest
of each step and advances the streams. It does what ``fused`` does in PyTorch operations.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import updates
from ..norm import GeneralBatchNorm, Norm, SampleNorm
from ..normref import NormRef
from ..ops.first_order import first_order_only
from . import fused
from .norms import PerStepBatchNorm
from .steps import GATES, Hidden, Norms, Weights
from .traced import Tensors

_CELLS = {"RNN_TANH": 0, "RNN_RELU": 1, "GRU": 2, "LSTM": 3}
_UNNORMALIZED, _FEATURES, _SEQUENCES = range(3)
_FEW_ROWS = 4
_MOST_ROWS = 64
"""Up to so many sequences the kernel multiplies by itself, and runs all steps in one call."""
_LANES = 16
"""The most numbers that a register of the kernel holds."""


def _load() -> Any:
    """The extension, or None where it was not built."""
    try:
        from ..ops import _recurrent  # type: ignore[attr-defined]
    except ImportError:
        return None
    _recurrent.setup(os.environ.get("STREAMNORM_ISA") or None)
    return _recurrent


_recurrent = _load()
_keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def supports(kind: str, data: Tensor, sizes: list[int], hidden: Hidden, weights: Weights, norms: Norms) -> bool:
    """Plain CPU tensors, the usual norms; what ``fused`` supports besides is left to it."""
    tensors = [t for t in (data, *hidden, *weights) if t is not None]
    return (
        _recurrent is not None
        and kind in _CELLS
        and weights.hr is None
        and norms.cell is None
        and all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)
        and all(norm is None or _kind(norm) != _UNNORMALIZED for norm in norms)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._are_functorch_transforms_active()
        and fused.supports(data, sizes, hidden, weights, norms)
    )


def _kind(norm: nn.Module) -> int:
    """What the statistics of a norm are collected over, for the kernel; 0 where it does not know the norm."""
    if not isinstance(norm, Norm) or norm.weight is None or norm.moment.p not in (1, 2) or norm.moment.center != "mean":
        return _UNNORMALIZED
    if isinstance(norm, SampleNorm):
        return _SEQUENCES if norm.ref == NormRef.sample("layer") else _UNNORMALIZED
    if norm.ref != NormRef.batch("channel") or (isinstance(norm, GeneralBatchNorm) and norm.momentum is None):
        return _UNNORMALIZED
    return _FEATURES


class _Path(NamedTuple):
    """``Path`` of recurrent.cpp."""

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
    dx: int = 0
    d_gain: int = 0
    d_bias: int = 0
    k: float = 1.0
    eps: float = 0.0
    window: float = 0.0
    alpha1: float = 0.0
    alpha2: float = 0.0
    alpha3: float = 1.0
    beta1: float = 0.0
    beta2: float = 0.0
    beta3: float = 1.0
    momentum: float = 0.0
    grad_scale: float = 1.0


class _Plan(NamedTuple):
    """``Plan`` of recurrent.cpp without its two paths."""

    cell: int
    gates: int
    hidden: int
    is_double: int
    starts: int
    output: int
    saved: int
    cells: int
    h0: int
    c0: int
    d_output: int = 0
    d_hidden: int = 0
    d_cells: int = 0
    scratch: int = 0
    first_h_flows: int = 0
    h0_wanted: int = 0
    weight: int = 0
    panels: int = 0


_pack = struct.Struct("18q" + 2 * "20q11d").pack


def _path(norm: nn.Module | None, values: Tensor, inverse: Tensor, bias: Tensor | None) -> _Path:
    """All that the kernel is told of a path for the forward pass."""
    path = _Path(values=values.data_ptr(), inverse=inverse.data_ptr(), bias=_pointer(bias))
    if norm is None:
        return path
    assert isinstance(norm, Norm)
    formula = norm.formula
    path = path._replace(kind=_kind(norm), p=int(formula.p), gain=_pointer(norm.weight), k=formula.k, eps=formula.eps)
    if isinstance(norm, GeneralBatchNorm):
        mean = norm.running_mean
        assert norm.momentum is not None
        return path._replace(
            running_mean=mean.data_ptr(),
            running_var=norm.running_var.data_ptr(),
            running_rows=len(mean) if mean.dim() == 2 else 1,
            momentum=norm.momentum,
        )
    if norm.stream is not None:
        path = path._replace(**{name: buffer.data_ptr() for name, buffer in norm.state._asdict().items()})
        alpha, beta = formula.alpha or (0.0, 0.0, 0.0), formula.beta or (0.0, 0.0, 0.0)
        path = path._replace(alpha1=alpha[0], alpha2=alpha[1], alpha3=alpha[2], window=formula.window or 0.0)
        path = path._replace(beta1=beta[0], beta2=beta[1], beta3=beta[2])
    return path


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def run(
    kind: str, data: Tensor, sizes: list[int], hidden: Hidden, weights: Weights, norms: Norms
) -> tuple[Tensor, Hidden]:
    """Run one layer in one direction; :func:`streamnorm.recurrent.loop.run` explains the arguments."""
    for norm in norms:
        if isinstance(norm, Norm) and norm.stream is not None and not norm._watched:
            updates.watch(norm)
    gains = [getattr(norm, "weight", None) for norm in norms]
    tensors = Tensors._make((data, *weights, *gains, None, *hidden, *(None,) * (2 - len(hidden))))
    output, *finals = _Sequence.apply(kind, sizes, norms, *tensors)
    return output, tuple(finals)


class _Run:
    """The memory of one pass over a sequence: what forward leaves for backward, but for inputs and outputs."""

    def __init__(self, kind: str, sizes: list[int], norms: Norms, t: Tensors) -> None:
        rows, self.width = t.data.shape[0], t.w_hh.shape[1]
        self.kind, self.sizes, self.norms = kind, sizes, norms
        features = GATES[kind] * self.width
        new = t.data.new_empty
        self.x, self.h = t.data @ t.w_ih.t(), new(rows, features)
        self.inverse_x, self.inverse_h = (
            new(rows if norm is not None and _kind(norm) == _SEQUENCES else len(sizes) * features) for norm in norms[:2]
        )
        self.saved = None if kind.startswith("RNN") else new(rows, features)
        self.cells = new(rows, self.width) if kind == "LSTM" else None
        self.h0, self.c0 = t.h.contiguous(), None if t.c is None else t.c.contiguous()
        self.weight = t.w_hh.contiguous() if sizes[0] <= _MOST_ROWS else None
        self.panels = new((features + 2 * _LANES) * self.width) if _FEW_ROWS < sizes[0] <= _MOST_ROWS else None
        self.starts = torch.tensor([0, *sizes]).cumsum(0)
        self.path_x = _path(norms.ih, self.x, self.inverse_x, t.b_ih)
        self.path_h = _path(norms.hh, self.h, self.inverse_h, t.b_hh)

    def plan(self, output: Tensor) -> _Plan:
        """What both directions tell the kernel."""
        pointers = (self.starts, output, self.saved, self.cells, self.h0, self.c0)
        is_double = int(output.dtype == torch.float64)
        plan = _Plan(_CELLS[self.kind], GATES[self.kind], self.width, is_double, *map(_pointer, pointers))
        return plan._replace(weight=_pointer(self.weight), panels=_pointer(self.panels))

    def forward(self, w_hh: Tensor) -> tuple[Tensor, ...]:
        """All steps: the hidden states, and the hidden tensors after each sequence's last step."""
        output = self.x.new_empty(len(self.x), self.width)
        if self.weight is not None:
            plan = _pack(*self.plan(output), *self.path_x, *self.path_h)
            if self.panels is not None:
                _recurrent.pack(plan, 0)
            _recurrent.forward_all(plan, len(self.sizes))
        else:
            self._forward_by_steps(output, w_hh)
        for norm in self.norms:
            if isinstance(norm, GeneralBatchNorm):
                _count(norm, len(self.sizes))
        return output, *(_after_last(h, self.sizes) for h in (output, self.cells) if h is not None)

    def _forward_by_steps(self, output: Tensor, w_hh: Tensor) -> None:
        plan = _pack(*self.plan(output), *self.path_x, *self.path_h)
        product, step, w_t = torch.mm, _recurrent.forward, w_hh.t()
        for number, (before, into) in enumerate(zip(self.before(output), self.h.split(self.sizes))):
            product(before, w_t, out=into)
            step(plan, number)

    def before(self, output: Tensor) -> list[Tensor]:
        """The hidden states before each step, as views."""
        states = output.split(self.sizes)
        return [self.h0, *(state[:rows] for state, rows in zip(states, self.sizes[1:]))]

    def backward(
        self, t: Tensors, needs: Tensors, output: Tensor, d_output: Tensor | None, d_finals: tuple[Tensor | None, ...]
    ) -> dict[str, Tensor]:
        """All steps in reverse: the gradients of the inputs, by name."""
        # If no later backward goes through this graph, gradients may lie where the normalized values were.
        d_x, d_h = (torch.empty_like(values) if _keeps_graph() else values for values in (self.x, self.h))
        d_hidden = [
            torch.zeros_like(start) if d is None else d.clone(memory_format=torch.contiguous_format)
            for d, start in zip(d_finals, (self.h0, self.c0))
        ]
        d_affine = output.new_zeros(4, d_x.shape[1])
        scratch = output.new_empty((GATES[self.kind] + 1) * self.sizes[0] * (self.width + _LANES))
        flows_x, flows_h = needs.data or needs.w_ih, needs.w_hh or needs.h
        plan = self.plan(output)._replace(
            d_output=_pointer(d_output),
            d_hidden=d_hidden[0].data_ptr(),
            d_cells=_pointer(d_hidden[1] if len(d_hidden) > 1 else None),
            scratch=scratch.data_ptr(),
            first_h_flows=int(flows_h),
            h0_wanted=int(needs.h),
        )
        path_x = self.path_x._replace(
            dx=_pointer(d_x if flows_x else None),
            d_gain=d_affine[0].data_ptr(),
            d_bias=d_affine[1].data_ptr(),
            grad_scale=_grad_scale(self.norms.ih),
        )
        path_h = self.path_h._replace(
            dx=d_h.data_ptr(),
            d_gain=d_affine[2].data_ptr(),
            d_bias=d_affine[3].data_ptr(),
            grad_scale=_grad_scale(self.norms.hh),
        )
        described = _pack(*plan, *path_x, *path_h)
        if self.weight is not None:
            _recurrent.backward_all(described, len(self.sizes))
        else:
            d_products, step = d_h.split(self.sizes), _recurrent.backward
            for number in range(len(self.sizes) - 1, -1, -1):
                step(described, number)
                if number > 0 or needs.h:
                    d_hidden[0][: self.sizes[number]].addmm_(d_products[number], t.w_hh)

        found = {"gain_ih": d_affine[0], "b_ih": d_affine[1], "gain_hh": d_affine[2], "b_hh": d_affine[3]}
        found.update(zip(("h", "c"), d_hidden))
        if needs.data:
            found["data"] = d_x @ t.w_ih
        if needs.w_ih:
            found["w_ih"] = d_x.t() @ t.data
        if needs.w_hh:
            found["w_hh"] = d_h.t() @ torch.cat(self.before(output))
        return found


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: str, sizes: list[int], norms: Norms, *arguments: Any) -> Any:
        t = Tensors(*arguments)
        run = _Run(kind, sizes, norms, t)
        output, *finals = run.forward(t.w_hh)
        ctx.save_for_backward(output, *t)
        ctx.set_materialize_grads(False)
        ctx.run = run
        return output, *finals

    @staticmethod
    @first_order_only
    def backward(ctx: Any, d_output: Tensor | None, *d_finals: Tensor | None) -> Any:
        output, *saved = ctx.saved_tensors
        needs = Tensors(*ctx.needs_input_grad[3:])
        if d_output is not None:
            d_output = d_output.contiguous()
        found = ctx.run.backward(Tensors(*saved), needs, output, d_output, d_finals)
        gradients = (found.get(name) if need else None for name, need in needs._asdict().items())
        return None, None, None, *gradients


def _count(norm: GeneralBatchNorm, steps: int) -> None:
    """What the running statistics' own update would have counted and left behind."""
    if isinstance(norm, PerStepBatchNorm):
        norm.select(steps - 1)
        norm.num_batches_tracked[:steps] += 1
        norm.num_batches_tracked[-1] += max(0, steps - norm.max_steps)
    else:
        norm.num_batches_tracked += steps


def _after_last(states: Tensor, sizes: list[int]) -> Tensor:
    """Of the hidden tensors of all steps those after each sequence's own last step."""
    following = [*sizes[1:], 0]
    ended = [state[rows:] for state, rows in zip(states.split(sizes), following) if len(state) > rows]
    return torch.cat(ended[::-1])


def _grad_scale(norm: nn.Module | None) -> float:
    return 1.0 if not isinstance(norm, Norm) or norm._grad_scale is None else float(norm._grad_scale)
