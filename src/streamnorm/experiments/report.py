"""One self-contained HTML page: what was asked, what came out, how it was done, how to do it again."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from streamnorm.experiments.figures import save_figures
from streamnorm.experiments.files import write_text
from streamnorm.experiments.methods import METHODS
from streamnorm.experiments.results import Cell, Results, load_results
from streamnorm.experiments.stats import Interval
from streamnorm.experiments.style import CSS
from streamnorm.experiments.tables import accuracy_text, difference_text, save_tables
from streamnorm.experiments.verdict import outcome, percent, sentences, warnings

REPORT = "report.html"


def build_report(folder: Path) -> Results:
    """Make figures, CSV files and the page anew from the logs in ``folder``.

    Raises:
        UserError: the folder holds no finished run, or a damaged log.
    """
    results = load_results(folder)
    drawings = save_figures(results, folder / "figures")
    save_tables(results, folder)
    write_text(folder / REPORT, page(results, drawings))
    return results


def page(results: Results, drawings: Mapping[str, str]) -> str:
    """The page's text; ``drawings`` are SVG texts by name."""
    experiment = results.experiment
    sections = (
        _opening(results),
        _verdict(results),
        _figure(drawings["summary"], *_summary_words(results)),
        "<h2>The numbers</h2>",
        _numbers(results),
        _pairs(results),
        "<h2>Along the way</h2>",
        _figure(drawings["curves"], *_curves_words(results), wide=True),
        "<h2>Learning rates</h2>",
        _rates(results),
        _figure(drawings["rates"], *_rates_words(), wide=True),
        "<h2>How it was done</h2>",
        _protocol(results),
        "<h2>Where it ran</h2>",
        _environments(results),
        "<h2>Do it again</h2>",
        _commands(results),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(experiment.title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
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


def _figure(svg: str, description: str, caption: str, wide: bool = False) -> str:
    image = base64.b64encode(svg.encode()).decode()
    kind = ' class="wide"' if wide else ""
    return (
        f'<figure{kind}><div class="sheet">'
        f'<img alt="{escape(description)}" src="data:image/svg+xml;base64,{image}"></div>\n'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _summary_words(results: Results) -> tuple[str, str]:
    data = results.config["data"]
    return (
        "Final test accuracy of each method at each setting",
        f"Accuracy on all {data['test']:,} test images, mean over seeds with its 95% interval, each method at its own "
        "best learning rate. From left to right the mini-batches get smaller. S×U means S samples per mini-batch and "
        "U mini-batches per weight update.",
    )


def _curves_words(results: Results) -> tuple[str, str]:
    shown = min(results.config["options"]["curve_images"], results.config["data"]["test"])
    return (
        "Training loss and test accuracy along the pass, one panel per setting",
        "Top: training loss, the mean since the previous point, each image judged before the network learns from it. "
        f"Bottom: accuracy on the first {shown:,} test images. Lines are means over seeds, bands reach from the lowest "
        "to the highest seed.",
    )


def _rates_words() -> tuple[str, str]:
    return (
        "Validation accuracy by learning rate, one panel per setting",
        "How much each method depends on its learning rate; the ring marks the rate chosen.",
    )


def _table(head: Iterable[str], rows: Iterable[str]) -> str:
    header = "".join(head)
    body = "\n".join(rows)
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _head(results: Results, first: str = "Method") -> list[str]:
    return [f"<th>{first}</th>", *(f'<th class="number">{setting.label}</th>' for setting in results.settings)]


def _row(results: Results, name: str, cells: Iterable[str]) -> str:
    method = METHODS[name]
    dot = f'<span class="dot" style="background:{method.colour}"></span>'
    return f"<tr><th>{dot}{method.label}</th>{''.join(cells)}</tr>"


def _numbers(results: Results) -> str:
    reference = METHODS[results.experiment.reference].label
    rows = (
        _row(results, method.name, (_number(results, results.cells[method.name, s]) for s in results.settings))
        for method in results.methods
    )
    return (
        "<p>Test accuracy in percent, mean ± 95% interval over seeds. Below it, smaller: the difference to "
        f"{reference} in percentage points, paired by seed, since the same seed means the same initial weights and the "
        "same order of the images. Coloured where the interval excludes zero.</p>\n" + _table(_head(results), rows)
    )


def _number(results: Results, cell: Cell) -> str:
    name, reference = cell.method.name, results.experiment.reference
    difference = results.difference(name, reference, cell.setting) if name != reference else None
    below = f"<br><small>{_difference(difference)}</small>" if difference is not None else ""
    title = f' title="{escape(cell.reason)}"' if cell.reason else ""
    return f'<td class="number"{title}>{accuracy_text(cell)}{below}</td>'


def _difference(difference: Interval | None) -> str:
    """A difference, coloured if its interval excludes zero."""
    kind = "" if difference is None else outcome(difference).split()[0]
    return f'<span class="{kind}">{difference_text(difference)}</span>'


def _pairs(results: Results) -> str:
    """The differences that the verdict is about."""
    names = {method.name for method in results.methods}
    rows = []
    for ours, theirs in results.experiment.comparisons:
        if {ours, theirs} <= names:
            found = (results.difference(ours, theirs, setting) for setting in results.settings)
            cells = "".join(f'<td class="number">{_difference(difference)}</td>' for difference in found)
            rows.append(f"<tr><th>{METHODS[ours].label} − {METHODS[theirs].label}</th>{cells}</tr>")
    words = (
        "<p>The pairs that the verdict speaks of: difference in percentage points, paired by seed, "
        "mean ± 95% interval.</p>\n"
    )
    return words + _table(_head(results, "Pair"), rows) if rows else ""


def _rates(results: Results) -> str:
    grid = sorted({rate for cell in results.cells.values() for rate in cell.tuning})
    rows = (
        _row(results, method.name, (_rate(results.cells[method.name, s]) for s in results.settings))
        for method in results.methods
    )
    return (
        f"<p>Grid: {', '.join(f'{rate:g}' for rate in grid)}. Each method got, at each setting, the rate with the best "
        "accuracy on the validation images, which are neither trained on nor tested on. An arrow marks a best rate at "
        "the edge of the grid.</p>\n" + _table(_head(results), rows)
    )


def _rate(cell: Cell) -> str:
    arrow = {"lowest": "↓ ", "highest": "↑ ", None: ""}[cell.edge]
    best = f"<br><small>{percent(cell.tuning[cell.rate])}</small>" if cell.rate is not None else ""
    return f'<td class="number">{arrow}{"–" if cell.rate is None else f"{cell.rate:g}"}{best}</td>'


def _protocol(results: Results) -> str:
    data, options = results.config["data"], results.config["options"]
    own = {name: options[name] for name in results.config["identity"] if name in options}
    shape = "×".join(str(size) for size in data["shape"])
    finals = sum(run.run["stage"] == "final" for run in results.logs)
    facts = [
        f"Images: {data['description']}; {shape} values each. Trained on the first {data['train']:,}, rates chosen on "
        f"the next {data['validation']:,}, tested on {data['test']:,} others.",
        "Inputs are standardized per channel with the training images' mean and deviation. Nothing is augmented.",
        "SGD with momentum, constant learning rate. With several mini-batches per update their gradients are "
        "averaged, and the weights change once (DAU).",
        "All methods start from the same weights and see the same images in the same order at a given seed.",
        "“Recalibrated Batch” is the same trained network with statistics taken anew from the training images in "
        "mini-batches of about 128, so that Batch Normalization is not judged by its running statistics alone."
        if any(method.trained_as != method.name for method in results.methods)
        else "",
        "A run whose loss is no longer finite counts with the accuracy of guessing.",
        f"{len(results.logs)} runs, {finals} of them final ones. Rates are chosen with other seeds than the final "
        "ones. Intervals are Student's t over seeds, each for itself: they are not corrected for their number.",
        "Options: " + ", ".join(f"{name} {value}" for name, value in own.items()) + ".",
    ]
    return "<ul>\n" + "\n".join(f"<li>{escape(fact)}</li>" for fact in facts if fact) + "\n</ul>"


def _environments(results: Results) -> str:
    seen = {tuple(run.header["environment"].items()): None for run in results.logs}
    lines = [", ".join(f"{escape(str(key))} {escape(str(value))}" for key, value in items) for items in seen]
    seconds = sum(run.end["seconds"] for run in results.logs if run.end is not None)
    started = sorted(run.header["started"] for run in results.logs)
    entries = "\n".join(f"<li>{line}</li>" for line in lines)
    total = f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
    return f"<ul>\n{entries}\n</ul>\n<p>{total} of one core in all; first run begun {started[0]}.</p>"


def _commands(results: Results) -> str:
    commands = escape("\n".join(results.config["commands"]))
    return (
        f"<pre>{commands}</pre>\n<p>Interrupted runs continue with the same command. "
        "<code>streamnorm report FOLDER</code> makes this page anew from the logs. Beside it lie results.csv, "
        "runs.csv, the figures as PNG and SVG, and a JSON-lines log for every run.</p>"
    )
