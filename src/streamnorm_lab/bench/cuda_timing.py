"""Timing on a CUDA device: events, in turns, with what a step costs the device and what it costs altogether.

*Device* time is that of a CUDA graph that holds a step for each input, replayed: no Python, no launches from the host.
*Eager* time is that of the same steps as PyTorch runs them, host included: what bounds small layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamnorm_lab.bench.timing import Spread

Call = Callable[[], object]


class Device(ABC):
    """A device that runs steps, and its clock."""

    @abstractmethod
    def captured(self, steps: Sequence[Call]) -> Call:
        """A call that runs all of these steps without the host; they were run before."""

    @abstractmethod
    def seconds(self, call: Call, times: int) -> float:
        """Seconds that one of so many calls takes."""


class CudaDevice(Device):
    """The current CUDA device."""

    def captured(self, steps: Sequence[Call]) -> Call:
        """A graph of them."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # once outside of the graph on the stream of a capture, as PyTorch asks
            for step in steps:
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for step in steps:
                step()
        return graph.replay

    def seconds(self, call: Call, times: int) -> float:
        """By events on the device, which is idle before."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times


@dataclass(frozen=True)
class Effort:
    """Measuring effort: seconds of one contestant's block, number of rounds, and seconds of warm-up."""

    block: float = 0.01
    rounds: int = 15
    warm_up: float = 0.1


def time_in_turns(calls: dict[str, Call], device: Device, effort: Effort) -> dict[str, list[float]]:
    """Seconds of one call of each contestant, round by round: a block of each in every round.

    Who begins changes from round to round, so that what slows the device down for a while slows all of them down.
    """
    repeats = {}
    for name, call in calls.items():
        once = device.seconds(call, 1)
        warm = device.seconds(call, max(1, round(effort.warm_up / max(once, 1e-9))))
        repeats[name] = max(1, round(effort.block / max(warm, 1e-9)))
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(effort.rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(device.seconds(calls[name], repeats[name]))
    return times


def ratio(ours: list[float], rival: list[float]) -> Spread:
    """Median and quartiles of the ratios of the rounds."""
    return Spread.of([a / b for a, b in zip(ours, rival, strict=True)])


def copy_speed(device: Device, source: Tensor, effort: Effort) -> float:
    """Bytes per second, read and written, of a copy of this tensor, which should exceed every cache by far."""
    target = torch.empty_like(source)
    times = time_in_turns({"copy": lambda: target.copy_(source)}, device, effort)["copy"]
    return float(2 * source.numel() * source.element_size() / np.median(times))
