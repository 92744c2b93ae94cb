"""Results as a table on the terminal and as CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from streamnorm_lab.analysis.results import Cell, Results
from streamnorm_lab.common.files import write_text
from streamnorm_lab.common.score import Score
from streamnorm_lab.common.stats import Interval
from streamnorm_lab.logs.runlog import LoggedRun, Record

Row = dict[str, Any]


def print_tables(results: Results, console: Console) -> None:
    """Print scores by method and setting, and the paired differences that the verdict is about."""
    score, words = results.experiment.score, results.experiment.words
    scores = _table(results, words.table_title, "method")
    for method in results.methods:
        cells = (results.cells[method.name, setting] for setting in results.settings)
        scores.add_row(method.label, *(score_text(score, cell) for cell in cells))
    console.print(scores, "", highlight=False)
    differences = _table(results, words.difference_title, "pair")
    for ours, theirs in results.experiment.comparisons:
        if {ours, theirs} <= {method.name for method in results.methods}:
            found = (results.difference(ours, theirs, setting) for setting in results.settings)
            pair = f"{results.method(ours).label}\n− {results.method(theirs).label}"
            differences.add_row(pair, *(difference_text(score, difference) for difference in found))
    if differences.row_count:
        console.print(differences, "", highlight=False)
    if results.setting_pairs:
        console.print(_changes(results), "", highlight=False)


def _changes(results: Results) -> Table:
    """Each method at one setting, beside itself at another."""
    columns = [f"{left.label}\n− {right.label}" for left, right in results.setting_pairs]
    table = _table(results, results.experiment.words.difference_title, "method", columns)
    for method in results.methods:
        found = (results.change(method.name, *pair) for pair in results.setting_pairs)
        table.add_row(method.label, *(difference_text(results.experiment.score, change) for change in found))
    return table


def _table(results: Results, title: str, first: str, columns: Iterable[str] | None = None) -> Table:
    table = Table(
        title=f"{title}, {results.spread}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column(first, overflow="fold")
    for column in columns or [setting.label for setting in results.settings]:
        table.add_column(column, justify="right")
    return table


def score_text(score: Score, cell: Cell) -> str:
    """The mean score of a cell with its interval, or why there is none."""
    if cell.mean is None:
        return "fails" if cell.reason else "–"
    return f"{score.number(cell.mean.mean)}{_spread(score, cell.mean)}"


def difference_text(score: Score, difference: Interval | None) -> str:
    """A mean difference with its interval; a dash if there is none."""
    return "–" if difference is None else f"{score.difference(difference.mean)}{_spread(score, difference)}"


def _spread(score: Score, mean: Interval) -> str:
    return f" ± {score.number(mean.half)}" if mean.known else ""


def save_tables(results: Results, folder: Path) -> None:
    """Write ``results.csv``, a line per method and setting, ``runs.csv``, a line per finished run, and a section."""
    write_text(folder / "results.csv", as_csv(result_rows(results)))
    write_text(folder / "runs.csv", as_csv([row for run in results.logs for row in _run_rows(results, run)]))
    section = results.section
    if section is not None:
        rows = [dict(zip(section.head, row, strict=True)) for row in section.rows]
        write_text(folder / f"{section.name}.csv", as_csv(rows, section.head))


def result_rows(results: Results) -> list[Row]:
    """The lines of ``results.csv``."""
    return [_result_row(results, cell) for cell in results.cells.values()]


def _run_rows(results: Results, run: LoggedRun) -> Iterator[Row]:
    """One row for each way in which a finished run was evaluated."""
    if run.end is None:
        return
    unknown: dict[str, Record] = {run.run["method"]: {}}
    for evaluated_as, scores in run.end.get("scores", unknown).items():
        yield {
            **run.run,
            "evaluated_as": evaluated_as,
            **{name: run.end[name] for name in ("status", "updates", results.experiment.kind.unit, "seconds")},
            **{name: scores.get(name) for name in ("loss", "accuracy", results.experiment.score.key)},
        }


def _result_row(results: Results, cell: Cell) -> Row:
    reference = results.experiment.reference
    score, half = _numbers(cell.mean)
    train_loss, _ = _numbers(cell.train_loss)
    difference, difference_half = _numbers(results.difference(cell.method.name, reference, cell.setting))
    return {
        "method": cell.method.name,
        "setting": cell.setting,
        "samples_per_batch": cell.setting.samples,
        "batches_per_update": cell.setting.batches,
        "status": "done" if cell.scores else "fails" if cell.reason else "missing",
        "rate": cell.rate,
        "largest_rate": results.largest_rate(cell),
        "seeds": len(cell.scores),
        results.experiment.score.key: score,
        "half_interval": half,
        f"difference_to_{reference}": difference,
        "difference_half_interval": difference_half,
        **results.experiment.words.columns(score, train_loss),
        "diverged": cell.diverged,
        "reason": cell.reason,
    }


def _numbers(mean: Interval | None) -> tuple[float | None, float | None]:
    """Mean and half interval, empty where unknown."""
    if mean is None:
        return None, None
    return mean.mean, mean.half if mean.known else None


def as_csv(rows: Sequence[Row], head: Sequence[str] = ()) -> str:
    """Rows as CSV, with the columns of the first one unless ``head`` names them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, head or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
