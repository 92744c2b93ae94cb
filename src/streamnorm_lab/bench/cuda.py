"""``streamnorm bench --device cuda``: times beside torch.nn's layers, bandwidth, and the distance to the floor."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import streamnorm as sn
from streamnorm_lab.bench.cuda_cases import SUITES, CudaCase, Steps, cuda_cases
from streamnorm_lab.bench.cuda_timing import CudaDevice, Device, Effort, copy_speed, ratio, time_in_turns
from streamnorm_lab.common.environment import environment, usable_cores
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.files import locked, output_folder, replacing, write_text

QUICK = Effort(block=0.002, rounds=5, warm_up=0.01)
COPY_ELEMENTS = 1 << 28
"""A copy of 1 GiB in float32: what it reaches is what memory can do."""

COLOURS = {
    "streaming L1": "#0072b2",
    "streaming L2": "#d55e00",
    "one-pass L1": "#009e73",
    "sn.GRU streaming": "#0072b2",
}


@dataclass(frozen=True)
class CudaRow:
    """One contestant beside a rival: seconds of a step and their ratio, in medians (and quartiles) of the rounds.

    ``way`` is "device" (a replayed graph) or "eager" (with the host), ``part`` "forward" or "together". ``bandwidth``
    counts only the bytes that no layer can avoid; ``floor`` is the ratio to the time of a copy that moves as many.
    ``failure`` says why there is no time.
    """

    suite: str
    case: str
    way: str
    part: str
    ours: str
    rival: str
    seconds: float | None = None
    rival_seconds: float | None = None
    ratio: float | None = None
    ratio_q1: float | None = None
    ratio_q3: float | None = None
    target: float | None = None
    bandwidth: float | None = None
    floor: float | None = None
    floor_target: float | None = None
    failure: str = ""


def bench_cuda(folder: Path, quick: bool, suites: Sequence[str] = SUITES) -> int:
    """Measure on the current CUDA device, and write ``times.csv``, ``tables.txt``, the figure and the environment.

    Raises:
        UserError: where PyTorch has no CUDA device.
    """
    refuse_without_cuda()
    output_folder(folder)
    with locked(folder):
        device = CudaDevice()
        effort = QUICK if quick else Effort()
        speed = copy_speed(device, torch.randn(COPY_ELEMENTS, device="cuda"), effort)
        cases = [case for case in cuda_cases() if case.suite in suites and (case.quick or not quick)]
        compile_ahead(cases)
        rows: list[CudaRow] = []
        for case in track(cases, "measuring", console=Console(stderr=True), transient=True):
            rows += measure(case, device, effort, speed, torch.device("cuda"))
            write_text(folder / "times.csv", as_csv(rows))  # an interrupted run leaves what it has
            torch.cuda.empty_cache()
        save(rows, folder, {**facts(), "copy_bytes_per_second": speed, "quick": quick})
    return 0


def refuse_without_cuda() -> None:
    """Say what is missing, before anything is measured.

    Raises:
        UserError: where PyTorch has no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UserError(
            f"--device cuda: PyTorch {torch.__version__} finds no CUDA device; leave the option out to measure the "
            "CPU, or run `streamnorm info` on the machine with the GPU"
        )


def compile_ahead(cases: Sequence[CudaCase]) -> None:
    """Run our layers once in other processes, side by side: compiled kernels stay in Triton's cache on disk."""
    layers = [case for case in cases if case.suite == "layers"]
    workers = ProcessPoolExecutor(min(8, usable_cores()), multiprocessing.get_context("spawn"))
    with suppress(BrokenProcessPool), workers as pool:  # it only saves time
        list(pool.map(_run_once, layers))


def _run_once(case: CudaCase) -> None:
    for name, build in case.make(torch.device("cuda")).items():
        if name.startswith(("streaming", "one-pass")):
            with suppress(Exception):  # what does not run is told where it is measured
                build().together[0]()


