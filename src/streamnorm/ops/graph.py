"""Operators that tell ``torch.compile`` to compute the statistics of a use once in a training step.

A compiler takes the graph of a training step apart: it decides by itself what the backward part computes a second time,
and by then the streams have moved on. So the statistics of a use go through an operator of our own, :func:`hold`, which
no compiler computes twice; behind it nothing asks for the state as it was. The streams of gradients are read and moved
where their gradients arrive, in the backward part, which may run more than once: :func:`is_another_pass` asks.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..core.spec import State

NAME = "traced"


def status() -> str:
    """The status of the operations in graphs, for ``streamnorm.engines()``."""
    return "available: PyTorch operations without a graph break, under torch.compile and torch.export"


Held = tuple[Tensor, Tensor]
"""The statistics of one use, and whether a gradient has arrived at it, which the backward part changes."""


class Surroundings(Protocol):
    """The actions around a use in training while a graph runs, which are not written into the graph."""

    def earlier(self, held: Held) -> Held | None:
        """The pair held by the use that this one repeats, in a recomputation; None for a first use."""

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
_library.define("hold(Tensor values) -> (Tensor, Tensor)")
_library.define("is_another_pass(Tensor passed, Tensor gradient) -> Tensor")


@torch.library.impl(_library, "hold", "CompositeExplicitAutograd")
def _hold(values: Tensor) -> Held:
    """A copy. The last row is of ones, and comes back as zeros, beside the values of before, from a repetition."""
    passed = torch.zeros((), dtype=torch.bool, device=values.device)
    if _surroundings is None:
        return values.clone(), passed
    earlier = _surroundings.earlier((values, passed))
    if earlier is None:
        _surroundings.notice()
        return values.clone(), passed
    held = earlier[0].clone()
    held[-1] = 0
    return held, earlier[1]


@torch.library.impl(_library, "hold", "Meta")
def _hold_while_tracing(values: Tensor) -> Held:
    return torch.empty_like(values), values.new_empty((), dtype=torch.bool)


@torch.library.impl(_library, "is_another_pass", "CompositeExplicitAutograd")
def _is_another_pass(passed: Tensor, gradient: Tensor) -> Tensor:
    before = passed.clone()
    passed.data.fill_(True)  # of .data: what autograd saved may not have changed, by its version
    return before


@torch.library.impl(_library, "is_another_pass", "Meta")
def _is_another_pass_while_tracing(passed: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(passed)


def hold(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows, as no compiler computes them a second time.

    Returns:
        The rows; for each index whether this is a use of its own; and what :func:`is_another_pass` asks.
    """
    held, passed = torch.ops.streamnorm.hold(torch.cat((values, torch.ones_like(values[:1]))))
    return held[:-1], held[-1] != 0, passed


def is_another_pass(passed: Tensor, gradient: Tensor) -> Tensor:
    """Whether a gradient arrived before at the use that ``passed`` is of; from now on, one has.

    Args:
        passed: of :func:`hold`.
        gradient: anything that depends on the gradient, so that this is a part of the backward pass.
    """
    again: Tensor = torch.ops.streamnorm.is_another_pass(passed, gradient)
    return again


def take_part(state: State) -> None:
    """A use without data: it collects nothing, and is noticed like any other."""
    _, counts, _ = hold(state.samples.view(1, 1))
    state.samples.add_(0 * counts[0])
