"""The page of one experiment: what came out, figures, numbers, how it was done, and how to repeat it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.analysis.headline import headline
from streamnorm_lab.analysis.results import Cell, Results
from streamnorm_lab.analysis.verdict import sentences, warnings
from streamnorm_lab.common.files import write_text
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.common.stats import Interval
from streamnorm_lab.experiments.wording import data_name
from streamnorm_lab.logs.runlog import LoggedRun
from streamnorm_lab.reports.charts import charts
from streamnorm_lab.reports.figures import save_figures
from streamnorm_lab.reports.page import document, figure, html_table
from streamnorm_lab.reports.tables import difference_text, save_tables, score_text

REPORT = "report.html"
MENU = (
    ("#result", "What came out"),
    ("#numbers", "The numbers"),
    ("#curves", "Along the way"),
    ("#rates", "Learning rates"),
    ("#protocol", "How it was done"),
    ("#again", "Do it again"),
)


def build_report(folder: Path) -> Results:
    """Rebuild figures, CSV files and the page from the logs in ``folder``.

    Raises:
        UserError: the folder holds no finished run, or a damaged log.
    """
    results = open_results(folder)
    save_figures(charts(results), folder / "figures")
    save_tables(results, folder)
    write_text(folder / REPORT, page(results))
    return results


def page(results: Results) -> str:
    """The page's text."""
    drawn = {name: figure(chart, f"figures/{name}.svg") for name, chart in charts(results).items()}
    sections = (
        _opening(results),
        drawn["summary"],
        _verdict(results),
        '<h2 id="numbers">The numbers</h2>',
        _section(results),
        _numbers(results),
        _pairs(results),
        _changes(results),
        '<h2 id="curves">Along the way</h2>',
        drawn["curves"],
        '<h2 id="rates">Learning rates</h2>',
        drawn["rates"],
        _rates(results),
        _samples(results),
        '<h2 id="protocol">How it was done</h2>',
        _protocol(results),
        "<h3>Where it ran</h3>",
        environments(results.logs),
        '<h2 id="again">Do it again</h2>',
        _commands(results),
    )
    return document(f"{results.experiment.title}: {data_name(results.config)}", filter(None, sections), MENU)


def _opening(results: Results) -> str:
    experiment, data = results.experiment, data_name(results.config)
    alias = f" · the paper's {experiment.alias.replace('figure', 'figure ')}" if experiment.alias else ""
    return (
        f"<h1>{escape(experiment.title)}</h1>\n"
        f'<p class="headline">{escape(headline(results))}</p>\n'
        f'<p class="lead">streamnorm experiment <b>{experiment.name}</b>{alias} · data: {escape(data)} · '
        f"layers of streamnorm {escape(results.version)}</p>\n"
        f"<p>{escape(experiment.question)}</p>\n<p>{escape(explain(results.settings))}</p>"
    )


def explain(settings: Sequence[Setting]) -> str:
    """The meaning of S×U, by one of these settings.

    Example:
        >>> explain([Setting(32, 1), Setting(2, 16)]).partition(": ")[2]
        '2×16 is mini-batches of 2, 16 per weight update.'
    """
    shown = next((setting for setting in settings if setting.samples > 1 and setting.batches > 1), settings[-1])
    return (
        "A setting S×U is S samples in a mini-batch and U mini-batches for each weight update: "
        f"{shown.label} is {shown.words}."
    )


def _verdict(results: Results) -> str:
    items = "\n".join(f"<li>{escape(sentence)}</li>" for sentence in sentences(results))
    notes = "\n".join(f'<p class="warning">{escape(warning)}</p>' for warning in warnings(results))
    return f'<h2 id="result">What came out</h2>\n<ul class="results">\n{items}\n</ul>\n{notes}'


def _labels(results: Results) -> list[str]:
    return [setting.label for setting in results.settings]


