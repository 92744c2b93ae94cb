"""The Triton engine: training steps on NVIDIA GPUs, in few passes over memory and without waiting for the device.

``kernels`` computes, ``cut.py`` decides how an input is cut into programs, ``passes.py`` launches. This module holds
the engine and what must be Python: the autograd function. Three ways lead to a result.

- *Whole*: each program takes all elements of its channels. One kernel each way, x read once (the cache serves the
  later looks). For channels that are small enough.
- *Split*: many programs for each channel. They collect partial sums, a small kernel combines them and advances the
  stream, a third kernel writes the output. Forward x is read twice for p = 2 and for centre zero; other p about the
  mean need mu before their moment and read it three times. Backward x and dy are read twice.
- *One pass*: α = (1, 0, 0) and β = (1, 0, 0) say what the statistics are before x is seen. One read and one write
  forward, two reads and one write backward; what the stream learns from this call is collected on the way.

Nothing here reads a value back from the device, so a step can be captured into a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ...core.spec import FIELDS, PRESENT_ONLY, Call, Formula, State, View
from .. import operations
from ..another_pass import counting_once
from ..base import Committed, Engine, Uses
from ..checks import check_backward
from ..derivatives import any_order
from . import device, passes
from .arguments import Affine
from .commit import commit
from .cut import channels_per_statistic, to_dense

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def fits(state: State) -> bool:
    """Whether kernels find the buffers of a stream where they look for them."""
    size, dtype = state.count.numel(), state.long.dtype
    return device.holds(state.long) and all(
        t.shape == field.shape(size) and t.dtype == field.dtype(dtype) and t.is_contiguous()
        for t, field in zip(state, FIELDS.values())
    )


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: None,
        view: View,
        formula: Formula,
        state: State | None,
        grad_scale: Tensor | None,
        stats: Tensor | None,
    ) -> Tensor:
        _refuse_other_devices(x, weight, bias, None if state is None else state.long)
        dense, layout = to_dense(x)
        plan = passes.plan(layout, view, formula, x.dtype, x.device, state is not None)
        with device.current(x):
            if state is not None:
                state.samples.add_(x.shape[0])
            y, saved = passes.forward(plan, dense, Affine(flat(weight), flat(bias)), state)
        if stats is not None:
            stats.copy_(saved[::3])
        ctx.save_for_backward(x, weight, None, saved[:3])
        ctx.plan, ctx.state, ctx.grad_scale, ctx.over = plan, state, grad_scale, None
        # What the PyTorch engine's backward pass wants to know, which serves where the input needs no gradient.
        ctx.view, ctx.formula = view, formula
        ctx.n, ctx.samples, ctx.has_bias = plan.elements, x.shape[0], bias is not None
        return y

    @staticmethod
    @any_order(operations.again)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        watched = type(dy) is not Tensor or torch._C._are_functorch_transforms_active()
        gradients = operations.gradients if watched or not ctx.needs_input_grad[0] else _gradients
        with counting_once(ctx):
            return *gradients(ctx, dy), *(None,) * 6


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As ``operations.gradients``."""
    x, weight, _, saved = ctx.saved_tensors
    state = ctx.state
    if not getattr(ctx, "checked", False):
        check_backward(x, dy, weight, saved, ctx.view, state)
    x, layout = to_dense(x)
    plan: passes.Plan = ctx.plan
    if layout != plan.layout:  # hooks on saved tensors bring x back as they like, such as torch's save_on_cpu
        plan = passes.plan(layout, ctx.view, ctx.formula, x.dtype, x.device, state is not None)
    if dy.stride() != x.stride() or dy.is_neg():
        dy = torch.empty_like(x).copy_(dy)
    with device.current(x):
        if state is not None:
            state.grad_samples.add_(ctx.samples)
        wants_weight = weight is not None and ctx.needs_input_grad[1]
        wants_bias = ctx.has_bias and ctx.needs_input_grad[2]
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if wants_weight else None
        dbias = torch.empty(x.shape[1], dtype=saved.dtype, device=x.device) if wants_bias else None
        scale = None if ctx.grad_scale is None else ctx.grad_scale.to(x.device)
        dx = passes.backward(plan, x, dy, flat(weight), Affine(dweight, dbias), saved, state, scale)
    return dx, dweight, dbias


def _refuse_other_devices(x: Tensor, *others: Tensor | None) -> None:
    """A kernel that read another GPU's memory would fail later, and everything after it."""
    for other in others:
        if other is not None and other.device != x.device:
            raise RuntimeError(
                f"the input is on {x.device}, and the layer has a tensor on {other.device}: move the layer with "
                f".to({str(x.device)!r})"
            )


def flat(parameter: Tensor | None) -> Tensor | None:
    """A gain or bias without gaps."""
    return None if parameter is None else parameter.resolve_neg().contiguous()


class _Gpu(Engine):
    name = "triton"
    by_name_only = device.INTERPRETED  # the interpreter is thousands of times slower than the engines after this one
    function = _Normalize

    def status(self) -> str:
        missing = device.missing()
        if missing is not None:
            return f"not available: {missing}; GPU tensors take the PyTorch engine"
        if device.INTERPRETED:
            return (
                "available: Triton's interpreter on CPU tensors (TRITON_INTERPRET=1); only used when forced, for tests"
            )
        return f"available: Triton on {torch.cuda.get_device_name()}"

    def takes(self, call: Call) -> bool:
        """Plain tensors on the device without a mask, with statistics of whole channels of the mini-batch."""
        x, state, formula = call.x, call.state, call.formula
        return (
            device.holds(x)
            and call.mask is None
            and x.dtype in _DTYPES
            and not x.is_neg()  # its memory holds the values with the other sign
            and type(x) in (Tensor, torch.nn.Parameter)
            and not is_compiling()
            and not torch._C._len_torch_dispatch_stack()
            and not device.is_watched()
            and torch._C._get_tracing_state() is None
            and channels_per_statistic(call.view) > 0
            and (state is None or fits(state))
            and (state is not None or formula.alpha == formula.beta == PRESENT_ONLY)
        )

    def normalize(self, call: Call) -> Tensor:
        y: Tensor = _Normalize.apply(*call)
        return y

    def commit(self, uses: Uses) -> Committed:
        fitting = [fits(state) for state, _ in uses]
        commit([use for use, fit in zip(uses, fitting) if fit])
        return Committed([use for use, fit in zip(uses, fitting) if not fit])


ENGINE = _Gpu()
