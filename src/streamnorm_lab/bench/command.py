"""``streamnorm bench``: time and memory beside torch.nn's own layers."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.progress import track
from tyro import conf

import streamnorm as sn
from streamnorm_lab.bench.cases import SUITES, all_cases
from streamnorm_lab.bench.cuda import bench_cuda
from streamnorm_lab.bench.cuda_cases import SUITES as CUDA_SUITES
from streamnorm_lab.bench.figures import save_figure
from streamnorm_lab.bench.fresh import keep_freed_memory, measure
from streamnorm_lab.bench.inference import missing_libraries
from streamnorm_lab.bench.results import MemoryRow, Results, TimeRow
from streamnorm_lab.bench.tables import print_results, save_results
from streamnorm_lab.bench.timing import Effort
from streamnorm_lab.common.environment import environment, usable_cores
from streamnorm_lab.common.errors import UserError, unknown
from streamnorm_lab.common.files import locked, output_folder, typed_path, write_text

FULL = Effort(seconds=0.25, rounds=3)
PROCESSES = 3
"""So many one after the other for each case; ``--quick`` makes do with one."""

QUICK = Effort(seconds=0.04, rounds=3, warm_up=0.01)
WIDTH = 144
"""Columns of the tables where no terminal says how wide it is."""


@dataclass(frozen=True)
class BenchOptions:
    """Measure time and memory of the layers beside torch.nn's own, in turns.

    Takes about twelve minutes on two cores; leave the machine alone meanwhile.
    """

    out: Annotated[str | None, conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder for tables and figure. Default: runs/bench, with -cuda and -quick added by these options."""

    quick: bool = False
    """A few cases, measured briefly: to see that it works, not for figures to report. Takes half a minute."""

    only: Annotated[tuple[str, ...], conf.arg(metavar="SUITE ...")] = SUITES
    """Suites to measure; on a GPU there are two of them, layers and recurrent."""

    threads: Annotated[tuple[int, ...], conf.arg(metavar="INT ...", help_behavior_hint="")] = ()
    """Numbers of PyTorch threads. Default: 1 and 2, as far as there are cores."""

    keep_memory: bool = False
    """Keep freed memory in the process, as allocators other than the system's do: large tensors then lie in memory that
    is already there. The default folder ends in -kept. For Linux with glibc."""

    device: str = "cpu"
    """Device to measure on: cpu, or cuda for an NVIDIA GPU."""

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            UserError: naming the option and what to write instead.
        """
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"--device {self.device}: choose cpu or cuda")
        suites = CUDA_SUITES if self.device == "cuda" and self.only != SUITES else SUITES
        if not self.only:
            raise UserError(f"--only: name at least one of {', '.join(suites)}")
        for suite in self.only:
            if suite not in suites:
                raise UserError(f"--only: {unknown('suite', suite, suites)}")
        if self.keep_memory and not _can_keep_memory():
            raise UserError("--keep-memory: only glibc's allocator can be told to; leave the option out")
        for count in self.threads:
            if not 1 <= count <= usable_cores():
                raise UserError(f"--threads {count}: choose from 1 to {usable_cores()}, the cores usable here")

    def thread_counts(self) -> list[int]:
        """The numbers of threads to measure with."""
        return sorted(set(self.threads or range(1, min(2, usable_cores()) + 1)))

    def folder(self) -> Path:
        """The output folder."""
        name = "bench" + "-cuda" * (self.device == "cuda") + "-quick" * self.quick + "-kept" * self.keep_memory
        return typed_path(self.out or f"runs/{name}")


def bench(words: Sequence[str]) -> int:
    """``streamnorm bench``."""
    options = tyro.cli(BenchOptions, args=list(words), prog="streamnorm bench", config=(conf.FlagCreatePairsOff,))
    options.check()
    folder = options.folder()
    if options.device == "cuda":
        if options.keep_memory:
            keep_freed_memory()
        return bench_cuda(folder, options.quick, options.only)
    output_folder(folder)
    with locked(folder):
        before = machine_load()
        warn_if_busy(Console(stderr=True), before, 0)
        if "inference" in options.only and (missing := missing_libraries()):
            _warn(Console(stderr=True), f"Inference is measured in PyTorch alone: {missing[0]} is not installed.")
        results = _measure(options)
        results.environment.update(load_before=before, load_after=machine_load(), options=asdict(options))
        results.environment.update(engines=sn.engines(), torch_instructions=torch.backends.cpu.get_cpu_capability())
        save_results(results, folder)
        save_figure(results, folder)
        write_text(folder / "environment.json", json.dumps(results.environment, indent=2) + "\n")
        console = _console()
        _show(results, options, console)
        write_text(folder / "tables.txt", console.export_text())
    console.print(f"\nTables and figure: [bold]{folder}[/]", highlight=False, soft_wrap=True)
    return 0


def _measure(options: BenchOptions) -> Results:
    """Run every case on every number of threads."""
    times: list[TimeRow] = []
    memory: list[MemoryRow] = []
    effort, processes = (QUICK, 1) if options.quick else (FULL, PROCESSES)
    cases = [case for case in all_cases() if case.suite in options.only and (case.quick or not options.quick)]
    for case in track(cases, "measuring", console=Console(stderr=True), transient=True):
        of_time, of_memory = measure(case, options.thread_counts(), effort, processes, options.keep_memory)
        times += of_time
        memory += of_memory
    return Results(times, memory, dict(environment()))


def _can_keep_memory() -> bool:
    return platform.libc_ver()[0] == "glibc"


def machine_load() -> float | None:
    """The load average of the last minute, or None where the system does not provide it."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _busy(load: float | None, own: int) -> str | None:
    """A warning where others than our own threads keep the machine busy."""
    if load is None or load - own <= 0.5:
        return None
    share = f", of which this command had at most {own}" if own else " before the start"
    return (
        f"The machine is busy: a load average of {load:g}{share}. Such figures are not to be relied on: measure again "
        "when nothing else runs."
    )


def warn_if_busy(console: Console, load: float | None, own: int) -> None:
    """Say it where others keep the machine busy, of a load average to which our own threads contributed ``own``."""
    _warn(console, _busy(load, own))


def _warn(console: Console, warning: str | None) -> None:
    if warning:
        console.print(f"[yellow]! {warning}", highlight=False)


def _console() -> Console:
    terminal = Console(record=True)
    return terminal if terminal.is_terminal else Console(record=True, width=WIDTH)


def _show(results: Results, options: BenchOptions, console: Console) -> None:
    """Everything that was measured, and what keeps it from being relied on."""
    print_results(results, console)
    facts = results.environment
    console.print(
        f"\n{facts['processor']}, torch {facts['torch']}, Python {facts['python']}, engine {facts['engine']}, load "
        f"average {facts['load_before']} before and {facts['load_after']} after",
        highlight=False,
    )
    before, after = facts["load_before"], facts["load_after"]
    assert isinstance(before, float | None)
    assert isinstance(after, float | None)
    _warn(console, _busy(before, 0) or _busy(after, max(options.thread_counts())))
    if options.quick:
        _warn(console, "--quick measures too briefly for figures to report.")
    if facts["engine"] != "native":
        _warn(console, f"The C++ engine did not run: {facts['engine']} did; `streamnorm info` says why.")
