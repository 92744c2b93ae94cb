"""Agreement between processes: the statistics of all layers, joined by one all-reduce per weight update.

Every process trains a replica of the model on data of its own (``DistributedDataParallel``, ``fully_shard``, or a loop
that averages the gradients itself). Between two weight updates each collects its own short-term statistics. At the
update, before they enter the long-term ones, :func:`merged` replaces them by those of all processes together: averages
weighted by element counts. Then every process makes the same commit, and their long-term statistics stay equal.
"""

from __future__ import annotations

import gc
import json
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.nn.parallel import DistributedDataParallel

from ..core import saved_state
from ..core.spec import FIELDS, State
from .streaming import Streaming

FIRST_WORD = timedelta(seconds=30)
"""The time that a process waits for the others at a weight update before it warns."""


def group_of(layer: Streaming) -> dist.ProcessGroup | None:
    """The processes that a layer shares its statistics with, or None where it is alone.

    The group that :func:`streamnorm.synchronize` named, else that of the DistributedDataParallel or the device mesh
    that the layer is trained in, else all processes.
    """
    if not (dist.is_available() and dist.is_initialized()) or layer._ties.sync.every == "never":
        return None
    group = layer._ties.sync.process_group or _found_group(layer)
    return group if dist.get_world_size(group) > 1 else None


def _found_group(layer: Streaming) -> dist.ProcessGroup:
    everyone = dist.group.WORLD
    assert everyone is not None
    ddp = None if layer._ties.ddp is None else layer._ties.ddp()
    if ddp is not None:
        return ddp.process_group
    mesh: Any = getattr(layer.weight, "device_mesh", None)  # of a DTensor: fully_shard
    if mesh is None or mesh.size() == dist.get_world_size():
        return everyone
    if mesh.ndim > 1:
        raise ValueError(
            f"the parameters of {type(layer).__name__} lie on a mesh of shape {tuple(mesh.shape)}, not on all "
            f"{dist.get_world_size()} processes: say which ones see different data with "
            "streamnorm.synchronize(model, process_group=...)"
        )
    return mesh.get_group()


def adopt(ddp: DistributedDataParallel) -> None:
    """Take over the care for the state of all streaming layers of a model from DistributedDataParallel.

    It would broadcast their buffers from the first process before a forward pass, over what the others collected.
    Called at the first training forward: the broadcast when DDP was made, which gives all the same start, is over.
    """
    found = [(n, m) for n, m in ddp.module.named_modules() if isinstance(m, Streaming) and m.stream is not None]
    for _, layer in found:
        layer._ties.ddp = weakref.ref(ddp)
    buffers = (*State._fields, saved_state.MOMENT)
    ddp.parameters_to_ignore.update(f"{name}.{buffer}".lstrip(".") for name, _ in found for buffer in buffers)
    ddp._assign_modules_buffers()  # or it tries to broadcast a list that has become empty
    _adopted.add(ddp)


def is_adopted(ddp: DistributedDataParallel) -> bool:
    """Whether :func:`adopt` has seen to the layers of this model."""
    return ddp in _adopted


def is_new(layer: Streaming) -> bool:
    """Whether the DistributedDataParallel that runs right now does not know this layer yet."""
    active = DistributedDataParallel._active_ddp_module
    return active is not None and (layer._ties.ddp is None or layer._ties.ddp() is not active)


def merged(select: Callable[[], list[Streaming]]) -> list[Streaming]:
    """The layers to commit, their short-term statistics joined with those of the other processes.

    Args:
        select: gives the layers. It is asked twice where the set is new: what a finished training left behind is
            cleared away before, since it would be gone in one process and still there in another.

    Raises:
        RuntimeError: if the processes do not commit the same layers, or one does not take part. The state of the
            layers is as it was.
    """
    layers = select()
    if not (dist.is_available() and dist.is_initialized()):
        return layers
    if _key(layers) not in _settled:
        del layers
        gc.collect()
        layers = select()
        _settled.difference_update([key for key in _settled if any(layer() is None for layer in key)])
        _settled.add(_key(layers))
    for agreement, members in _teams(layers):
        agreement.merge(members)
    return layers


def _teams(layers: Sequence[Streaming]) -> list[tuple[_Agreement, list[Streaming]]]:
    """The layers that are joined at a weight update, by process group and by device."""
    teams: dict[tuple[dist.ProcessGroup, torch.device], list[Streaming]] = {}
    for layer in layers:
        group = group_of(layer) if layer._ties.sync.every == "update" else None
        if group is not None:
            _check_join(layer)
            teams.setdefault((group, layer.state.long.device), []).append(layer)
    return [(_agreement(*place), members) for place, members in teams.items()]


def _agreement(group: dist.ProcessGroup, device: torch.device) -> _Agreement:
    on_devices = _agreements.setdefault(group, {})
    if device not in on_devices:
        on_devices[device] = _Agreement(group, device)
    return on_devices[device]


