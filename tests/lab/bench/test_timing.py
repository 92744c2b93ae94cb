"""Paired timing, on a clock that only the contestants move."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from streamnorm import ops
from streamnorm_lab.bench.contestants import Contestant
from streamnorm_lab.bench.timing import TOGETHER, Comparison, Effort, Spread, compare

EFFORT = Effort(seconds=0.1, rounds=5, block=0.004, warm_up=0.01)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Scripted(Contestant):
    """Takes the seconds that it is told to."""

    def __init__(self, name: str, clock: Clock, seconds: tuple[float, float], log: list[tuple[str, int]]) -> None:
        super().__init__(name, engine="torch" if name == "bound" else None)
        self.clock, self.seconds, self.log = clock, seconds, log

    def forward(self, turn: int) -> Tensor:
        assert not gc.isenabled()
        assert ops.engines()["native"].startswith("switched off") == (self.name == "bound")
        self.log.append((self.name, turn))
        self.clock.now += self.seconds[0]
        return torch.empty(0)

    def backward(self, output: Tensor, turn: int) -> None:
        self.clock.now += self.seconds[1]

    def update(self) -> None:
        self.clock.now += 100 if "update" in self.parts else 0


class Updating(Scripted):
    parts = ("forward", "backward", "update")


class BetweenOthers(Scripted):
    """The layers before and behind take time that is not counted."""

    def before_forward(self, turn: int) -> None:
        self.clock.now += 7

    def before_backward(self, turn: int) -> None:
        self.clock.now += 9


def compared(ours: Contestant, rival: Contestant, effort: Effort) -> Comparison:
    return Comparison.of(compare(ours, rival, effort))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    return clock


@pytest.mark.parametrize("kind", [Scripted, BetweenOthers])
def test_ratios_are_those_of_the_times(clock, kind):
    found = compared(kind("a", clock, (0.001, 0.002), []), Scripted("bound", clock, (0.002, 0.008), []), EFFORT)
    assert found.ratio["forward"] == pytest.approx(Spread(0.5, 0.5, 0.5))
    assert found.ratio["backward"].median == pytest.approx(0.25)
    assert found.ratio[TOGETHER].median == pytest.approx(0.3)
    assert found.ours[TOGETHER].median == pytest.approx(0.003)
    assert found.rival[TOGETHER].median == pytest.approx(0.01)
    assert gc.isenabled()


def test_an_update_counts_only_where_it_is_part_of_the_step(clock):
    found = compared(Updating("a", clock, (1, 1), []), Updating("b", clock, (1, 1), []), EFFORT)
    assert found.ours[TOGETHER].median == pytest.approx(102)
    assert "update" not in compared(Scripted("a", clock, (1, 1), []), Scripted("b", clock, (1, 1), []), EFFORT).ratio


def test_contestants_alternate_and_share_no_input(clock):
    log: list[tuple[str, int]] = []
    found = compared(Scripted("a", clock, (0.01, 0.01), log), Scripted("b", clock, (0.01, 0.01), log), EFFORT)
    measured = [name for name, _ in log[4:]]  # after two steps each to warm up
    assert measured == (["a", "b", "b", "a"] * len(measured))[: len(measured)]
    assert len(measured) == 2 * found.rounds
    assert {turn % 2 for name, turn in log if name == "a"} == {0}
    assert {turn % 2 for name, turn in log if name == "b"} == {1}


@pytest.mark.parametrize(("step", "rounds"), [(1.0, 5), (0.001, 13)])
def test_both_time_and_rounds_are_enough(clock, step, rounds):
    found = compared(Scripted("a", clock, (step / 2,) * 2, []), Scripted("b", clock, (step / 2,) * 2, []), EFFORT)
    assert found.rounds == rounds
