"""The paper's table 1 as a page, as CSV, and on the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from streamnorm_lab.analysis.results import Results
from streamnorm_lab.analysis.table1 import CRITERION, Judged, judge, read_table
from streamnorm_lab.common.files import write_text
from streamnorm_lab.experiments.table1 import TECHNIQUES, Scenario, Table1
from streamnorm_lab.reports.page import document, html_table
from streamnorm_lab.reports.report import REPORT
from streamnorm_lab.reports.tables import score_text

Judgements = dict[Scenario, dict[str, Judged]]
_CLASS = {"works": "ahead", "suboptimal": "", "fails": "behind"}


def build_table(folder: Path) -> Judgements:
    """Rebuild the page and ``table1.csv`` from the logs.

    Raises:
        UserError: a part has no results.
    """
    judgements = judge(folder)
    write_text(folder / "table1.csv", _csv(judgements))
    config = read_table(folder)
    write_text(folder / REPORT, page(judgements, config["parts"], config["commands"]))
    return judgements


def summary(judgements: Judgements) -> str:
    """The share of cells that agree with the paper; its "limited" counts as met by a technique that works."""
    met = [
        agrees(judged, claimed(scenario, name)) for scenario, row in judgements.items() for name, judged in row.items()
    ]
    held = sum(row["streaming-l1"].verdict == "works" for row in judgements.values())
    return (
        f"{sum(met)} of {len(met)} cells are as in the paper. "
        f"Streaming L1 works in {held} of {len(judgements)} scenarios."
    )


def claimed(scenario: Scenario, technique: str) -> str:
    """The paper's judgement."""
    return scenario.paper[list(TECHNIQUES).index(technique)]


def agrees(judged: Judged, claim: str) -> bool:
    """True if a cell agrees with the paper."""
    return judged.verdict == ("works" if claim == "limited" else claim)


def page(judgements: Judgements, parts: Mapping[str, str], commands: list[str]) -> str:
    """The table, the criterion, and where each part is."""
    rows = (
        [f"{scenario.label}<small>{scenario.experiment} {scenario.setting}</small>"]
        + [_html(judged, claimed(scenario, name)) for name, judged in row.items()]
        for scenario, row in judgements.items()
    )
    results = {scenario.experiment: next(iter(row.values())).results for scenario, row in judgements.items()}
    items = "\n".join(_part(results[name], f"{place}/{REPORT}") for name, place in parts.items())
    return document(
        Table1.title,
        [
            f"<h1>{Table1.title}</h1>",
            f'<p class="headline">{summary(judgements)}</p>',
            '<p class="lead">streamnorm experiment <b>table1</b> · the paper\'s table 1</p>',
            f"<p>{CRITERION} Smaller: test accuracy or loss with its 95% interval, the share of the best gain, and the "
            "paper's own judgement.</p>",
            html_table(["Scenario", *TECHNIQUES.values()], rows),
            "<p>Without time steps, time-specific Batch Normalization is Batch Normalization, and the same runs stand "
            "for both. The text's losses are in nats per character.</p>",
            f"<h2>The parts</h2>\n<ul>\n{items}\n</ul>",
            f"<h2>Do it again</h2>\n<pre>{escape(chr(10).join(commands))}</pre>",
        ],
    )


def _part(results: Results, page: str) -> str:
    experiment = results.experiment
    return f'<li><a href="{escape(page)}">{experiment.name}</a>. {escape(results.protocol[0])}</li>'


def _html(judged: Judged, claim: str) -> str:
    share = "" if judged.share is None else f" · {judged.share:.2f}"
    reason = f' title="{escape(judged.cell.reason)}"' if judged.cell.reason else ""
    mark = "" if agrees(judged, claim) else " ≠"
    return (
        f'<b{reason} class="{_CLASS[judged.verdict]}">{judged.verdict}</b>'
        f"<small>{score_text(judged.results.experiment.score, judged.cell)}{share}; paper: {claim}{mark}</small>"
    )


def print_table(judgements: Judgements, console: Console) -> None:
    """The verdicts on the terminal; a star where the paper has another one."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for label in ("scenario", *TECHNIQUES.values()):
        table.add_column(label)
    for scenario, row in judgements.items():
        words = (j.verdict + ("" if agrees(j, claimed(scenario, name)) else " *") for name, j in row.items())
        table.add_row(scenario.label, *words)
    console.print(table)
    console.print(f"* the paper judges otherwise\n{CRITERION}\n{summary(judgements)}", highlight=False)


def _csv(judgements: Judgements) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["scenario", "technique", "experiment", "setting", "verdict", "paper", "share_of_best_gain", "score"]
    )
    for scenario, row in judgements.items():
        for name, judged in row.items():
            score = None if judged.cell.mean is None else judged.cell.mean.mean
            where = [scenario.label, name, scenario.experiment, scenario.setting]
            writer.writerow([*where, judged.verdict, claimed(scenario, name), judged.share, score])
    return text.getvalue()
