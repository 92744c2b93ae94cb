"""Each case in processes of its own, whose rounds are put together.

What earlier cases leave behind in the heap decides how warm the memory of an output is, and whether the system has to
provide fresh pages. One process after the other shows several such states; the median over all is not one of them by
chance.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from typing import NamedTuple

import torch

from streamnorm_lab.bench.cases import Case
from streamnorm_lab.bench.contestants import Contestant
from streamnorm_lab.bench.memory import Memory, measure_memory
from streamnorm_lab.bench.results import MemoryRow, Pairing, TimeRow, memory_rows, time_rows
from streamnorm_lab.bench.timing import Comparison, Effort, Rounds, compare


class Measured(NamedTuple):
    """The measurements of one process: the rounds of each pair, and the memory of each contestant."""

    rounds: dict[Pairing, Rounds]
    memory: dict[str, Memory]


def measure(
    case: Case, thread_counts: list[int], effort: Effort, processes: int, keep_memory: bool
) -> tuple[list[TimeRow], list[MemoryRow]]:
    """The rows of a case, measured in so many processes."""
    parts = [in_fresh_process(case, thread_counts, effort, keep_memory) for _ in range(processes)]
    times: list[TimeRow] = []
    for pairing in parts[0].rounds:
        together = Rounds([], [])
        for part in parts:
            together.ours.extend(part.rounds[pairing].ours)
            together.rival.extend(part.rounds[pairing].rival)
        times += time_rows(case, pairing, Comparison.of(together))
    stock = [pairing.rival for pairing in parts[0].rounds if pairing.stock]
    return times, list(memory_rows(case, parts[0].memory, stock[0])) if stock else []


def in_fresh_process(case: Case, thread_counts: list[int], effort: Effort, keep_memory: bool) -> Measured:
    """``measure_here``, where nothing ran before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_here, (case, thread_counts, effort, keep_memory))


def measure_here(case: Case, thread_counts: list[int], effort: Effort, keep_memory: bool) -> Measured:
    """Time every match of a case on every number of threads, then look at memory."""
    if keep_memory:
        keep_freed_memory()
    torch.manual_seed(0)
    matches = case.make()
    rounds: dict[Pairing, Rounds] = {}
    for threads in thread_counts:
        torch.set_num_threads(threads)
        for match in matches:
            rounds[Pairing.of(match, threads)] = compare(match.ours, match.rival, effort)
    torch.set_num_threads(1)
    contestants: dict[str, Contestant] = {}
    for match in matches if any(match.stock for match in matches) else ():
        contestants |= {contestant.name: contestant for contestant in (match.ours, match.rival)}
    return Measured(rounds, {name: measure_memory(one) for name, one in contestants.items() if one.has_memory})


def keep_freed_memory() -> None:
    """Tell glibc to take no block of memory straight from the system, and to give none back."""
    libc = ctypes.CDLL(None)
    most_blocks, slack_at_the_end = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    libc.mallopt(most_blocks, 0)
    libc.mallopt(slack_at_the_end, 2**31 - 1)
