"""One operation, several engines, and the choice between them.

``normalize`` and ``commit`` run on the first engine of ``ENGINES`` that takes the input. The environment variable
``STREAMNORM_ENGINE`` (``native``, ``torch`` or ``plain``), read at import, or the context manager :func:`force` names
one engine for all calls.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from torch import Tensor

from . import eager, plain
from .spec import Formula, State, View

ENGINES: tuple[ModuleType, ...] = (eager, plain)
"""From the fastest to the reference."""

_forced: ModuleType | None = None


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
    engine = _forced or next(e for e in ENGINES if e.supports(x, mask, view, formula, state))
    y: Tensor = engine.normalize(x, weight, bias, mask, view, formula, state, grad_scale, stats)
    return y


def commit(uses: Sequence[tuple[State, Formula]]) -> None:
    """Move the short-term averages of these streams into their long-term ones (design, section 2.4)."""
    engine = _forced or ENGINES[0]
    engine.commit(uses)


def engines() -> dict[str, str]:
    """What runs where, and why: one line for each engine, in the order of preference.

    Example:
        >>> "torch" in engines()
        True
    """
    lines = {engine.NAME: engine.status() for engine in ENGINES}
    if _forced is not None:
        lines = {
            name: line if name == _forced.NAME else "switched off: another engine is forced"
            for name, line in lines.items()
        }
    return lines


@contextmanager
def force(name: str) -> Iterator[None]:
    """Run every call on one engine, for tests and for bug reports.

    Raises:
        ValueError: if no engine has this name.

    Example:
        >>> with force("plain"):
        ...     engines()["plain"]
        'available: the reference, autograd over the formulas; only used when forced'
    """
    global _forced
    before, _forced = _forced, _named(name)
    try:
        yield
    finally:
        _forced = before


def _named(name: str) -> ModuleType:
    for engine in ENGINES:
        if name == engine.NAME:
            return engine
    names = ", ".join(engine.NAME for engine in ENGINES)
    raise ValueError(f"there is no engine {name!r}; STREAMNORM_ENGINE can be one of {names}")


if os.environ.get("STREAMNORM_ENGINE"):
    _forced = _named(os.environ["STREAMNORM_ENGINE"])