def facts() -> dict[str, Any]:
    """The environment that the figures depend on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        **environment(),
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "cache_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "engines": sn.engines(),
    }


def measure(case: CudaCase, device: Device, effort: Effort, speed: float, where: torch.device) -> list[CudaRow]:
    """Every row of a case. A contestant that cannot run leaves a row with the reason."""
    torch.manual_seed(0)
    rows: list[CudaRow] = []
    steps: dict[str, Steps] = {}
    for name, build in case.make(where).items():
        try:
            steps[name] = build()
            for step in steps[name].together:
                step()
        except Exception as error:  # the others are still worth measuring
            steps.pop(name, None)
            rows.append(_failed(case, "eager", "together", name, error))
    for part in ("forward", "together"):
        eager = {name: _in_turn(getattr(found, part)) for name, found in steps.items()}
        rows += _rows(case, "eager", part, eager, dict.fromkeys(eager, 1), device, effort, speed)
        graphs: dict[str, Any] = {}
        for name, found in steps.items():
            if found.needs_host:
                continue
            try:
                graphs[name] = device.captured(getattr(found, part))
            except Exception as error:
                rows.append(_failed(case, "device", part, name, error))
        inputs = {name: len(steps[name].together) for name in graphs}
        rows += _rows(case, "device", part, graphs, inputs, device, effort, speed)
        del graphs
    return rows


def _in_turn(steps: list[Any]) -> Any:
    """A call that makes the next of these steps."""
    turn = 0

    def call() -> None:
        nonlocal turn
        steps[turn % len(steps)]()
        turn += 1

    return call


def _failed(case: CudaCase, way: str, part: str, name: str, error: Exception) -> CudaRow:
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return CudaRow(case.suite, case.name, way, part, name, case.stock, failure=words[:300])


def _rows(
    case: CudaCase,
    way: str,
    part: str,
    calls: dict[str, Any],
    inputs: dict[str, int],
    device: Device,
    effort: Effort,
    speed: float,
) -> Iterable[CudaRow]:
    """Time the contestants in turns; each is compared with the stock layer and with those that targets name."""
    times = {name: [t / inputs[name] for t in found] for name, found in time_in_turns(calls, device, effort).items()}
    medians = {name: float(np.median(found)) for name, found in times.items()}
    least = case.least_bytes if part == "together" or case.least_bytes is None else case.least_bytes * 2 // 5
    aimed = way == "device" and part == "together"
    for name in times:
        rivals = [case.stock, *(rival for ours, rival in case.targets if ours == name and rival != case.stock)]
        for rival in [one for one in rivals if one in times]:
            found = ratio(times[name], times[rival])
            floor = None if least is None or way == "eager" else medians[name] * speed / least
            yield CudaRow(
                case.suite,
                case.name,
                way,
                part,
                name,
                rival,
                medians[name],
                medians[rival],
                found.median,
                found.low,
                found.high,
                case.targets.get((name, rival)) if aimed or rival != case.stock else None,
                None if least is None else least / medians[name],
                floor,
                case.floor_target if aimed and name.startswith("streaming") else None,
            )


def verdict(rows: list[CudaRow]) -> str:
    """The number of targets met, and the missed ones."""
    aims = []
    for row in rows:
        for value, target, words in ((row.ratio, row.target, row.rival), (row.floor, row.floor_target, "the floor")):
            if value is not None and target is not None and row.part == "together":
                aims.append((value <= target, f"{row.ours}, {row.case}, {value:.2f} of {words} for {target:g}"))
    if not aims:
        return "No target belongs to what was measured."
    missed = [words for met, words in aims if not met]
    text = f"{len(aims) - len(missed)} of {len(aims)} targets met"
    return f"{text}; missed: {'; '.join(missed)}." if missed else f"{text}."


def save(rows: list[CudaRow], folder: Path, about: dict[str, Any]) -> None:
    """Write and show everything."""
    write_text(folder / "times.csv", as_csv(rows))
    write_text(folder / "environment.json", json.dumps(about, indent=2, default=str) + "\n")
    console = Console(record=True, width=150)
    for way in ("device", "eager"):
        console.print(_table(rows, way), "")
    for row in rows:
        if row.failure:
            console.print(f"! {row.ours}, {row.case}, {row.way} {row.part}: {row.failure}", highlight=False)
    console.print(f"copy: {about['copy_bytes_per_second'] / 1e9:,.0f} GB/s read and written", highlight=False)
    console.print(f"• {verdict(rows)}", highlight=False)
    write_text(folder / "tables.txt", console.export_text())
    drawn = figure(rows)
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        with replacing(folder / f"ratios.{suffix}") as temporary:
            drawn.savefig(temporary, format=suffix, dpi=160, metadata=metadata)


def as_csv(rows: list[CudaRow]) -> str:
    """A line per row, numbers with six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(CudaRow)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = asdict(row).items()
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values})
    return text.getvalue()


def _table(rows: list[CudaRow], way: str) -> Table:
    words = {"device": "Device time (graphs)", "eager": "Eager time (host included)"}[way]
    table = Table(title=f"{words}, as ratio to others (below 1 is faster)", title_justify="left", box=None)
    for i, column in enumerate(("case", "layer", "against", "µs", "forward", "together", "target", "GB/s", "floor")):
        table.add_column(column, justify="left" if i < 3 else "right", no_wrap=True)
    forward = {(row.case, row.ours, row.rival): row for row in rows if row.way == way and row.part == "forward"}
    for row in rows:
        if row.way != way or row.part != "together" or row.seconds is None or row.ratio is None:
            continue
        first = forward.get((row.case, row.ours, row.rival))
        table.add_row(
            row.case,
            row.ours,
            row.rival,
            f"{1e6 * row.seconds:,.1f}",
            _number(first.ratio if first else None),
            f"{row.ratio:.2f} ({row.ratio_q1:.2f}–{row.ratio_q3:.2f})",
            _number(row.target),
            "" if row.bandwidth is None else f"{row.bandwidth / 1e9:,.0f}",
            _number(row.floor),
        )
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def figure(rows: list[CudaRow]) -> Figure:
    """Ratios of device time to the stock layer: a line per case, the tick is the target."""
    chosen = [row for row in rows if row.way == "device" and row.part == "together" and row.ours in COLOURS]
    chosen = [row for row in chosen if row.ratio is not None and row.rival in ("BatchNorm", "nn.GRU")]
    cases = list(dict.fromkeys(row.case for row in chosen))
    drawn = Figure(figsize=(7.5, 1.9 + 0.33 * len(cases)), layout="constrained")
    axes = drawn.subplots()
    axes.axvline(1, color="#888888", linewidth=1)
    shifts = {"streaming L1": -0.2, "streaming L2": 0.0, "one-pass L1": 0.2}
    labels: dict[str, Any] = {}
    for row in chosen:
        assert row.ratio is not None
        assert row.ratio_q1 is not None
        assert row.ratio_q3 is not None
        y = cases.index(row.case) + shifts.get(row.ours, 0.0)
        axes.plot([row.ratio_q1, row.ratio_q3], [y, y], color=COLOURS[row.ours], alpha=0.5, linewidth=2.2)
        (labels[row.ours],) = axes.plot([row.ratio], [y], "o", color=COLOURS[row.ours], markersize=5)
        if row.target is not None:
            axes.plot([row.target] * 2, [y - 0.1, y + 0.1], color="#222222", linewidth=1.6)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("device time of forward and backward, as ratio to the stock layer; tick: target")
    if labels:
        axes.legend(labels.values(), labels.keys(), frameon=False, loc="best")
    return drawn
