"""The C++ engine: training steps on plain CPU tensors, in one call each way.

``csrc/norm`` does the work, advances the stream, and refuses whatever it does not take before it has changed
anything; then the PyTorch engine runs. This module holds what must be Python: the autograd function.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..core.spec import GRADIENTS, PRESENT_ONLY, Call, Formula, Sign, State, View, wide
from . import operations, plain
from .another_pass import AnotherPass
from .base import Committed, Engine, Plan, Uses
from .derivatives import Again, any_order


def _copy_like(x: Tensor, dy: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(dy)


try:  # what Inductor's code allocates with: half the time of torch.empty_like
    from torch._C._dynamo.guards import _empty_strided_cpu as _empty_strided  # type: ignore[attr-defined]
except ImportError:

    def _empty_strided(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype)


LIBRARY = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
"""PyTorch's own, through which the extensions find its OpenMP runtime."""


def _mebibytes_to_keep() -> int:
    wanted = os.environ.get("STREAMNORM_KEEP_MIB") or "256"
    if not wanted.isdecimal():
        raise ValueError(
            f"STREAMNORM_KEEP_MIB is a number of mebibytes, such as 256, or 0 to keep nothing, got {wanted!r}"
        )
    return int(wanted)


def _load() -> tuple[Any, str]:
    """The extension, or None, and a line about it."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None:
        return None, f"not available: PyTorch {torch.__version__} has no DLPack exchange table, later ones do"
    try:
        import streamnorm.ops._native as extension
    except ImportError as error:
        return None, f"not available: it was not built ({error}); install streamnorm where there is a C++ compiler"
    objects = {
        "exchange": exchange,
        "Tensor": Tensor,
        "Parameter": torch.nn.Parameter,
        "dtypes": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        "empty_strided": _empty_strided,
        "copy_like": _copy_like,
        "is_neg": Tensor.is_neg,
        "untyped_storage": Tensor.untyped_storage,
        "storage_offset": Tensor.storage_offset,
        "get_num_threads": torch.get_num_threads,
        "is_grad_enabled": torch.is_grad_enabled,
        "tracing_state": torch._C._get_tracing_state,
        "dispatch_modes": torch._C._len_torch_dispatch_stack,
        "function_modes": torch._C._len_torch_function_stack,
        "forward_ad": vars(forward_ad),
        "state_fields": State._fields,
        "formula_fields": Formula._fields,
    }
    isa = os.environ.get("STREAMNORM_ISA") or None
    try:
        isa, threads = extension.setup(objects, LIBRARY, isa)
    except TypeError as error:  # left from before the sources changed, in a checkout
        return None, f"not available: it was built from other sources ({error}); install streamnorm again"
    except ImportError as error:
        return None, f"not available: {error}"
    most = _mebibytes_to_keep()
    extension.keep_memory(min(most << 20, sys.maxsize))
    where = "the threads of PyTorch" if threads else "one thread"
    return extension, f"available: C++ for {isa}, on {where}; keeps up to {most} MiB of freed outputs"


_native, _status = _load()
extension = _native


def keep_memory(most: int) -> int:
    """Let at most so many bytes of freed outputs wait for the next ones; the setting before."""
    before: int = 0 if _native is None else _native.keep_memory(most)
    return before


def waiting_memory() -> int:
    """The number of bytes of freed outputs that wait for the next ones."""
    waiting: int = 0 if _native is None else _native.waiting_memory()
    return waiting


_MOST_AXES = 16
_AFTER_A_COPY = 2
"""The answer of the extension's ``accepts`` for an input that it takes in another layout."""

_plans: dict[tuple[int, int], Plan] = {}


def plan(view: View, formula: Formula) -> Plan:
    """The plan for a view and a formula, which are looked up by identity: pass the same objects again."""
    key = (id(view), id(formula))
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= 4096:
            _plans.clear()
        shape = (view.split, view.kept, view.axes)
        windows = (formula.window or 0.0, formula.grad_window or 0.0)
        constants = (formula.p, formula.centered, formula.k, formula.eps, *windows, formula.own, formula.floor)
        mixes = (formula.alpha or PRESENT_ONLY, formula.beta or PRESENT_ONLY)
        found = _plans[key] = Plan(_native.plan(*shape, *constants, *mixes), view, formula)
    return found


def attempt(x: Tensor, weight: Tensor | None, bias: Tensor | None, use: tuple[Plan, Any, Any, Any, Any]) -> Any:
    """Normalize as ``normalize`` does, or return NotImplemented with nothing changed.

    This is the short way: all checks are made in C++, on the way to the result.

    Args:
        x: of the shape that the plan is for, else it is refused.
        weight: gain, or None.
        bias: or None.
        use: the plan, the state (or the module's dict of buffers that holds it, or None), grad_scale, stats and mask.
            It may be kept from call to call.
    """
    try:
        return _apply(x, weight, bias, use)
    except _native.Unsupported:
        return NotImplemented
    except RuntimeError:
        if torch._C._are_functorch_transforms_active():  # it refuses the function before C++ can
            return NotImplemented
        raise


def _again(ctx: Any) -> Again:
    """The inputs of a use, and a function that computes its output again, or None where a stream advances."""
    (_, view, formula), _, _, weight, bias, *half = ctx.kept
    x, mask = _inputs(ctx.saved_tensors)
    if half:
        return (x, weight, bias), None
    if weight is not None and not _saved_values(ctx)[3 * view.num_stats :][: len(weight)].equal(
        weight.to(wide(x.dtype))
    ):
        raise RuntimeError(
            "the gain of a streamnorm layer was changed between its forward and a backward pass that asks for second "
            "derivatives or a batch of gradients, such as by an optimizer step: compute these before the update"
        )
    return (x, weight, bias), lambda x, weight, bias: (plain.normalize(x, weight, bias, mask, view, formula),)


