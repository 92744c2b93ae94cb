"""Results on the terminal and as CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from streamnorm_lab.bench.results import MemoryRow, Results, TimeRow, bandwidth, l1_verdict, targets_line, together
from streamnorm_lab.bench.timing import TOGETHER
from streamnorm_lab.common.files import write_text


def print_results(results: Results, console: Console) -> None:
    """Ratios to the stock layers with their targets, ratios to everything else, memory, and what they say."""
    tables = [_stock_table(results), _others_table(results), _memory_table(results)]
    for table in tables:
        if table.row_count:
            console.print(table, "", highlight=False)
    _print_bandwidth(results, console)
    for line in (targets_line(results), l1_verdict(results)):
        if line:
            console.print(f"• {line}", highlight=False)


def _table(title: str, columns: Sequence[str], texts: int) -> Table:
    """An empty table whose first ``texts`` columns are words and whose others are numbers."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < texts else "right", no_wrap=i >= texts)
    return table


def _stock_table(results: Results) -> Table:
    columns = (
        "case",
        "layer",
        "against",
        "threads",
        "µs/step",
        "forward",
        "backward",
        "together",
        "quartiles",
        "target",
    )
    table = _table("Time, as ratio to the stock layer (below 1 is faster)", columns, 3)
    parts: dict[tuple[object, ...], dict[str, TimeRow]] = {}
    for row in results.times:
        if row.stock:
            parts.setdefault(_key(row), {})[row.part] = row
    for found in parts.values():
        row = found[TOGETHER]
        table.add_row(
            _case(row),
            row.ours,
            row.rival,
            str(row.threads),
            f"{1e6 * row.ours_seconds:,.0f}",
            f"{found['forward'].ratio:.2f}",
            f"{found['backward'].ratio:.2f}",
            f"[bold]{row.ratio:.2f}[/]",
            f"{row.ratio_q1:.2f}–{row.ratio_q3:.2f}",
            _target(row),
        )
    return table


def _key(row: TimeRow) -> tuple[object, ...]:
    return row.suite, row.case, row.ours, row.rival, row.threads


def _case(row: TimeRow | MemoryRow) -> str:
    return f"{row.case} one-pass" if row.suite == "one-pass" else row.case


def _target(row: TimeRow | MemoryRow) -> str:
    if row.target is None:
        return ""
    return f"≤ {row.target:g} [green]met[/]" if row.met else f"≤ {row.target:g} [red]missed[/]"


def _others_table(results: Results) -> Table:
    rows = [row for row in together(results.times) if not row.stock]
    threads = sorted({row.threads for row in rows})
    heads = [f"{n} thread{'s' * (n > 1)}" for n in threads]
    title = "Time of the whole step, as ratio to others (the floor: bytes that must move, at the speed of a copy)"
    table = _table(title, ("case", "layer", "against", *heads), 3)
    found: dict[tuple[str, str, str], dict[int, TimeRow]] = {}
    for row in rows:
        found.setdefault((_case(row), row.ours, row.rival), {})[row.threads] = row
    for key, by_threads in found.items():
        table.add_row(*key, *(_ratio(by_threads[n]) for n in threads))
    return table


def _ratio(row: TimeRow) -> str:
    return f"{row.ratio:.2f} ({row.ratio_q1:.2f}–{row.ratio_q3:.2f}) {_target(row)}".rstrip()


def _memory_table(results: Results) -> Table:
    columns = ("case", "layer", "saved KiB", "ratio", "peak KiB", "ratio", "target")
    table = _table("Memory of a step: saved for the backward pass, and peak", columns, 2)
    for row in results.memory:
        table.add_row(
            _case(row),
            row.contestant,
            f"{row.saved_bytes / 1024:,.1f}",
            f"{row.saved_ratio:.2f}",
            f"{row.peak_bytes / 1024:,.1f}",
            f"{row.peak_ratio:.2f}",
            _target(row),
        )
    return table


def _print_bandwidth(results: Results, console: Console) -> None:
    for (case, threads), speed in bandwidth(results).items():
        console.print(f"copy, {case}, threads {threads}: {speed / 1e9:.1f} GB/s read and written", highlight=False)


def save_results(results: Results, folder: Path) -> None:
    """Write ``times.csv`` and, where memory was measured, ``memory.csv``, a line per row."""
    save_times(results, folder)
    if results.memory:
        write_text(folder / "memory.csv", as_csv([asdict(row) for row in results.memory]))


def save_times(results: Results, folder: Path) -> None:
    """Write ``times.csv``, a line per row."""
    write_text(folder / "times.csv", as_csv([asdict(row) for row in results.times]))


def as_csv(rows: Iterable[dict[str, object]]) -> str:
    """Numbers with six digits: more would be noise."""
    lines = [
        {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
