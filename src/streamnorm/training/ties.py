"""Ties: what a streaming layer knows of the training that it takes part in, in this process."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

Seen = tuple[int, list[int], list[Tensor]]
"""The watchdog's record of a layer: its samples, and the versions and a few values of some parameters."""


class Parameters:
    """A set of parameters, held weakly and compared by identity."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.ids: set[int] = set()
        self._references = [self._hold(tensor) for tensor in tensors]

    def _hold(self, tensor: Tensor) -> weakref.ref[Tensor]:
        ids, key = self.ids, id(tensor)
        ids.add(key)
        return weakref.ref(tensor, lambda _: ids.discard(key))  # the number may serve another tensor afterwards


@dataclass(frozen=True)
class Binding:
    """The binding of a layer by :func:`streamnorm.bind`: the optimizers whose steps are its updates.

    Args:
        parameters: what these optimizers train; any optimizer that trains some of it counts.
        optimizers: those that were named.
        replaced: those that were named before and are no longer meant.
    """

    parameters: Parameters
    optimizers: tuple[weakref.ref[Optimizer], ...]
    replaced: tuple[weakref.ref[Optimizer], ...]

    def counts(self, optimizer: Optimizer, trained: set[int]) -> bool:
        """Whether a step of this optimizer, which trains these parameters, is an update."""
        return not trained.isdisjoint(self.parameters.ids) and all(other() is not optimizer for other in self.replaced)


@dataclass(frozen=True)
class Sync:
    """The schedule for joining statistics with other processes, and their group; with None a layer finds the group.

    A process group lives in one process. A copy of a layer keeps it, a pickled layer starts without one.
    """

    every: str = "update"
    process_group: dist.ProcessGroup | None = None

    def __deepcopy__(self, memo: Any) -> Sync:
        return self

    def __reduce__(self) -> tuple[type[Sync], tuple[str]]:
        return Sync, (self.every,)


@dataclass(eq=False)
class Ties:
    """A layer's ties to optimizers, modules and processes. A copy or a pickle starts with ties of its own.

    Args:
        name: of the layer in its model, or nothing where that is not known.
        sync: when it joins its statistics with those of other processes.
        used: whether the layer was used in training, or its state in the middle of an update was loaded.
        around: the modules that hold it and have other weights too, the innermost first.
        leaves: parameters of others that its gain and bias are computed from.
        before: the weight that was used last on the way to its input.
        outdated: whether to find out again what is around it.
        bound: the optimizers that :func:`streamnorm.bind` named.
        home: what the optimizer trained that made the last update.
        stranger: what another optimizer trained, which was found to train nothing around the layer.
        near: the innermost module around the layer whose weights any optimizer was seen to train.
        passed_over: steps of others since the last update which trained a part of what is around the layer.
        committed: whether an update was noticed since the watchdog's last look.
        commits: how many updates were noticed.
        seen: what it saw then, if no update was noticed before.
        changes: at how many looks since the last update weights had changed.
        pause: how many uses lie between its looks.
        met: whether the layer is known to `updates`, and what is around it.
        lease: so many uses until `updates` looks at the layer.
        ddp: the DistributedDataParallel that it was called in.
        grad_scale: the scale of the GradScaler that :func:`streamnorm.bind` named.
    """

    name: str = ""
    sync: Sync = Sync()
    used: bool = False
    around: tuple[weakref.ref[nn.Module], ...] = ()
    leaves: tuple[weakref.ref[Tensor], ...] = ()
    before: weakref.ref[Tensor] | None = None
    outdated: bool = False
    bound: Binding | None = None
    home: Parameters | None = None
    stranger: Parameters | None = None
    near: weakref.ref[nn.Module] | None = None
    passed_over: int = 0
    committed: bool = False
    commits: int = 0
    seen: Seen | None = None
    changes: int = 0
    pause: int = 64
    met: bool = False
    lease: Iterator[bool] = field(default_factory=lambda: iter(()))
    ddp: weakref.ref[DistributedDataParallel] | None = None
    grad_scale: Tensor | None = None

    def of_a_copy(self) -> Ties:
        """The ties that a copy of the layer starts with."""
        return Ties(self.name, self.sync, around=self.around)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ties:
        """The copy stands in the copies of the modules around, as far as these are copied too."""
        copies = (memo.get(id(module)) for module in alive(self.around))
        around = tuple(weakref.ref(module) for module in copies if module is not None)
        return Ties(self.name, self.sync, around=around)

    def __reduce__(self) -> tuple[type[Ties], tuple[str, Sync, bool]]:
        """Pickle the name and the synchronization alone.

        The modules around an unpickled layer are not known: with statistics to commit, it follows any optimizer.
        """
        return Ties, (self.name, self.sync, True)


def alive(references: Sequence[weakref.ref[Any]]) -> Iterator[Any]:
    """The objects referred to that still exist."""
    return (thing for reference in references if (thing := reference()) is not None)
