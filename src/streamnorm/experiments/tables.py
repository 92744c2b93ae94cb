"""Results as a table on the terminal and as CSV files."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from rich.console import Console
from rich.table import Table

from streamnorm.experiments.files import write_text
from streamnorm.experiments.methods import METHODS
from streamnorm.experiments.results import Cell, Results
from streamnorm.experiments.verdict import percent, points


def print_table(results: Results, console: Console) -> None:
    """Print accuracies by method and setting, with the paired difference to the reference below each."""
    reference = METHODS[results.experiment.reference]
    table = Table(title="Test accuracy, mean ± 95% interval; below it the paired difference to " + reference.label)
    table.add_column("method", no_wrap=True)
    for setting in results.settings:
        table.add_column(setting.label, justify="right", no_wrap=True)
    for method in results.methods:
        cells = (results.cells[method.name, setting] for setting in results.settings)
        table.add_row(method.label, *(f"{accuracy_text(cell)}\n{difference_text(results, cell)}" for cell in cells))
    console.print(table, highlight=False)


def accuracy_text(cell: Cell) -> str:
    """The mean accuracy of a cell with its interval, or why there is none."""
    if cell.mean is None:
        return "fails" if cell.reason else "–"
    spread = f" ± {100 * cell.mean.half:.1f}" if cell.mean.known else ""
    return percent(cell.mean.mean) + spread


def difference_text(results: Results, cell: Cell) -> str:
    """The mean paired difference to the reference with its interval; empty for the reference itself."""
    difference = results.difference(cell.method.name, results.experiment.reference, cell.setting)
    if difference is None or cell.method.name == results.experiment.reference:
        return ""
    spread = f" ± {100 * difference.half:.1f}" if difference.known else ""
    return points(difference.mean) + spread


def save_tables(results: Results, folder: Path) -> None:
    """Write ``results.csv``, a line per method and setting, and ``runs.csv``, a line per finished run."""
    header = "method setting samples_per_batch batches_per_update status rate seeds accuracy half_interval".split()
    header += ["difference", "difference_half_interval", "diverged", "reason"]
    rows = [_result_row(results, cell) for cell in results.cells.values()]
    write_text(folder / "results.csv", _csv(header, rows))
    keys = "stage method setting rate seed".split()
    outcomes = "status updates images seconds".split()
    lines = [
        [*(run.run[key] for key in keys), row, *(run.end.get(key) for key in outcomes), scores["loss"], scores["accuracy"]]
        for run in results.logs
        if run.end is not None
        for row, scores in run.end.get("scores", {run.run["method"]: {"loss": None, "accuracy": None}}).items()
    ]
    write_text(folder / "runs.csv", _csv([*keys, "evaluated_as", *outcomes, "loss", "accuracy"], lines))


def _result_row(results: Results, cell: Cell) -> list[object]:
    difference = results.difference(cell.method.name, results.experiment.reference, cell.setting)
    mean = cell.mean
    return [
        cell.method.name,
        cell.setting,
        cell.setting.samples,
        cell.setting.batches,
        "done" if mean else "fails" if cell.reason else "missing",
        cell.rate,
        len(cell.accuracy),
        mean and mean.mean,
        mean and mean.known and mean.half or None,
        difference and difference.mean,
        difference and difference.known and difference.half or None,
        cell.diverged,
        cell.reason,
    ]


def _csv(header: list[str], rows: list[list[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
