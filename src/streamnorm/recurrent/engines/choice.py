"""Which engine runs a layer over a sequence."""

from __future__ import annotations

from torch import Tensor

from ... import ops
from ...layers.norm import Norm
from ...ops.derivatives import is_recorded
from ...training import checkpoint
from ..steps import Hidden, Norms, Weights
from . import by_hand, cpu, gpu, loop, sequence


def run(
    kind: str, data: Tensor, sizes: list[int], hidden: Hidden, weights: Weights, norms: Norms
) -> tuple[Tensor, Hidden]:
    """Run one layer in one direction; ``loop.run`` explains the arguments.

    Where an engine of ``streamnorm.ops`` is forced, ``plain`` means the loop over the steps here.
    """
    first = ops._active[0]
    if is_recorded():
        return loop.run(kind, data, sizes, hidden, weights, norms)
    if first is ops.native and cpu.supports(kind, data, sizes, hidden, weights, norms):
        engine = cpu.run
    elif ops.gpu in ops._active and gpu.supports(kind, data, sizes, hidden, weights, norms):
        engine = gpu.run
    elif first is not ops.plain and sequence.supports(data, sizes, hidden, weights, norms):
        engine = by_hand.run
    else:  # step by step: the norms' own forward does the rest
        return loop.run(kind, data, sizes, hidden, weights, norms)
    if checkpoint.concerns():
        with checkpoint.use(norm for norm in norms if isinstance(norm, Norm)):
            return engine(kind, data, sizes, hidden, weights, norms)
    return engine(kind, data, sizes, hidden, weights, norms)