def _named(results: Results, name: str, cells: Iterable[str]) -> list[str]:
    """The row of a method."""
    method = results.method(name)
    return [f'<span class="dot" style="--c:{method.colour}"></span>{method.label}', *cells]


def _numbers(results: Results) -> str:
    reference, words = results.experiment.reference, results.experiment.words
    compared = reference in {method.name for method in results.methods} and len(results.methods) > 1
    difference = words.difference.format(reference=results.method(reference).label) if compared else ""
    rows = (
        _named(results, method.name, (_number(results, results.cells[method.name, s]) for s in results.settings))
        for method in results.methods
    )
    said = words.numbers.format(spread=results.spread, difference=difference)
    return f"<p>{said}</p>\n" + html_table(["Method", *_labels(results)], rows, numbers=True)


def _number(results: Results, cell: Cell) -> str:
    name, reference = cell.method.name, results.experiment.reference
    difference = results.difference(name, reference, cell.setting) if name != reference else None
    notes = [] if difference is None else [_difference(results, difference)]
    if cell.mean is not None:
        train_loss = None if cell.train_loss is None else cell.train_loss.mean
        notes += results.experiment.words.notes(cell.mean.mean, train_loss)
    below = "".join(f"<small>{note}</small>" for note in notes)
    text = score_text(results.experiment.score, cell)
    return (f'<span title="{escape(cell.reason)}">{text}</span>' if cell.reason else text) + below


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
            pair = f"{results.method(ours).label} − {results.method(theirs).label}"
            rows.append([pair, *(_difference(results, difference) for difference in found)])
    words = (
        f"<p>The pairs that the sentences above speak of: difference in {results.experiment.words.difference_unit}, "
        f"paired by seed, {results.spread}.</p>\n"
    )
    return words + html_table(["Pair", *_labels(results)], rows, numbers=True) if rows else ""


def _changes(results: Results) -> str:
    """The same method at two settings."""
    if not results.setting_pairs:
        return ""
    head = [f"{left.label} − {right.label}" for left, right in results.setting_pairs]
    rows = []
    for method in results.methods:
        found = (results.change(method.name, *pair) for pair in results.setting_pairs)
        rows.append(_named(results, method.name, (_difference(results, change) for change in found)))
    words = (
        f"<p>Each method at one setting less itself at another, in {results.experiment.words.difference_unit}, paired "
        f"by seed, {results.spread}.</p>\n"
    )
    return words + html_table(["Method", *head], rows, numbers=True)


def _section(results: Results) -> str:
    """The table that only this experiment has."""
    section = results.section
    if section is None:
        return ""
    rows = ([escape(text) for text in row] for row in section.rows)
    return (
        f"<h3>{escape(section.title)}</h3>\n<p>{escape(section.text)}</p>\n"
        + html_table([escape(name) for name in section.head], rows)
        + "\n<h3>Every method and setting</h3>"
    )


def _rates(results: Results) -> str:
    scaled = ", times the samples of a weight update" if results.experiment.per_sample else ""
    grid = ", ".join(f"{rate:g}" for rate in results.grid) + scaled
    rows = (
        _named(results, method.name, (_rate(results, results.cells[method.name, s]) for s in results.settings))
        for method in results.methods
    )
    return (
        f"<p>Grid: {grid}. Each method got, at each setting, the rate with "
        f"{results.experiment.words.chosen_by}. An arrow marks a best rate at the edge of the grid. "
        "The last number is the largest rate that still trains: with a validation score nearer to the best one than to "
        "guessing.</p>\n" + html_table(["Method", *_labels(results)], rows, numbers=True)
    )


def _rate(results: Results, cell: Cell) -> str:
    value = results.experiment.score.value
    arrow = {"lowest": "↓ ", "highest": "↑ ", None: ""}[cell.edge]
    if cell.rate is None:
        return "–"
    largest = results.largest_rate(cell)
    return f"{arrow}{cell.rate:g}<small>{value(cell.tuning[cell.rate])}</small><small>up to {largest:g}</small>"


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
