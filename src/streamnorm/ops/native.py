"""The C++ engine: training steps on plain CPU tensors, in one call each way.

This module decides what goes there and makes the tensors; ``native.cpp`` does the rest and advances the stream.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import eager
from .first_order import first_order_only
from .spec import PRESENT_ONLY, Formula, State, View

NAME = "native"

_native: Any = None
_status = ""


def _load() -> tuple[Any, str]:
    """The extension and a line about it, or None and why it is not there."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None:
        return None, f"not available: PyTorch {torch.__version__} has no __dlpack_c_exchange_api__"
    try:
        from . import _native as extension
    except ImportError as error:
        return None, f"not available: not built ({error}); install with a C++ compiler"
    library = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    wanted = os.environ.get("STREAMNORM_ISA") or None
    try:
        isa, threads = extension.setup(Tensor, torch.nn.Parameter, exchange, torch.get_num_threads, library, wanted)
    except ImportError as error:
        return None, f"not available: {error}"
    return (
        extension,
        f"available: C++ on the CPU, {isa}, {'PyTorch threads' if threads else 'one thread: no OpenMP runtime found'}",
    )


_native, _status = _load()


def status() -> str:
    """What this engine is, for ``streamnorm.engines()``."""
    return _status


def supports(x: Tensor, mask: Tensor | None, view: View, formula: Formula, state: State | None) -> bool:
    """Plain CPU tensors without a mask, outside of everything that must see PyTorch operations."""
    return (
        _native is not None
        and mask is None
        and (type(x) is Tensor or type(x) is torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and x.is_floating_point()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and (_native.accepts(_plan(view, formula), x) or _native.accepts(_plan(view, formula), x.detach().contiguous()))
    )


_plans: dict[tuple[int, int], tuple[Any, View, Formula]] = {}


def _plan(view: View, formula: Formula) -> Any:
    key = (id(view), id(formula))
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= 4096:
            _plans.clear()
        plan = _native.plan(
            view.split,
            view.kept,
            view.axes,
            formula.p,
            formula.centered,
            formula.k,
            formula.eps,
            formula.window or 0.0,
            formula.alpha or PRESENT_ONLY,
            formula.beta or PRESENT_ONLY,
        )
        found = _plans[key] = (plan, view, formula)
    return found[0]


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    view: View,
    formula: Formula,
    state: State | None = None,
    grad_scale: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    """As ``plain.normalize``."""
    plan = _plan(view, formula)
    if not _native.accepts(plan, x):
        x = x.contiguous()
    y: Tensor = _Normalize.apply(x, weight, bias, plan, state, grad_scale, stats)
    return y


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        plan: Any,
        state: State | None,
        grad_scale: Tensor | None,
        stats: Tensor | None,
    ) -> Tensor:
        y = torch.empty_like(x)
        ctx.saved = _native.forward(plan, x, weight, bias, y, state, stats)
        ctx.save_for_backward(x, weight, bias)
        ctx.plan, ctx.state, ctx.grad_scale = plan, state, grad_scale
        return y

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = torch.empty_like(x) if needs_x else None
        dw = torch.empty_like(weight) if needs_weight else None
        db = torch.empty_like(bias) if needs_bias else None
        if dy.stride() != x.stride():
            dy = torch.empty_like(x).copy_(dy)
        _native.backward(ctx.plan, ctx.saved, dy, x, weight, dx, dw, db, ctx.state, ctx.grad_scale)
        return dx, dw, db, None, None, None, None


def commit(uses: Sequence[tuple[State, Formula]]) -> None:
    """As ``plain.commit``."""
    rest = [(state, formula) for state, formula in uses if not _native.commit(state, formula.kappa, formula.window)]
    if rest:
        eager.commit(rest)
