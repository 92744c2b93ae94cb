"""Which engine runs a layer over a sequence."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ... import ops
from ...layers import Norm
from ...ops.derivatives import is_recorded
from ...training import checkpoint
from ..checks import check_before_backward, check_forward
from ..steps import Hidden, Norms, Weights
from . import by_hand, cpu, gpu, loop, sequence


def run(
    kind: str, data: Tensor, sizes: list[int], hidden: Hidden, weights: Weights, norms: Norms
) -> tuple[Tensor, Hidden]:
    """Run one layer in one direction; ``loop.run`` explains the arguments.

    Where an engine of ``streamnorm.ops`` is forced, ``plain`` means the loop over the steps here.
    """
    if is_recorded():
        return loop.run(kind, data, sizes, hidden, weights, norms)
    engine = _choose(kind, data, sizes, hidden, weights, norms)
    if engine is loop.run:  # step by step: the norms' own forward does the rest
        output, finals = loop.run(kind, data, sizes, hidden, weights, norms)
        of_norms = (t for norm in norms if norm is not None for t in (*norm.parameters(), *norm.buffers()))
        check_before_backward((output, *finals), (data, *hidden, *weights, *of_norms))
        return output, finals
    if checkpoint.concerns():
        with checkpoint.use(norm for norm in norms if isinstance(norm, Norm)):
            return engine(kind, data, sizes, hidden, weights, norms)
    return engine(kind, data, sizes, hidden, weights, norms)


def _choose(
    kind: str, data: Tensor, sizes: list[int], hidden: Hidden, weights: Weights, norms: Norms
) -> Callable[..., tuple[Tensor, Hidden]]:
    """The fastest engine that takes this, once the tensors fit each other."""
    first = ops._active[0]
    if first is ops.native and cpu.supports(kind, data, sizes, hidden, weights, norms):
        return cpu.run  # which looked at them itself
    check_forward(kind, data, sizes, hidden, weights, norms)
    if ops.gpu in ops._active and gpu.supports(kind, data, sizes, hidden, weights, norms):
        return gpu.run
    if first is not ops.plain and sequence.supports(data, sizes, hidden, weights, norms):
        return by_hand.run
    return loop.run