class _Normalize(torch.autograd.Function):
    forward = _native and _native.forward

    @staticmethod
    @any_order(_again)
    def backward(ctx: Any, dy: Tensor) -> Any:
        if len(ctx.kept) > _KEPT_HALF and ctx.kept[1][-1] and ctx.needs_input_grad[0]:  # C++ marks the last byte
            return _another_pass(ctx, dy)
        return _backward(ctx, dy)


def _backward(ctx: Any, dy: Tensor) -> Any:
    try:
        return _native.backward(ctx, dy)
    except _native.Unsupported:
        return _backward_in_pytorch(ctx, dy)


def _another_pass(ctx: Any, dy: Tensor) -> Any:
    """Another pass through a graph that was kept, after one whose gradients have reached the stream."""
    saved_tensors, state = ctx.saved_tensors, _gradient_state(ctx.kept)
    assert state is not None
    here = operations.Here.of(*_inputs(saved_tensors), ctx.kept[0].view)
    another = AnotherPass(state, here.n, here.samples)
    scratch = another.scratch
    half = tuple(getattr(scratch, name) for name in GRADIENTS)
    stand_in = SimpleNamespace(
        kept=(*ctx.kept[:_KEPT_HALF], *half), saved_tensors=saved_tensors, needs_input_grad=ctx.needs_input_grad
    )
    gradients = _backward(stand_in, dy)
    another.finish()
    return gradients


_KEPT_HALF = 5
"""The index at which the gradient half of the state begins in what is kept for a backward pass."""


def _gradient_state(kept: tuple[Any, ...]) -> State | None:
    """A state that has the gradient half alone, or None where there is no stream."""
    if len(kept) == _KEPT_HALF:
        return None
    half: Any = dict(zip(GRADIENTS, kept[_KEPT_HALF:]))
    return State._make(half.get(name) for name in State._fields)


def _inputs(saved_tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The input and the mask, of what C++ saves."""
    x, *mask = saved_tensors
    return x, mask[0] if mask else None


def _saved_values(ctx: Any) -> Tensor:
    """mu, 1/s and slope of all statistics, as ``csrc/norm/call.h`` says, and then the gain."""
    (_, view, _), saved = ctx.kept[:2]
    double = len(saved) == 8 * (3 * view.num_stats + view.num_channels) + 64  # x may have become another type
    return torch.frombuffer(bytearray(saved), dtype=torch.float64 if double else torch.float32)


def _backward_in_pytorch(ctx: Any, dy: Tensor) -> Any:
    """For an output gradient that is no plain tensor."""
    (_, view, formula), _, grad_scale, weight, bias, *_ = ctx.kept
    (x, mask), values = _inputs(ctx.saved_tensors), _saved_values(ctx)
    here = operations.Here.of(x, mask, view)
    statistics = values[: 3 * view.num_stats].view(3, -1)
    if formula.grad_window is not None and len(ctx.kept) > _KEPT_HALF:  # the slope is in units of 1/s^p
        statistics[2] *= statistics[1] ** formula.p
    if weight is not None:
        weight = values[3 * view.num_stats :][: len(weight)].to(weight.dtype)
    stand_in = SimpleNamespace(
        saved_tensors=(x, weight, mask, statistics),
        needs_input_grad=ctx.needs_input_grad,
        view=view,
        formula=formula,
        state=_gradient_state(ctx.kept),
        grad_scale=grad_scale,
        over=None,
        n=here.n,
        samples=here.samples,
        has_bias=bias is not None,
    )
    return *operations.gradients(stand_in, dy), None


if _native is not None:
    # Autograd calls the method `apply` of a node, which would look up and call `backward`: this one is in C++.
    _native.attach(_Normalize._backward_cls, _Normalize.backward)
# What Function.apply does before it calls this is of use to functorch, whose tensors have no memory and are refused.
_apply = super(torch.autograd.Function, _Normalize).apply


class _Native(Engine):
    name = "native"
    attempt = staticmethod(attempt)  # called in every step: without self

    def status(self) -> str:
        return _status

    def takes(self, call: Call) -> bool:
        """More is seen on the way."""
        return _native is not None and len(call.view.split) <= _MOST_AXES

    def normalize(self, call: Call) -> Any:
        use = plan(call.view, call.formula), call.state, call.grad_scale, call.stats, call.mask
        y = attempt(call.x, call.weight, call.bias, use)
        if y is NotImplemented and _native.accepts(use[0], call.x) == _AFTER_A_COPY:
            return attempt(call.x.contiguous(), call.weight, call.bias, use)
        return y

    def prepare(self, view: View, formula: Formula) -> Plan | None:
        return plan(view, formula) if _native is not None and len(view.split) <= _MOST_AXES else None

    def commit(self, uses: Uses) -> Committed:
        """In one call for all layers."""
        if _native is None or (uses and uses[0][0].long.is_cuda):
            return Committed(uses)
        rest, signs = _native.commit(list(uses))
        return Committed(rest, [Sign(*sign) for sign in signs])

    def tells_signs(self, state: State) -> bool:
        return _native is not None and state.long.is_cpu


ENGINE = _Native()
