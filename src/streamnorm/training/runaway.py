"""Training that runs away: one warning for each layer, as soon as its statistics show it.

A learning rate that is too high ends in statistics of 1e28 and then NaN within a few weight updates, or in statistics
that never catch up with the values, by which evaluation then goes. Three signs of it are checked when layers commit
(docs/monitoring.md explains them):

- The long-term scale *leaps*: one weight update makes it more than ten times as large, and ten times as large as the
  last leap did. After a jump of the data, however large, a long-term average at most doubles from one update to the
  next (its growth is 1 + κ1 for data that stay as they are), so that a few leaps are growth that feeds itself.
- Between two weight updates a statistic, or its gradient, sees no finite value, and so stays as it was.
- The scale since the last weight update has *outgrown* the long-term one: it is more than ``limit`` times as large, as
  it is once at a jump of the data, but here for many updates in a row. Training is held by the bound on the moment.

The C++ engine looks for them while it commits. On other engines a layer is checked at every sixteenth commit, without
waiting for an accelerator: its answer is read at the next check.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ..core.spec import Sign
from .streaming import Streaming

TIMES = 3
"""The number of signs that leads to a warning. The first leap may be that from the prior to the data."""

IN_A_ROW = 64
"""The updates in a row for which the long-term scale may be outgrown: windows to 200 have followed a jump by then."""

LEAP = 10.0
"""The growth of the scale that counts as a leap."""

EVERY = 16
"""The number of commits from one check to the next, on engines that do not report signs by themselves."""


@dataclass
class _Record:
    """The observations of a layer: its signs, its level at the last look, and after its last leap.

    ``outgrown``: the first and the last of the updates in a row, counted by the layer, whose scale was outgrown.
    """

    outgrown: tuple[int, int] = (0, 0)
    leaps: int = 0
    missed: int = 0
    missed_gradients: int = 0
    level: float = 0.0
    peak: float = 0.0
    told: bool = False


_records: weakref.WeakKeyDictionary[Streaming, _Record] = weakref.WeakKeyDictionary()
"""The records of layers that gave a sign, or were looked at."""

_unread: dict[torch.device, tuple[list[weakref.ref[Streaming]], Tensor, Any]] = {}
"""The measurements that an accelerator was asked for at the last look."""

_commits = count(1)


def forget(layer: Streaming) -> None:
    """Start over with a layer whose statistics start over."""
    _records.pop(layer, None)


def look(layers: Sequence[Streaming]) -> None:
    """Look at layers that are about to commit on an engine that tells no signs; at most commits this does nothing."""
    if next(_commits) % EVERY or torch._C._len_torch_dispatch_stack() or _is_capturing():
        return
    by_device: dict[torch.device, list[Streaming]] = {}
    for layer in layers:
        by_device.setdefault(layer.long.device, []).append(layer)
    for device, members in by_device.items():
        if device.type == "cpu":
            _judge_levels(members, _measure(members))
        elif device.type != "meta":
            _judge_later(device, members)


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def judge(layers: Sequence[Streaming], signs: Sequence[Sign], every: int = 1) -> None:
    """Take in the signs of a commit of these layers, and say once of each layer that it runs away.

    Args:
        layers: that were committed.
        signs: what was seen of some of them.
        every: the commits of a layer from one look at it to the next, at most.
    """
    running = []
    for sign in signs:
        layer = layers[sign.use]
        record = _records.setdefault(layer, _Record())
        root = 1 / layer.formula.p
        if sign.after**root > LEAP * max(sign.before, record.peak) ** root:
            record.leaps, record.peak = record.leaps + 1, sign.after
        record.missed += _is_missed(layer, sign.missed)
        record.missed_gradients += _is_missed(layer, sign.missed_gradients)
        if sign.outgrown:
            now, (first, last) = layer._ties.commits, record.outgrown
            record.outgrown = (first if now - last <= every else now, now)
        signs_enough = max(record.leaps, record.missed, record.missed_gradients) >= TIMES or _is_outgrown(record)
        if signs_enough and not record.told:
            record.told = True
            running.append((_name(layer), _describe(layer, record, sign)))
    if running:
        (name, what), *others = running
        also = ", ".join(other for other, _ in others)
        warnings.warn(f"{name} runs away: {what}{f'. At the same update: {also}' if also else ''}", stacklevel=2)


def _is_outgrown(record: _Record) -> bool:
    first, last = record.outgrown
    return last - first >= IN_A_ROW


def _is_missed(layer: Streaming, statistics: int) -> bool:
    """Whether so many statistics without a finite value mean anything: a mask may hide a place from its own."""
    return statistics > 0 if layer.ref.spans_places else statistics == layer.count.numel()


@torch.no_grad()
def _measure(layers: Sequence[Streaming]) -> Tensor:
    """Two sums for each layer, of its long-term and its short-term moments, and two counts of what was not finite."""
    levels = torch._foreach_norm([layer.long[1] for layer in layers] + [layer.short[1] for layer in layers], 1)
    rows = [
        torch.stack(
            [
                *(level.double(), present.double()),
                *(_missed(layer.count, layer.samples), _missed(layer.grad_count, layer.grad_samples)),
            ]
        )
        for layer, level, present in zip(layers, levels, levels[len(layers) :])
    ]
    return torch.stack(rows)


def _missed(counts: Tensor, samples: Tensor) -> Tensor:
    return ((counts == 0) & (samples > 0)).sum().double()


def _judge_levels(layers: Sequence[Streaming], measured: Tensor) -> None:
    signs = []
    for i, (layer, (level, present, *missed)) in enumerate(zip(layers, measured.tolist())):
        record = _records.setdefault(layer, _Record())
        outgrown = present > layer.formula.limit**layer.formula.p * level
        signs.append(Sign(i, record.level, level, present, outgrown, *map(int, missed)))
        record.level = level
    judge(layers, signs, EVERY)


def _judge_later(device: torch.device, layers: Sequence[Streaming]) -> None:
    """Ask an accelerator, and read what it was asked at the last look, if it has answered."""
    earlier = _unread.pop(device, None)
    measured = _measure(layers)
    host = torch.empty(measured.shape, dtype=measured.dtype, pin_memory=device.type == "cuda")
    host.copy_(measured, non_blocking=True)
    answered = torch.Event(device)
    answered.record()
    _unread[device] = [weakref.ref(layer) for layer in layers], host, answered
    if earlier is not None and earlier[2].query():
        known = [(layer, row) for reference, row in zip(*earlier[:2]) if (layer := reference()) is not None]
        if known:
            _judge_levels([layer for layer, _ in known], torch.stack([row for _, row in known]))


def _name(layer: Streaming) -> str:
    return f"{layer._ties.name} ({type(layer).__name__})" if layer._ties.name else repr(layer)


def _describe(layer: Streaming, record: _Record, sign: Sign) -> str:
    memory = (
        f"window, now {layer.formula.window:g}" if layer.formula.window else "alpha and kappa, the weights of the past"
    )
    advice = (
        "Lower the learning rate (one for 32 samples per weight update is about 32 times too high for single samples), "
        f"or shorten the memory of the statistics ({memory})"
    )
    size, root = layer.count.numel(), 1 / layer.formula.p
    before, after, present = (
        (level / size) ** root * layer.formula.k for level in (sign.before, sign.after, sign.present)
    )
    if _is_outgrown(record):
        return (
            f"for {IN_A_ROW} weight updates its input has had more than {layer.formula.limit:g} times the scale that "
            f"it remembers (now {present:.3g} and {after:.3g}). Training is held by Stream(limit=...), and evaluation, "
            f"which goes by what is remembered, fails. {advice}"
        )
    if record.leaps >= TIMES:
        return (
            f"its scale leapt {record.leaps} times to more than {LEAP:g} times what it was, the last time "
            f"from {before:.3g} to {after:.3g}, which ends in NaN. {advice}"
        )
    kind, number = ("", sign.missed) if record.missed >= TIMES else ("gradients of its ", sign.missed_gradients)
    overflow = f", or take a smaller p: |x|^{layer.formula.p:g} overflows early" if layer.formula.p > 2 else ""
    return (
        f"for the {TIMES}rd weight update, NaN and infinity were all that {kind}statistics met ({number} of "
        f"{layer.count.numel()}), and these stay as they were. Look for the first of them in the data, the weights and "
        f"the loss. {advice}{overflow}"
    )
