"""One operation, several engines, and the choice between them.

``normalize`` and ``commit`` run on the first engine of ``ENGINES`` that takes the input. The environment variable
``STREAMNORM_ENGINE`` (``native``, ``triton``, ``torch`` or ``plain``), read at import, or the context manager
:func:`force` leaves out the engines before the one that it names; ``torch`` and ``plain`` take every input. Under the
transforms of ``torch.func``, forward-mode differentiation and ``torch.jit.trace`` it is always ``plain``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_exporting

from ..core.spec import Formula, Sign, State, View
from . import eager, gpu, graph, native, operations, plain
from .checks import check_before_backward, check_call
from .derivatives import is_recorded, refuse

ENGINES: tuple[ModuleType, ...] = (native, gpu, eager, plain)
"""From the fastest to the reference. Where a graph is being made, ``operations`` run in their place."""


Plan = native.Plan
prepare = native.prepare
keep_memory = native.keep_memory


def attempt(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, plan: Plan | None, state: Any, grad_scale: Tensor | None
) -> Any:
    """The short way of a layer that is called again and again: as ``normalize``, or NotImplemented with nothing done.

    Args:
        x: input, of the shape that ``plan`` is for.
        weight: gain, or None.
        bias: or None.
        plan: what ``prepare`` made of a view and a formula.
        state: a State, or a module's dict of buffers that holds one.
        grad_scale: as in ``normalize``.
    """
    if plan is None or _active[0] is not native:
        return NotImplemented
    return native.attempt(x, weight, bias, (plan, state, grad_scale, None))


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
    """Normalize, apply gain and bias, advance the stream; ``plain.normalize`` explains the arguments."""
    if is_compiling():
        if is_exporting() and state is None:  # whoever trains the exported program differentiates its operations
            return plain.normalize(x, weight, bias, mask, view, formula, state, grad_scale, stats)
        return operations.normalize(x, weight, bias, mask, view, formula, state, grad_scale, stats)
    if is_recorded():  # what records does not take the engines' autograd functions
        if state is None:
            return plain.normalize(x, weight, bias, mask, view, formula, state, grad_scale, stats)
        refuse(x, weight, bias)
    check_call(x, weight, bias, view, state, stats)
    for engine in _active:
        if engine.supports(x, mask, view, formula, state):
            y: Tensor = engine.normalize(x, weight, bias, mask, view, formula, state, grad_scale, stats)
            if y is NotImplemented:
                continue
            if engine is plain and y.requires_grad:  # the others look for themselves
                y.grad_fn.register_prehook(partial(check_before_backward, x, weight, view, state))  # type: ignore[union-attr]
            return y
    raise AssertionError("the reference takes every input")


def function(x: Tensor, view: View, formula: Formula, state: State | None) -> Any:
    """The autograd function for callers that go back by hand: its ``forward`` and ``backward`` take any context."""
    if gpu in _active and gpu.supports(x, None, view, formula, state):
        return gpu._Normalize
    return operations.Normalize


def tells_signs(state: State) -> bool:
    """Whether ``commit`` of such a state looks for signs of training that runs away by itself."""
    return _active[0] is native and state.long.is_cpu


def commit(uses: Sequence[tuple[State, Formula]]) -> Sequence[Sign]:
    """Move the short-term averages of these streams into their long-term ones (docs/mathematics.md).

    A step that is taken on fake tensors changes no weight, and so commits no stream but fake ones.

    Returns:
        The signs of training that runs away, see :mod:`streamnorm.training.runaway`; none where there is nothing to
        say, and from engines that do not look for them.
    """
    if torch._C._len_torch_dispatch_stack() and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE):
        uses = [use for use in uses if type(use[0].long) is not Tensor]
    if _active[0] is native:
        if not (uses and uses[0][0].long.is_cuda):
            return native.commit(uses)
        gpu.commit(uses)
    else:
        _active[0].commit(uses)
    return ()


def engines() -> dict[str, str]:
    """What runs where, and why: one line for each engine, in the order of preference.

    Example:
        >>> "torch" in engines()
        True
    """
    eager_mode = {
        e.NAME: e.status() if e in _active or _active[0] is native else f"switched off: {_active[0].NAME} is forced"
        for e in ENGINES
    }
    return {**eager_mode, graph.NAME: graph.status()}


@contextmanager
def force(name: str) -> Iterator[None]:
    """Leave out the engines before the one of this name, for tests and for bug reports.

    Raises:
        ValueError: if no engine has this name.

    Example:
        >>> with force("plain"):
        ...     engines()["torch"]
        'switched off: plain is forced'
    """
    global _active
    before, _active = _active, _from(name)
    try:
        yield
    finally:
        _active = before


def _from(name: str) -> tuple[ModuleType, ...]:
    for i, engine in enumerate(ENGINES):
        if name == engine.NAME:
            # Triton's interpreter is thousands of times slower than the engines after it.
            return tuple(e for e in ENGINES[i:] if e is engine or not (e is gpu and gpu.INTERPRETED))
    names = ", ".join(engine.NAME for engine in ENGINES)
    raise ValueError(f"there is no engine {name!r}; STREAMNORM_ENGINE can be one of {names}")


_active = _from(os.environ.get("STREAMNORM_ENGINE") or native.NAME)