def _check_join(layer: Streaming) -> None:
    ddp = None if layer._ties.ddp is None else layer._ties.ddp()
    if ddp is None or not ddp._join_config.enable:
        return
    ours = joinables.get(ddp)
    if ours is None or ours.partner is not ddp._join_config:  # Join makes a new one each time, and leaves it behind
        raise RuntimeError(
            "under torch's Join a process that has run out of data answers the collectives of those that go on, and "
            "it has to be told of streaming statistics: write Join([ddp_model, streamnorm.joinable(ddp_model)]), in "
            "this order, where there is ddp_model.join() or Join([ddp_model])"
        )


class _Agreement:
    """The agreement between the processes of a group: the sets of layers that they commit, numbered from 1.

    A set is made known by a collective that all take part in; from then on its number is enough. Every all-reduce has
    the same length, room for the largest set, and begins with a header that shows whether all mean the same set: so
    processes that differ find out together, in place of waiting for each other.

    On a CPU the collectives run over connections of their own. Over those that DDP uses too, a process that skips a
    weight update would have its next all-reduce of gradients matched with this one; gloo ends the program then, or
    worse.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.device = device
        self.rank, self.processes = dist.get_rank(group), dist.get_world_size(group)
        self.store = PrefixStore(f"streamnorm {device.type}", group.get_group_store())
        self._beside = weakref.ref(group)
        self.numbers: dict[tuple[weakref.ref[Streaming], ...], int] = {}
        self.room = self.updates = 0
        self.unread: tuple[Tensor, torch.Event] | None = None

    @cached_property
    def group(self) -> Any:
        """The group that the collectives run over, made when the first one is due, which all processes come to."""
        group = self._beside()
        assert group is not None
        if self.device.type != "cpu" or not dist.is_gloo_available():
            return weakref.proxy(group)
        options = getattr(group._get_backend(self.device), "options", None)
        timeout = getattr(options, "_timeout", dist.default_pg_timeout)
        return dist.ProcessGroupGloo(self.store, self.rank, self.processes, timeout)

    def merge(self, layers: Sequence[Streaming]) -> None:
        """Replace the short-term statistics of these layers by those of all processes together."""
        states = [layer.state for layer in layers]
        self.updates += 1
        if _key(layers) not in self.numbers:
            self._all_reduce(states[0].long.new_empty(0, dtype=torch.float64), 0, layers)
            self._compare(layers)
            self._same_start(states)
            self.numbers[_key(layers)] = len(self.numbers) + 1
            self.room = max(self.room, len(_pack(states)))
        own = _pack(states)
        _unpack(self._all_reduce(own, self.numbers[_key(layers)], layers)[: len(own)], states)

    def _all_reduce(self, own: Tensor, number: int, layers: Sequence[Streaming]) -> Tensor:
        """The sum over all processes, once it is known that all of them mean the set of this number."""
        header = own.new_tensor([1.0, number, number**2])
        buffer = torch.cat((header, own, own.new_zeros(self.room - len(own))))
        self._wait(self.group.allreduce([buffer]))
        if number == 0 or self.device.type == "cpu":
            self._check(buffer[:3].tolist(), layers)
        else:
            self._check_later(buffer[:3])
        return buffer[3:]

    def _wait(self, work: dist.Work) -> None:
        """Wait as long as the group does, and say soon what for. An accelerator's own stream waits for its work."""
        if self.device.type != "cpu":
            work.wait()
            return
        try:
            work.wait(FIRST_WORD)
            return
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
        missing = self._missing()
        warnings.warn(self._describe(f"waits for {missing}"), stacklevel=2)
        try:
            work.wait()
        except RuntimeError as error:
            raise RuntimeError(self._describe(f"waited for {missing} in vain")) from error

    def _missing(self) -> str:
        """The processes that are not waiting too. Who waits for so long leaves a note."""
        notes = [f"{self.updates}/{rank} waits" for rank in range(self.processes)]
        self.store.set(notes[self.rank], "")
        time.sleep(FIRST_WORD.total_seconds() / 10)  # the others may have come a little later
        return "process " + ", ".join(str(rank) for rank, note in enumerate(notes) if not self.store.check([note]))

    def _check(self, header: list[float], layers: Sequence[Streaming] | None) -> None:
        """Numbers are all the same where the square of their sum is n times the sum of their squares."""
        processes, total, squares = header
        if processes != self.processes:
            raise RuntimeError(self._describe("met another collective of one of the processes"))
        if processes * squares != total**2:
            if layers is not None:
                self._compare(layers)
            raise RuntimeError(self._describe("met that of other layers"))

    def _check_later(self, header: Tensor) -> None:
        """On an accelerator: read the header of the update before, which needs no waiting."""
        if self.unread is not None:
            values, ready = self.unread
            ready.synchronize()
            self._check(values.tolist(), None)
        host = torch.empty(header.shape, dtype=header.dtype, pin_memory=True).copy_(header, non_blocking=True)
        ready = torch.Event(header.device)
        ready.record()
        self.unread = host, ready

    def _compare(self, layers: Sequence[Streaming]) -> None:
        """Refuse, in every process, sets of layers that are not the same in all."""
        ours = [f"{layer._ties.name or 'a layer'} ({_kind(layer)})" for layer in layers]
        notes = [f"{self.updates}/{rank} layers" for rank in range(self.processes)]
        self.store.set(notes[self.rank], json.dumps(ours))
        theirs = [json.loads(self.store.get(note)) for note in notes]
        for rank, others in enumerate(theirs):
            pairs = list(zip_longest(theirs[0], others, fillvalue="missing"))
            if others != theirs[0]:
                place = next(i for i, (first, other) in enumerate(pairs) if first != other)
                raise RuntimeError(
                    f"a weight update is not of the same layers in all processes: number {place + 1} is "
                    f"{pairs[place][0]} in process 0 and {pairs[place][1]} in process {rank}. A process knows the "
                    "layers that it has used. Where these differ, name all of them in the model's order, on every "
                    "process and before training: streamnorm.bind(model, optimizer)"
                )

    def _same_start(self, states: Sequence[State]) -> None:
        """The long-term statistics of the first process become everyone's, as DDP does it with parameters."""
        kept = [each for name, column in _columns(states).items() if name not in _JOINED for each in column]
        flat = torch.cat([tensor.flatten().to(torch.float64) for tensor in kept])
        self.group.broadcast(flat, 0).wait()
        for tensor, values in zip(kept, flat.split([tensor.numel() for tensor in kept])):
            tensor.copy_(values.view_as(tensor))

    def _describe(self, what: str) -> str:
        return (
            f"weight update {self.updates}: the all-reduce that joins the statistics of streaming layers {what} "
            f"(this is process {self.rank} of {self.processes}). Every process has to make "
            "every weight update. Does one of them skip an optimizer step, have fewer mini-batches, or call "
            "streamnorm.commit or calibrate alone? docs/distributed.md says what to do; "
            "streamnorm.synchronize(model, 'never') is for processes that train different models"
        )


