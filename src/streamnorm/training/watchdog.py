"""A watchdog for updates that nobody reports: a layer collects on and on while the weights around it change."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from itertools import islice, repeat

import torch
from torch import Tensor, nn

from .streaming import Streaming
from .surroundings import own_parameters
from .ties import Seen, Ties, alive

USES = Ties.pause
"""After so many uses a layer is looked at for the first time."""

_MOST_USES = 1024
"""The pause between two looks doubles up to this, as long as updates are noticed or weights rest."""

CHANGES = 3
"""Without one: after so many looks at which weights had changed, it speaks. Weights that rest do not count, such as a
generator's during the critic's steps, or any while gradients accumulate."""

_MOST_PARAMETERS = 4
_MOST_VALUES = 16


def lease(uses: int) -> Iterator[bool]:
    """An iterator that a layer advances at each use; when it is exhausted, it is time for the next look."""
    return repeat(True, uses)


@torch.no_grad()
def look(layer: Streaming) -> int:
    """Compare the weights around a layer with those at the last look, if no update was noticed since then.

    Returns:
        After how many uses to look again.

    Warns:
        UserWarning: once for each network, if they have changed again and again.
    """
    ties = layer._ties
    ties.pause = min(2 * ties.pause, _MOST_USES)
    if ties.committed:
        ties.committed, ties.seen, ties.changes = False, None, 0
    elif ties.changes < CHANGES and _can_read(layer):
        before, ties.seen = ties.seen, _see(layer)
        if before is None or _differ(before, ties.seen):
            ties.pause = USES
            ties.changes += before is not None
            if ties.changes == CHANGES:
                _warn(layer)
    return ties.pause


_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The networks of which one layer has spoken; the others are silent."""


def _warn(layer: Streaming) -> None:
    *_, network = layer, *alive(layer._ties.around)
    if network not in _told:
        _told.add(network)
        warnings.warn(_describe(layer), stacklevel=2)


def _can_read(layer: Streaming) -> bool:
    samples = layer.samples
    return (
        type(samples) is Tensor
        and samples.device.type != "meta"
        and not torch._C._len_torch_dispatch_stack()
        and not (samples.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _see(layer: Streaming) -> Seen:
    """The samples collected, and a few values of a few parameters that an update would change, with their versions.

    Both are needed: a fused optimizer changes no version, and an update with a rate of zero no value.
    """
    around = (parameter for module in alive(layer._ties.around[:1]) for parameter in module.parameters())
    trained = [p for p in own_parameters(layer) if p.requires_grad]
    trained += islice((p for p in around if p.requires_grad), _MOST_PARAMETERS)
    local = [p.to_local() if hasattr(p, "to_local") else p for p in trained]  # of a DTensor, without the others
    versions = [0 if p.is_inference() else p._version for p in local]
    values = [p.detach().flatten()[:_MOST_VALUES].clone() for p in local]
    return int(layer.samples), versions, values


def _differ(before: Seen, now: Seen) -> bool:
    if now[0] <= before[0] or len(now[1]) != len(before[1]):
        return False
    return now[1] != before[1] or not all(torch.equal(a, b) for a, b in zip(before[2], now[2]))


def _describe(layer: Streaming) -> str:
    name = f"{layer._ties.name} ({type(layer).__name__})" if layer._ties.name else type(layer).__name__
    return (
        f"{name} has collected statistics of {int(layer.samples)} samples and its network's weights changed, but no "
        "weight update was noticed: its statistics do not move on. Write streamnorm.commit(model) after each update. "
        "If the step() of a torch.optim.Optimizer makes it, name that one: streamnorm.bind(model, optimizer)"
    )
