"""One self-contained HTML page: what was asked, what came out, how it was done, how to do it again."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.analysis.results import Cell, Results
from streamnorm_lab.analysis.verdict import sentences, warnings
from streamnorm_lab.common.files import write_text
from streamnorm_lab.common.stats import Interval
from streamnorm_lab.logs.runlog import LoggedRun
from streamnorm_lab.reports.figures import save_figures
from streamnorm_lab.reports.style import CSS
from streamnorm_lab.reports.tables import difference_text, save_tables, score_text

REPORT = "report.html"


def build_report(folder: Path) -> Results:
    """Rebuild figures, CSV files and the page from the logs in ``folder``.

    Raises:
        UserError: the folder holds no finished run, or a damaged log.
    """
    results = open_results(folder)
    drawings = save_figures(results, folder / "figures")
    save_tables(results, folder)
    write_text(folder / REPORT, page(results, drawings))
    return results


def page(results: Results, drawings: Mapping[str, str]) -> str:
    """The page's text; ``drawings`` are SVG texts by name."""
    experiment, words = results.experiment, results.experiment.words
    sections = (
        _opening(results),
        _verdict(results),
        figure(drawings["summary"], *words.summary(results.config)),
        "<h2>The numbers</h2>",
        _numbers(results),
        _pairs(results),
        _section(results),
        _changes(results),
        "<h2>Along the way</h2>",
        figure(drawings["curves"], *words.curves(results.config), wide=True),
        "<h2>Learning rates</h2>",
        _rates(results),
        figure(drawings["rates"], *words.rates(), wide=True),
        _samples(results),
        "<h2>How it was done</h2>",
        _protocol(results),
        "<h2>Where it ran</h2>",
        environments(results.logs),
        "<h2>Do it again</h2>",
        _commands(results),
    )
    return document(experiment.title, filter(None, sections))


