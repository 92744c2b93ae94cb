"""The PyTorch engine: tensor operations, for every device and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.half import Scalar
from ..core.spec import PRIOR_SAMPLES, Call, Formula, State
from . import operations
from .base import Committed, Engine, Uses


def commit(uses: Uses) -> None:
    """As ``plain.commit``, for all layers at once: the number of kernel launches does not grow with the layers."""
    for fixed in (True, False):
        group = [(state, formula) for state, formula in uses if (formula.kappa is not None) == fixed]
        if not group:
            continue
        states = [state for state, _ in group]
        forward, backward = zip(*(_rates(state, formula) for state, formula in group))
        _commit([s.long for s in states], [s.short for s in states], [s.count for s in states], forward)
        _commit([s.long_grad for s in states], [s.short_grad for s in states], [s.grad_count for s in states], backward)
        torch._foreach_add_([s.seen for s in states], [s.samples for s in states])
        torch._foreach_zero_([s.samples for s in states] + [s.grad_samples for s in states])


def _commit(longs: list[Tensor], shorts: list[Tensor], counts: list[Tensor], rates: Sequence[tuple[Any, Any]]) -> None:
    """long ← (1 + (κ1 − 1)·[count > 0])·long + κ2·short; the short of an index without a count is zero."""
    keep_less_one, take = ([rate[i] for rate in rates] for i in (0, 1))
    factors = [count.clamp(max=1).to(long.dtype) for count, long in zip(counts, longs)]
    torch._foreach_mul_(factors, keep_less_one)
    torch._foreach_add_(factors, 1.0)
    torch._foreach_mul_(longs, factors)
    torch._foreach_mul_(shorts, take)
    torch._foreach_add_(longs, shorts)
    torch._foreach_zero_(shorts)
    torch._foreach_zero_(counts)


def _rates(state: State, formula: Formula) -> tuple[tuple[Scalar, Scalar], tuple[Scalar, Scalar]]:
    """(κ1 − 1, κ2) and (κ3 − 1, κ4)."""
    if formula.kappa is not None:
        keep, take, keep_grad, take_grad = formula.kappa
        return (keep - 1, take), (keep_grad - 1, take_grad)
    assert formula.window is not None
    assert formula.grad_window is not None
    dtype = state.long.dtype
    lasting = (state.seen + PRIOR_SAMPLES).to(dtype).clamp(max=formula.window)
    samples, grad_samples = state.samples.to(dtype), state.grad_samples.to(dtype)
    share, grad_share = samples / (lasting + samples), grad_samples / (formula.grad_window + grad_samples)
    return (-share, share), (-grad_share, grad_share)


class _Eager(Engine):
    name = "torch"
    function = operations.Normalize

    def status(self) -> str:
        return "available: PyTorch operations, on every device"

    def takes(self, call: Call) -> bool:
        return True

    def normalize(self, call: Call) -> Tensor:
        return operations.normalize(call)

    def commit(self, uses: Uses) -> Committed:
        commit(uses)
        return Committed(())


ENGINE = _Eager()