_settled: set[tuple[weakref.ref[Streaming], ...]] = set()
"""The sets of layers that were selected before."""

_adopted: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()

_agreements: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, _Agreement]]
_agreements = weakref.WeakKeyDictionary()

joinables: weakref.WeakKeyDictionary[DistributedDataParallel, Any] = weakref.WeakKeyDictionary()
"""For a model under torch's Join, what answers our collectives there; :func:`streamnorm.joinable` makes it."""


def _key(layers: Sequence[Streaming]) -> tuple[weakref.ref[Streaming], ...]:
    return tuple(weakref.ref(layer) for layer in layers)


def _kind(layer: Streaming) -> str:
    return f"{type(layer).__name__} with {layer.state.count.numel()} statistics, {layer.formula}"


_JOINED = {name: field for name, field in FIELDS.items() if field.joined != "same"}
_COUNTS = {field.half: name for name, field in FIELDS.items() if field.is_count and field.rows == 1}
"""The counts of each half: the elements that its averages are over."""


def _columns(states: Sequence[State]) -> dict[str, list[Tensor]]:
    """The buffers of several streams by name, each as a matrix with a row for mu and one for the moment, or one row."""
    columns = dict(zip(FIELDS, zip(*states)))
    return {name: [each.view(field.rows or 1, -1) for each in columns[name]] for name, field in FIELDS.items()}


def _pack(states: Sequence[State]) -> Tensor:
    """All that has to be summed over the processes, as one vector; float64 keeps every count."""
    joined = {name: torch.cat(column, 1).to(torch.float64) for name, column in _columns(states).items()}
    for name, field in _JOINED.items():
        if field.joined == "average":
            joined[name] = joined[name] * joined[_COUNTS[field.half]]
    return torch.cat([joined[name].flatten() for name in _JOINED])


def _unpack(total: Tensor, states: Sequence[State]) -> None:
    """Make averages of the sums, and put them where they belong."""
    columns = _columns(states)
    sizes = {name: [each.shape[1] for each in columns[name]] for name in _JOINED}
    lengths = [(field.rows or 1) * sum(sizes[name]) for name, field in _JOINED.items()]
    sums = dict(zip(_JOINED, total.split(lengths)))
    for name, field in _JOINED.items():
        values = sums[name].view(field.rows or 1, -1)
        if field.joined == "average":
            values = values / sums[_COUNTS[field.half]].clamp(min=1)
        torch._foreach_copy_(columns[name], list(values.split(sizes[name], 1)))