def document(title: str, sections: Iterable[str]) -> str:
    """A page that needs no other file."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _opening(results: Results) -> str:
    experiment, data = results.experiment, results.config["data"]
    alias = f" · the paper's {experiment.alias.replace('figure', 'figure ')}" if experiment.alias else ""
    return (
        f"<h1>{escape(experiment.title)}</h1>\n"
        f'<p class="lead">streamnorm experiment <b>{experiment.name}</b>{alias} · data: {escape(data["name"])}</p>\n'
        f'<p class="question">{escape(experiment.question)}</p>'
    )


def _verdict(results: Results) -> str:
    items = "\n".join(f"<li>{escape(sentence)}</li>" for sentence in sentences(results))
    notes = "\n".join(f'<p class="warning">{escape(warning)}</p>' for warning in warnings(results))
    return f'<section class="verdict"><h2>What came out</h2>\n<ul>\n{items}\n</ul></section>\n{notes}'


def figure(svg: str, description: str, caption: str, wide: bool = False) -> str:
    """A drawing with its caption."""
    image = base64.b64encode(svg.encode()).decode()
    kind = ' class="wide"' if wide else ""
    return (
        f'<figure{kind}><div class="sheet">'
        f'<img alt="{escape(description)}" src="data:image/svg+xml;base64,{image}"></div>\n'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def html_table(head: Iterable[str], rows: Iterable[str]) -> str:
    """Rows of a table, below a head."""
    header = "".join(head)
    body = "\n".join(rows)
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _head(results: Results, first: str = "Method") -> list[str]:
    return [f"<th>{first}</th>", *(f'<th class="number">{setting.label}</th>' for setting in results.settings)]


def _row(results: Results, name: str, cells: Iterable[str]) -> str:
    method = results.method(name)
    dot = f'<span class="dot" style="background:{method.colour}"></span>'
    return f"<tr><th>{dot}{method.label}</th>{''.join(cells)}</tr>"


def _numbers(results: Results) -> str:
    words = results.experiment.words.numbers.format(reference=results.method(results.experiment.reference).label)
    rows = (
        _row(results, method.name, (_number(results, results.cells[method.name, s]) for s in results.settings))
        for method in results.methods
    )
    return f"<p>{words} Coloured where the interval excludes zero.</p>\n" + html_table(_head(results), rows)


def _number(results: Results, cell: Cell) -> str:
    name, reference = cell.method.name, results.experiment.reference
    difference = results.difference(name, reference, cell.setting) if name != reference else None
    notes = [] if difference is None else [_difference(results, difference)]
    if cell.mean is not None:
        train_loss = None if cell.train_loss is None else cell.train_loss.mean
        notes += results.experiment.words.notes(cell.mean.mean, train_loss)
    below = "".join(f"<br><small>{note}</small>" for note in notes)
    title = f' title="{escape(cell.reason)}"' if cell.reason else ""
    return f'<td class="number"{title}>{score_text(results.experiment.score, cell)}{below}</td>'


def _difference(results: Results, difference: Interval | None) -> str:
    """A difference, coloured if its interval excludes zero."""
    score = results.experiment.score
    kind = "" if difference is None else score.outcome(difference).split()[0]
    return f'<span class="{kind}">{difference_text(score, difference)}</span>'


def _pairs(results: Results) -> str:
    """The differences that the verdict is about."""
    names = {method.name for method in results.methods}
    rows = []
    for ours, theirs in results.experiment.comparisons:
        if {ours, theirs} <= names:
            found = (results.difference(ours, theirs, setting) for setting in results.settings)
            cells = "".join(f'<td class="number">{_difference(results, difference)}</td>' for difference in found)
            rows.append(f"<tr><th>{results.method(ours).label} − {results.method(theirs).label}</th>{cells}</tr>")
    words = (
        f"<p>The pairs that the verdict speaks of: difference in {results.experiment.words.difference_unit}, paired by "
        "seed, mean ± 95% interval.</p>\n"
    )
    return words + html_table(_head(results, "Pair"), rows) if rows else ""


def _changes(results: Results) -> str:
    """The same method at two settings."""
    if not results.setting_pairs:
        return ""
    head = [f'<th class="number">{left.label} − {right.label}</th>' for left, right in results.setting_pairs]
    rows = []
    for method in results.methods:
        found = (results.change(method.name, *pair) for pair in results.setting_pairs)
        cells = [f'<td class="number">{_difference(results, change)}</td>' for change in found]
        rows.append(_row(results, method.name, cells))
    words = (
        f"<p>Each method at one setting less itself at another, in {results.experiment.words.difference_unit}, paired "
        "by seed, mean ± 95% interval.</p>\n"
    )
    return words + html_table(["<th>Method</th>", *head], rows)


def _section(results: Results) -> str:
    """The table that only this experiment has."""
    section = results.section
    if section is None:
        return ""
    head = (f"<th>{escape(name)}</th>" for name in section.head)
    rows = (
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(text)}</td>' for text in rest)}</tr>"
        for first, *rest in section.rows
    )
    return f"<h2>{escape(section.title)}</h2>\n<p>{escape(section.text)}</p>\n" + html_table(head, rows)


def _rates(results: Results) -> str:
    grid = sorted({rate for cell in results.cells.values() for rate in cell.tuning})
    rows = (
        _row(results, method.name, (_rate(results, results.cells[method.name, s]) for s in results.settings))
        for method in results.methods
    )
    return (
        f"<p>Grid: {', '.join(f'{rate:g}' for rate in grid)}. Each method got, at each setting, the rate with "
        f"{results.experiment.words.chosen_by}. An arrow marks a best rate at the edge of the grid. "
        "The last number is the largest rate that still trains: with a validation score nearer to the best one than to "
        "guessing.</p>\n" + html_table(_head(results), rows)
    )


def _rate(results: Results, cell: Cell) -> str:
    value = results.experiment.score.value
    arrow = {"lowest": "↓ ", "highest": "↑ ", None: ""}[cell.edge]
    if cell.rate is None:
        return '<td class="number">–</td>'
    largest = results.largest_rate(cell)
    notes = f"<br><small>{value(cell.tuning[cell.rate])}</small><br><small>up to {largest:g}</small>"
    return f'<td class="number">{arrow}{cell.rate:g}{notes}</td>'


def _protocol(results: Results) -> str:
    options, words = results.config["options"], results.experiment.words
    own = {name: options[name] for name in results.config["identity"] if name in options}
    finals = sum(run.run["stage"] == "final" for run in results.logs)
    facts = [
        *results.protocol,
        f"A run whose loss is no longer finite counts with the {words.guessing}.",
        f"{len(results.logs)} runs, {finals} of them final ones. Rates are chosen with other seeds than the final "
        "ones. Intervals are Student's t over seeds, each for itself: they are not corrected for their number.",
        "Options: " + ", ".join(f"{name} {value}" for name, value in own.items()) + ".",
    ]
    return "<ul>\n" + "\n".join(f"<li>{escape(fact)}</li>" for fact in facts if fact) + "\n</ul>"


def _samples(results: Results) -> str:
    """Generated texts, where the logs keep them: for each setting, the first seed of each method."""
    blocks: list[str] = []
    for setting in results.settings:
        texts = [text for method in results.methods if (text := _sample(results, results.cells[method.name, setting]))]
        if texts:
            state = "" if blocks else " open"
            blocks.append(f"<details{state}><summary>{setting.label}</summary>\n" + "\n".join(texts) + "</details>")
    return "<h2>What it writes</h2>\n" + results.experiment.words.samples + "\n".join(blocks) if blocks else ""


def _sample(results: Results, cell: Cell) -> str:
    samples = [run.end["sample"] for run in cell.runs if run.end is not None and "sample" in run.end]
    if not samples:
        return ""
    prompt, text = escape(samples[0]["prompt"]), escape(samples[0]["text"])
    return f"<h3>{escape(cell.method.label)}</h3>\n<pre><small>{prompt}</small>{text}</pre>"


def environments(logs: Iterable[LoggedRun]) -> str:
    """The environments of these runs, and the time they took."""
    logs = list(logs)
    seen = {tuple(run.header["environment"].items()): None for run in logs}
    lines = [", ".join(f"{escape(str(key))} {escape(str(value))}" for key, value in items) for items in seen]
    seconds = sum(run.end["seconds"] for run in logs if run.end is not None)
    started = sorted(run.header["started"] for run in logs)
    entries = "\n".join(f"<li>{line}</li>" for line in lines)
    total = f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
    return f"<ul>\n{entries}\n</ul>\n<p>{total} of one core in all; first run begun {started[0]}.</p>"


def _commands(results: Results) -> str:
    commands = escape("\n".join(results.config["commands"]))
    return (
        f"<pre>{commands}</pre>\n<p>Interrupted runs continue with the same command. "
        "<code>streamnorm report FOLDER</code> rebuilds this page from the logs. Beside it lie results.csv, runs.csv, "
        "the figures as PNG and SVG, and the logs as JSON lines, in runs.jsonl.gz or a file for each run.</p>"
    )
