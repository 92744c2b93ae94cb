"""The interface of an engine: an object that normalizes, and that commits streams.

``ops/choice.py`` holds the table of engines. A new one is a file beside this one, and a row of that table; nobody else
asks which engine it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..core.spec import Call, Formula, Sign, State, View

Uses = Sequence[tuple[State, Formula]]
"""Streams to commit, each with its formula."""


class Committed(NamedTuple):
    """The result of a commit: the streams that the engine does not take, unchanged, and signs of all others."""

    rest: Uses
    signs: Sequence[Sign] = ()


class Plan(NamedTuple):
    """The plan of an engine for inputs of one shape: a handle of its own, and the view and formula behind it."""

    handle: Any
    view: View
    formula: Formula


class Engine(Protocol):
    """An engine. A subclass inherits what has a default here: it may do without."""

    name: str

    by_name_only: bool = False
    """Whether it runs only where :func:`streamnorm.ops.force` names it."""

    function: Any = None
    """The autograd function, if its ``forward`` and ``backward`` take any context: for callers that go back by hand."""

    def status(self) -> str:
        """One line for ``streamnorm.engines()``: available, or why not."""
        ...

    def takes(self, call: Call) -> bool:
        """Whether to try :meth:`normalize`; it changes nothing."""
        ...

    def normalize(self, call: Call) -> Tensor:
        """The output, as ``plain.normalize`` explains; or NotImplemented, with nothing changed."""
        ...

    def commit(self, uses: Uses) -> Committed:
        """Move short-term averages into the long-term ones, as ``plain.commit`` does, of the streams that it takes."""
        ...

    def prepare(self, view: View, formula: Formula) -> Plan | None:
        """The plan that :meth:`attempt` takes; None where an engine has no such short way."""
        return None

    def attempt(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, use: tuple[Any, ...]) -> Any:
        """As :meth:`normalize`, on a short way for a layer that is called again and again; see ``native.attempt``."""
        return NotImplemented

    def tells_signs(self, state: State) -> bool:
        """Whether :meth:`commit` of such a stream looks for signs of training that runs away."""
        return False
