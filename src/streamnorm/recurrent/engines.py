"""Which engine runs a layer over a sequence."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from . import fused, loop
from .steps import Hidden, Norms, Weights


def run(
    kind: str, data: Tensor, sizes: list[int], hidden: Hidden, weights: Weights, norms: Norms
) -> tuple[Tensor, Hidden]:
    """Run one layer in one direction; :func:`streamnorm.recurrent.loop.run` explains the arguments.

    Where an engine of ``streamnorm.ops`` is forced, ``plain`` means the loop over the steps here.
    """
    forced = None if ops._forced is None else ops._forced.NAME
    if forced != "plain" and fused.supports(data, sizes, hidden, weights, norms):
        return fused.run(kind, data, sizes, hidden, weights, norms)
    return loop.run(kind, data, sizes, hidden, weights, norms)
