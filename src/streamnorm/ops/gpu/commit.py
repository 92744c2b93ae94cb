"""Weight updates of many streams in one kernel."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...core.spec import Formula, State
from ..base import Uses
from . import device
from .cut import power_of_two


def commit(uses: Uses) -> None:
    """As ``plain.commit``, in one kernel for all layers on a device, whatever their number."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[State, Formula]]] = {}
    for use in uses:
        groups.setdefault((use[0].long.device, use[0].long.dtype), []).append(use)
    for (place, dtype), group in groups.items():
        rows = tuple(map(_row, group))
        pointers, rates, largest = _table(rows, place)
        most = power_of_two(largest)
        constants = {"G_MAX": most, "BLOCK": min(1024, most), "DOUBLE": dtype == torch.float64}
        with device.current(pointers):
            if device.is_capturing():
                _captured[rows] = pointers, rates
            device.launch("commit_streams", (len(pointers),), 4, (pointers, rates), constants)


_Row = tuple[tuple[int, ...], tuple[float, ...]]


def _row(use: tuple[State, Formula]) -> _Row:
    """The addresses of the state of a stream, and its rates; twice six and twice three numbers."""
    state, formula = use
    keep, take, keep_grad, take_grad = formula.kappa or (0.0, 0.0, 0.0, 0.0)
    size, window, grad_window = state.long.shape[1], formula.window or 0.0, formula.grad_window or 0.0
    there = [t.data_ptr() for t in (state.long, state.short, state.count, state.samples, state.seen)]
    back = [t.data_ptr() for t in (state.long_grad, state.short_grad, state.grad_count, state.grad_samples)]
    return (*there, size, *back, 0, size), (keep, take, window, keep_grad, take_grad, grad_window)


@lru_cache(maxsize=256)
def _table(rows: tuple[_Row, ...], place: torch.device) -> tuple[Tensor, Tensor, int]:
    """The rows on the device, and the largest G. Copying them there waits for the device: it happens once.

    Raises:
        RuntimeError: within the capture of a CUDA graph, which cannot hold the copy.
    """
    if device.is_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and these layers have not committed together before: run a few whole "
            "training steps first, the optimizer's step included"
        )
    pointers = torch.tensor([row[0] for row in rows], dtype=torch.int64, device=place).view(-1, 6)
    rates = torch.tensor([row[1] for row in rows], dtype=torch.float64, device=place).view(-1, 3)
    return pointers, rates, max(row[0][5] for row in rows)


_captured: dict[tuple[_Row, ...], tuple[Tensor, Tensor]] = {}
"""Tables that CUDA graphs read. A graph does not keep what was there before it, nor does the bounded cache."""
