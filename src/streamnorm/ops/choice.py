"""The table of engines, and the choice between them.

:func:`normalize` and :func:`commit` run on the first engine of ``ENGINES`` that takes the input. The environment
variable ``STREAMNORM_ENGINE`` (``native``, ``triton``, ``torch`` or ``plain``), read at import, or the context manager
:func:`force` leaves out the engines before the one that it names; ``torch`` and ``plain`` take every input. Under the
transforms of ``torch.func``, forward-mode differentiation and ``torch.jit.trace`` it is always ``plain``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_exporting

from ..core.spec import Call, Formula, Sign, State, View
from . import eager, gpu, graph, native, operations, plain
from .base import Engine, Plan, Uses
from .checks import check_call
from .derivatives import is_recorded, refuse

ENGINES: tuple[Engine, ...] = (native.ENGINE, gpu.ENGINE, eager.ENGINE, plain.ENGINE)
"""The engines, from the fastest to the reference. Where a graph is being made, ``operations`` run in their place."""


class _ShortWay:
    """The short way of the first engine: an attribute, since one more Python call would show in a small layer's step.

    Its arguments are x, gain, bias, and a tuple of the plan that ``prepare`` made, the state (or a module's dict of
    buffers that holds one), grad_scale, stats and mask. The output is that of ``normalize``, or NotImplemented with
    nothing done.
    """

    __slots__ = ("attempt",)

    attempt: Callable[[Tensor, Tensor | None, Tensor | None, tuple[Any, ...]], Any]


short_way = _ShortWay()
_active: tuple[Engine, ...]


def prepare(view: View, formula: Formula) -> Plan | None:
    """The plan that the short way takes, or None."""
    return _active[0].prepare(view, formula)


def normalize(call: Call) -> Tensor:
    """Normalize, apply gain and bias, advance the stream; ``plain.normalize`` explains the fields."""
    if is_compiling():
        if is_exporting() and call.state is None:  # whoever trains the exported program differentiates its operations
            return plain.normalize(*call)
        return operations.normalize(call)
    if is_recorded():  # what records does not take the engines' autograd functions
        if call.state is None:
            return plain.normalize(*call)
        refuse(call.x, call.weight, call.bias)
    check_call(call)
    for engine in _active:
        if engine.takes(call) and (y := engine.normalize(call)) is not NotImplemented:
            return y
    raise AssertionError("the reference takes every input")


def function(call: Call) -> Any:
    """The autograd function for callers that go back by hand: its ``forward`` and ``backward`` take any context."""
    return next(engine.function for engine in _active if engine.function is not None and engine.takes(call))


def tells_signs(state: State) -> bool:
    """Whether ``commit`` of such a state looks for signs of training that runs away by itself."""
    return _active[0].tells_signs(state)


def commit(uses: Uses) -> Sequence[Sign]:
    """Move the short-term averages of these streams into their long-term ones (docs/mathematics.md).

    A step that is taken on fake tensors changes no weight, and so commits no stream but fake ones.

    Returns:
        The signs of training that runs away, see :mod:`streamnorm.training.runaway`; none where there is nothing to
        say, and from engines that do not look for them.
    """
    if torch._C._len_torch_dispatch_stack() and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE):
        uses = [use for use in uses if type(use[0].long) is not Tensor]
    first, *others = _active
    rest, signs = first.commit(uses)  # others tell none
    while rest:
        rest, _ = others.pop(0).commit(rest)
    return signs


def is_active(name: str) -> bool:
    """Whether the engine of this name is not left out at present."""
    return any(engine.name == name for engine in _active)


def engines() -> dict[str, str]:
    """The status of each engine, in one line: available, or the reason why not; in the order of preference.

    Example:
        >>> "torch" in engines()
        True
    """
    first = _active[0]
    left_out = ENGINES[: ENGINES.index(first)]
    eager_mode = {e.name: f"switched off: {first.name} is forced" if e in left_out else e.status() for e in ENGINES}
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
    before = _active
    _activate(_from(name))
    try:
        yield
    finally:
        _activate(before)


def _activate(engines: tuple[Engine, ...]) -> None:
    global _active
    _active, short_way.attempt = engines, engines[0].attempt


def _from(name: str) -> tuple[Engine, ...]:
    for i, engine in enumerate(ENGINES):
        if name == engine.name:
            return tuple(e for e in ENGINES[i:] if e is engine or not e.by_name_only)
    names = ", ".join(engine.name for engine in ENGINES)
    raise ValueError(f"there is no engine {name!r}; STREAMNORM_ENGINE can be one of {names}")


_activate(_from(os.environ.get("STREAMNORM_ENGINE") or ENGINES[0].name))
