"""Which engine runs a layer over a sequence."""

from __future__ import annotations

from torch import Tensor

from . import loop
from .steps import Hidden, Norms, Weights


def run(
    kind: str, data: Tensor, sizes: list[int], hidden: Hidden, weights: Weights, norms: Norms
) -> tuple[Tensor, Hidden]:
    """Run one layer in one direction; :func:`streamnorm.recurrent.loop.run` explains the arguments."""
    return loop.run(kind, data, sizes, hidden, weights, norms)
