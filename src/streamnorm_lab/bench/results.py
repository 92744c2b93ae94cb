"""Measurements as rows, and what they say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from streamnorm_lab.bench.cases import Case, Match
from streamnorm_lab.bench.memory import Memory
from streamnorm_lab.bench.targets import MEMORY_TARGETS, RIVAL_TARGETS, TIME_TARGETS
from streamnorm_lab.bench.timing import TOGETHER, Comparison


@dataclass(frozen=True)
class TimeRow:
    """One part of one comparison: the ratio of times, and the seconds of a step (medians and quartiles)."""

    suite: str
    case: str
    threads: int
    ours: str
    rival: str
    part: str
    ratio: float
    ratio_q1: float
    ratio_q3: float
    ours_seconds: float
    rival_seconds: float
    rounds: int
    stock: bool
    target: float | None
    met: bool | None


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one contestant's step, and their ratios to the stock layer's."""

    suite: str
    case: str
    contestant: str
    saved_bytes: int
    peak_bytes: int
    saved_ratio: float | None
    peak_ratio: float | None
    target: float | None
    met: bool | None


@dataclass(frozen=True)
class Results:
    """Everything that one command measured."""

    times: list[TimeRow]
    memory: list[MemoryRow]
    environment: dict[str, object]


class Pairing(NamedTuple):
    """Two contestants timed in turns; ``stock`` where the rival is the layer that users would have taken."""

    threads: int
    ours: str
    rival: str
    stock: bool

    @classmethod
    def of(cls, match: Match, threads: int) -> Pairing:
        """The names of a match."""
        return cls(threads, match.ours.name, match.rival.name, match.stock)


def time_rows(case: Case, pairing: Pairing, comparison: Comparison) -> Iterator[TimeRow]:
    """A row for each part of the step."""
    for part, ratio in comparison.ratio.items():
        target = _target(case, pairing) if part == TOGETHER else None
        yield TimeRow(
            case.suite,
            case.name,
            pairing.threads,
            pairing.ours,
            pairing.rival,
            part,
            ratio.median,
            ratio.low,
            ratio.high,
            comparison.ours[part].median,
            comparison.rival[part].median,
            comparison.rounds,
            pairing.stock,
            target,
            None if target is None else ratio.median <= target,
        )


def _target(case: Case, pairing: Pairing) -> float | None:
    if pairing.stock:
        return TIME_TARGETS.get((case.suite, case.name, pairing.threads))
    return RIVAL_TARGETS.get((case.suite, pairing.rival))


def memory_rows(case: Case, found: dict[str, Memory], stock: str) -> Iterator[MemoryRow]:
    """A row for each contestant; ratios to the one named ``stock``."""
    for name, memory in found.items():
        saved, peak = memory.saved / found[stock].saved, memory.peak / found[stock].peak
        target = MEMORY_TARGETS.get(case.suite) if name.startswith("sn.") else None
        met = None if target is None else max(saved, peak) <= target
        yield MemoryRow(case.suite, case.name, name, memory.saved, memory.peak, saved, peak, target, met)


def together(rows: Iterable[TimeRow]) -> list[TimeRow]:
    """The rows of whole steps."""
    return [row for row in rows if row.part == TOGETHER]


def targets_line(results: Results) -> str:
    """The number of targets met, and the missed ones."""
    rows: list[TimeRow | MemoryRow] = [*results.times, *results.memory]
    aimed = [row for row in rows if row.target is not None]
    if not aimed:
        return "No target belongs to what was measured."
    missed = [_miss(row) for row in aimed if not row.met]
    text = f"{len(aimed) - len(missed)} of {len(aimed)} targets met"
    return f"{text}." if not missed else f"{text}; missed: {'; '.join(missed)}."


def _miss(row: TimeRow | MemoryRow) -> str:
    if isinstance(row, MemoryRow):
        return f"memory of {row.contestant}, {row.case}: {row.saved_ratio:.2f} saved, {row.peak_ratio:.2f} peak"
    threads = f"{row.threads} thread{'s' * (row.threads > 1)}"
    against = "" if row.stock else f" against {row.rival}"
    return f"{row.ours}{against}, {row.case}, {threads}: {row.ratio:.2f} for {row.target:g}"


def l1_verdict(results: Results) -> str | None:
    """A verdict on the paper's claim that L1 is faster than L2, from the cases where both were timed in turns."""
    rows = [row for row in together(results.times) if row.ours.endswith(" L1") and row.rival.endswith(" L2")]
    if not rows:
        return None
    faster = sum(row.ratio_q3 < 1 for row in rows)
    slower = sum(row.ratio_q1 > 1 for row in rows)
    mean = math.exp(sum(math.log(row.ratio) for row in rows) / len(rows))
    low, high = min(row.ratio for row in rows), max(row.ratio for row in rows)
    verdict = "holds" if faster > len(rows) / 2 else "does not hold" if faster <= slower else "holds in part"
    return (
        f"“L1 is faster than L2” {verdict} here: of {len(rows)} comparisons L1 is faster in {faster}, slower in "
        f"{slower}, and in {len(rows) - faster - slower} the quartiles of the ratio include 1. Time of L1 to that of "
        f"L2: {mean:.3f} in the geometric mean, {low:.2f} to {high:.2f}."
    )


def bandwidth(results: Results) -> dict[tuple[str, int], float]:
    """Bytes per second that the copies of the floor moved, by case and threads."""
    return {
        (row.case, row.threads): copied_bytes(row.case) / row.rival_seconds
        for row in results.times
        if row.rival == "floor" and row.part == "forward" and row.suite == "layers"
    }


def copied_bytes(case: str) -> int:
    """Bytes read and written by one copy of a float32 tensor of the shape that a case is named by."""
    shape = case[1 : case.index(")")].split(",")
    return 8 * math.prod(int(size) for size in shape)
