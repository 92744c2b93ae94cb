"""The table of engines that run a layer over a sequence, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ... import ops
from ...layers import Norm
from ...ops.derivatives import is_recorded
from ...training import checkpoint
from ..checks import check_before_backward, check_forward
from ..steps import Hidden, Norms, Weights
from . import by_hand, cpu, gpu, loop, sequence


class Engine(NamedTuple):
    """An engine that takes a whole sequence; what ``takes`` and ``run`` are given, ``loop.run`` explains."""

    name: str
    """That of the engine of ``streamnorm.ops`` which goes with it: :func:`streamnorm.ops.force` leaves out both."""

    takes: Callable[..., bool]
    run: Callable[..., tuple[Tensor, Hidden]]
    checks: bool = False
    """Whether ``takes`` looks whether the tensors fit each other."""


ENGINES = (
    Engine("native", cpu.supports, cpu.run, checks=True),
    Engine("triton", gpu.supports, gpu.run),
    Engine("torch", lambda kind, *rest: sequence.supports(*rest), by_hand.run),
)
"""The engines, from the fastest. After them comes the loop over the steps of the cells, which takes everything."""


def run(
    kind: str, data: Tensor, sizes: list[int], hidden: Hidden, weights: Weights, norms: Norms
) -> tuple[Tensor, Hidden]:
    """Run one layer in one direction; ``loop.run`` explains the arguments."""
    use = kind, data, sizes, hidden, weights, norms
    if is_recorded():
        return loop.run(*use)
    engine = next((each for each in ENGINES if ops.is_active(each.name) and each.takes(*use)), None)
    if engine is None or not engine.checks:
        check_forward(*use)
    if engine is None:  # step by step: the norms' own forward does the rest
        output, finals = loop.run(*use)
        of_norms = (t for norm in norms if norm is not None for t in (*norm.parameters(), *norm.buffers()))
        check_before_backward((output, *finals), (data, *hidden, *weights, *of_norms))
        return output, finals
    if checkpoint.concerns():
        with checkpoint.use(norm for norm in norms if isinstance(norm, Norm)):
            return engine.run(*use)
    return engine.run(*use)
