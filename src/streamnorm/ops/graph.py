"""What ``torch.compile`` must be told of a training step: that the statistics of a use are computed once.

A compiler takes the graph of a training step apart: it decides by itself what the backward part computes a second time,
and by then the streams have moved on. So the statistics of a use go through an operator of our own, :func:`hold`, which
no compiler computes twice; behind it nothing asks for the state as it was. The streams of gradients are read and moved
where their gradients arrive, in the backward part.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..core.spec import State

NAME = "traced"


def status() -> str:
    """What runs in graphs, for ``streamnorm.engines()``."""
    return "available: PyTorch operations without a graph break, under torch.compile and torch.export"


class Surroundings(Protocol):
    """What happens around a use in training while a graph runs, which is not written into the graph."""

    def earlier(self, values: Tensor) -> Tensor | None:
        """What was held by the use that this one repeats, in a recomputation; None for a first use."""

    def notice(self) -> None:
        """A first use is about to change the stream of a layer, which the graph does not know."""


_surroundings: Surroundings | None = None


def set_surroundings(surroundings: Surroundings) -> None:
    """Say, once, what happens around uses in graphs."""
    global _surroundings
    if _surroundings is not None:
        raise RuntimeError("the surroundings of uses in graphs are set already")
    _surroundings = surroundings


_library = torch.library.Library("streamnorm", "FRAGMENT")
_library.define("hold(Tensor values) -> Tensor")


@torch.library.impl(_library, "hold", "CompositeExplicitAutograd")
def _hold(values: Tensor) -> Tensor:
    """A copy. The last row is of ones, and comes back as zeros, beside the values of before, from a repetition."""
    if _surroundings is None:
        return values.clone()
    earlier = _surroundings.earlier(values)
    if earlier is None:
        _surroundings.notice()
        return values.clone()
    held = earlier.clone()
    held[-1] = 0
    return held


@torch.library.impl(_library, "hold", "Meta")
def _hold_while_tracing(values: Tensor) -> Tensor:
    return torch.empty_like(values)


def hold(values: Tensor) -> tuple[Tensor, Tensor]:
    """The rows, as no compiler computes them a second time; and for each index whether this is a use of its own."""
    held = torch.ops.streamnorm.hold(torch.cat((values, torch.ones_like(values[:1]))))
    return held[:-1], held[-1] != 0


def take_part(state: State) -> None:
    """A use without data: it collects nothing, and is noticed like any other."""
    _, counts = hold(state.samples.view(1, 1))
    state.samples.add_(0 * counts[0])
