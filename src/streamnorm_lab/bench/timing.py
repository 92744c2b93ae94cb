"""Paired timing: two contestants take turns in one process, and each round gives one ratio.

What slows the machine down for a while slows both down, so that the ratios of the rounds spread less than the times.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from streamnorm import ops
from streamnorm_lab.bench.contestants import Contestant

TOGETHER = "together"
"""The part that is the sum of all parts of a step."""


@dataclass(frozen=True)
class Effort:
    """Measuring effort.

    Args:
        seconds: at least so long for a pair.
        rounds: at least so many rounds for a pair; a round is one block of steps of each contestant.
        block: at least so many seconds for one contestant's block; a step that takes longer is a block by itself.
        warm_up: so many seconds of steps of each contestant before, at least two steps.
    """

    seconds: float = 0.4
    rounds: int = 11
    block: float = 0.002
    warm_up: float = 0.05


class Spread(NamedTuple):
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Median and quartiles of some values."""
        return cls(*(float(value) for value in np.percentile(values, (25, 50, 75))))


class Rounds(NamedTuple):
    """The seconds of each part of a step, by round, of two contestants that took turns."""

    ours: list[dict[str, float]]
    rival: list[dict[str, float]]


class Comparison(NamedTuple):
    """Ratios of the first contestant's time to the second's, and the seconds that a step of each takes, by part."""

    ratio: dict[str, Spread]
    ours: dict[str, Spread]
    rival: dict[str, Spread]
    rounds: int

    @classmethod
    def of(cls, rounds: Rounds) -> Comparison:
        """Summarize the rounds."""
        parts = list(rounds.ours[0])
        return cls(
            {part: Spread.of([a[part] / b[part] for a, b in zip(*rounds)]) for part in parts},
            {part: Spread.of([a[part] for a in rounds.ours]) for part in parts},
            {part: Spread.of([b[part] for b in rounds.rival]) for part in parts},
            len(rounds.ours),
        )


def compare(ours: Contestant, rival: Contestant, effort: Effort) -> Rounds:
    """Time two contestants in turns. Who begins changes from round to round: each follows itself as often."""
    pair = (_Runner(ours, 0), _Runner(rival, 1))
    with no_garbage_collection():
        step = min(runner.warm_up(effort.warm_up) for runner in pair)
        steps = max(1, round(effort.block / step))
        blocks = Rounds([], [])
        start = time.perf_counter()
        while len(blocks.ours) < effort.rounds or time.perf_counter() - start < effort.seconds:
            for who in (0, 1) if len(blocks.ours) % 2 == 0 else (1, 0):
                blocks[who].append(pair[who].block(steps))
    return blocks


class _Runner:
    """Steps of one contestant, each with the next of its own inputs: the even or the odd ones of the pool.

    Two contestants that shared inputs would find them in the cache, one more often than the other.
    """

    def __init__(self, contestant: Contestant, slot: int) -> None:
        self._contestant = contestant
        self._turn = slot

    def warm_up(self, seconds: float) -> float:
        """Seconds of one step, once everything is warm."""
        start = time.perf_counter()
        taken = [self.block(1)[TOGETHER] for _ in range(2)]
        while time.perf_counter() - start < seconds:
            taken.append(self.block(1)[TOGETHER])
        return float(np.median(taken))

    def block(self, steps: int) -> dict[str, float]:
        """Mean seconds of each part of a step, and of all together."""
        contestant, clock = self._contestant, time.perf_counter
        forward = backward = update = 0.0
        with ops.force(contestant.engine) if contestant.engine else nullcontext():
            for _ in range(steps):
                contestant.before_forward(self._turn)
                began = clock()
                output = contestant.forward(self._turn)
                forward += clock() - began
                contestant.before_backward(self._turn)
                began = clock()
                contestant.backward(output, self._turn)
                ended = clock()
                contestant.update()
                update += clock() - ended
                backward += ended - began
                del output
                self._turn += 2
        taken = {"forward": forward, "backward": backward, "update": update}
        times = {part: taken[part] for part in contestant.parts}
        times[TOGETHER] = sum(times.values())
        return {part: seconds / steps for part, seconds in times.items()}


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect before, and not while it is measured."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
