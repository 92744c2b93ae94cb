"""Memory of a training step: what waits for the backward pass, and the most that is there at once.

*Saved*: the bytes of all tensors that autograd saves (seen by ``torch.autograd.graph.saved_tensors_hooks``) and of all
tensors and bytes that custom functions keep in attributes of their nodes, or in objects there that are no modules; each
piece of memory once, without the parameters and buffers of the module. The input is part of it where it is saved.

*Peak*: the sum of all allocations minus all releases of PyTorch's CPU allocator, in their order, at its highest point
between the start of the forward and the end of the backward pass (PyTorch's profiler records them). The input is there
before and does not count; the output and all gradients do. Memory that does not come from this allocator is not seen:
the C++ engine's vectors of statistics, which are added here as part of what is saved, and its scratch memory, which it
keeps for each thread and does not grow with the input (about 1 MiB) except for partial sums and for inputs with gaps.
Nor is the memory that it keeps for large outputs: while peaks are measured it keeps none, and outputs come from the
allocator, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.profiler_legacy import profile

from streamnorm import ops
from streamnorm_lab.bench.contestants import Contestant


class Memory(NamedTuple):
    """Bytes of a training step."""

    saved: int
    peak: int


def measure_memory(contestant: Contestant) -> Memory:
    """Saved and peak memory of one step, after one to warm up."""
    with ops.force(contestant.engine) if contestant.engine else nullcontext():
        _step(contestant)
        saved, other = _saved(contestant)
        contestant.update()
        kept = ops.keep_memory(0)
        try:
            peak = _peak(lambda: _gradients(contestant))
        finally:
            ops.keep_memory(kept)
        contestant.update()
    return Memory(saved + other, peak + other)


def _step(contestant: Contestant) -> None:
    _gradients(contestant)
    contestant.update()


def _gradients(contestant: Contestant) -> None:
    contestant.backward(contestant.forward(0), 0)


def _saved(contestant: Contestant) -> tuple[int, int]:
    """Bytes that tensors keep between forward and backward, and bytes that other objects keep."""
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = contestant.forward(0)
    other: dict[int, int] = {}
    for held in _attributes(output):
        if isinstance(held, Tensor):
            tensors.append(held.detach())
        else:
            other[id(held)] = len(held)
    own = {tensor.untyped_storage().data_ptr() for tensor in contestant.own_tensors()}
    pieces = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    found = sum(size for place, size in pieces.items() if place not in own), sum(other.values())
    contestant.backward(output, 0)
    return found


def _attributes(output: Tensor) -> Iterator[Tensor | bytes]:
    """Tensors and bytes in the attributes of the custom functions that lead to this output."""
    waiting: list[Any] = [output.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        yield from _held(getattr(node, "__dict__", {}), seen)


def _held(value: Any, seen: set[Any]) -> Iterator[Tensor | bytes]:
    """Tensors and bytes that an object holds, also by way of lists, dictionaries and other objects, but not modules."""
    if isinstance(value, Tensor | bytes):
        yield value
    elif not isinstance(value, nn.Module | type) and id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, list | tuple):
            items: Iterable[Any] = value
        else:
            items = (value if isinstance(value, dict) else getattr(value, "__dict__", {})).values()
        for item in items:
            yield from _held(item, seen)


def _peak(run: Callable[[], None]) -> int:
    """The highest sum of allocations minus releases of PyTorch's CPU allocator."""
    # The legacy profiler starts in no time and gives plain records; the newer one loads tracing libraries first.
    profile(profile_memory=True).__enter__()
    try:
        run()
    finally:
        threads = torch._C._autograd._disable_profiler_legacy()
    now = most = 0
    for record in (record for records in threads for record in records):
        if str(record.kind()) == "memory_alloc":
            now += record.cpu_memory_usage()
            most = max(most, now)
    return most
