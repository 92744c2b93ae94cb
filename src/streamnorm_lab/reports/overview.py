"""The page over all results: a row for each claim with its verdict, then the experiments behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from streamnorm_lab.analysis.claims import (
    CLAIMS,
    FALSE,
    HOLDS,
    MIXED,
    OPEN,
    OURS,
    PARTLY,
    UNMEASURED,
    VERDICTS,
    Claim,
    Contrast,
    overall,
    verdict,
)
from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.analysis.headline import headline
from streamnorm_lab.analysis.results import CONFIG, Results
from streamnorm_lab.analysis.table1 import CONFIG as TABLE1_CONFIG
from streamnorm_lab.analysis.table1 import judge
from streamnorm_lab.analysis.verdict import warnings
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.files import write_text
from streamnorm_lab.experiments.table1 import TECHNIQUES, Table1
from streamnorm_lab.experiments.wording import data_name
from streamnorm_lab.reports.charts import charts
from streamnorm_lab.reports.page import document, figure
from streamnorm_lab.reports.report import REPORT, build_report, environments, explain
from streamnorm_lab.reports.table1 import build_table
from streamnorm_lab.reports.table1 import summary as table1_summary
from streamnorm_lab.reports.tables import Row, as_csv

EVERYWHERE = Claim(
    f"{TECHNIQUES['streaming-l1']} works in every scenario: feedforward and recurrent, fully connected and "
    "convolutional, online, with small mini-batches, and all combined.",
    "table 1",
    (Table1.name,),
    lambda results: iter(()),
)
COUNTED = {
    HOLDS: ("holds", "hold"),
    PARTLY: ("holds in part", "hold in part"),
    FALSE: ("does not hold", "do not hold"),
    MIXED: ("holds in some results and not in others", "hold in some results and not in others"),
    OPEN: ("is open", "are open"),
    UNMEASURED: ("is not measured", "are not measured"),
}
"""A verdict after "one" and after larger numbers."""
CLASS = {verdict: verdict.replace(" ", "-") for verdict in VERDICTS}


@dataclass(frozen=True)
class Measured:
    """A claim in the results of one folder: the comparison that decides, and all of them, each with its verdict."""

    claim: Claim
    folder: str
    data: str
    verdict: str
    decides: str
    version: str
    comparisons: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Standing:
    """A claim over all results."""

    claim: Claim
    measured: Sequence[Measured]

    @property
    def verdict(self) -> str:
        """One of ``VERDICTS``."""
        return overall(measured.verdict for measured in self.measured)


def tightest(contrasts: Sequence[Contrast]) -> Contrast:
    """The contrast that decides: one with the verdict's own, and of these the one least ahead of its bound."""
    decided = verdict(list(contrasts))
    return min((contrast for contrast in contrasts if contrast.verdict == decided), key=_margin)


def _margin(contrast: Contrast) -> float:
    if contrast.ahead is not None:
        return contrast.ahead.mean - contrast.above
    return float("-inf") if contrast.ours.mean is None else float("inf")


@dataclass(frozen=True)
class Overview:
    """Every result folder below one folder, by its place there."""

    root: Path
    results: dict[str, Results]
    tables: tuple[Path, ...]

    @property
    def standings(self) -> list[Standing]:
        """Every claim, with what was measured of it."""
        tables = Standing(EVERYWHERE, [_measure_table(self.root, folder) for folder in self.tables])
        return [*(Standing(claim, list(self._measure(claim))) for claim in CLAIMS), tables]

    @property
    def measured(self) -> list[Measured]:
        """Every claim in every folder that has something to say about it."""
        return [measured for standing in self.standings for measured in standing.measured]

    def _measure(self, claim: Claim) -> Iterable[Measured]:
        for name, results in self.results.items():
            contrasts = list(claim.contrasts(results)) if results.experiment.name in claim.experiments else []
            if contrasts:
                said = [(describe(contrast), contrast.verdict) for contrast in contrasts]
                decides = describe(tightest(contrasts))
                data, version = kind_of_data(results), results.version
                yield Measured(claim, name, data, verdict(contrasts), decides, version, said)


def _measure_table(root: Path, folder: Path) -> Measured:
    judgements = judge(folder)
    holds = all(row["streaming-l1"].verdict == "works" for row in judgements.values())
    results = next(iter(next(iter(judgements.values())).values())).results
    place, data = str(folder.relative_to(root)), kind_of_data(results)
    return Measured(EVERYWHERE, place, data, HOLDS if holds else FALSE, table1_summary(judgements), results.version)


def kind_of_data(results: Results) -> str:
    """The data as a reader filters them: one kind of images, or text."""
    return "text" if results.experiment.kind.unit == "characters" else data_name(results.config)


def load_overview(root: Path) -> Overview:
    """Read every result folder below ``root``.

    Raises:
        UserError: there is none, or a log is damaged.
    """
    configs = sorted(root.glob(f"**/{CONFIG}"))
    if not configs:
        raise UserError(f"{root}: no results there; name a folder that `streamnorm run` wrote, or one that holds such")
    results = {path.parent.relative_to(root).as_posix(): open_results(path.parent) for path in configs}
    return Overview(root, results, tuple(path.parent for path in sorted(root.glob(f"**/{TABLE1_CONFIG}"))))


def build_overview(root: Path) -> Overview:
    """Make ``report.html`` and ``claims.csv`` in ``root`` from all logs below it, and the pages that it leads to.

    Raises:
        UserError: there are no results, or a log is damaged.
    """
    overview = load_overview(root)
    for name in overview.results:
        if not (root / name / REPORT).exists():
            build_report(root / name)
    for folder in overview.tables:
        if not (folder / REPORT).exists():
            build_table(folder)
    write_text(root / REPORT, page(overview))
    write_text(root / "claims.csv", as_csv(claim_rows(overview)))
    return overview


def claim_rows(overview: Overview) -> list[Row]:
    """The lines of ``claims.csv``: each claim in each folder that says something about it, and the others."""
    rows = [_row(one.claim, one) for one in overview.measured]
    return rows + [_row(standing.claim) for standing in overview.standings if not standing.measured]


def _row(claim: Claim, measured: Measured | None = None) -> Row:
    return {
        "claim": claim.text,
        "in_the_paper": claim.place,
        "results": measured.folder if measured else "",
        "what_decides": measured.decides if measured else "",
        "comparisons": len(measured.comparisons) or 1 if measured else 0,
        "verdict": measured.verdict if measured else UNMEASURED,
    }


def page(overview: Overview) -> str:
    """The page's text."""
    return document(
        "All results: what holds, what does not, what is open",
        [
            "<h1>All results</h1>",
            '<p class="lead">What the paper and this project claim about normalization, and what training runs say.'
            "</p>",
            f'<p class="headline">{escape(in_short(overview))}</p>',
            _strip(overview.standings),
            '<h2 id="claims">The claims</h2>',
            _filters(overview),
            *(_claim(number, standing) for number, standing in enumerate(overview.standings)),
            '<h2 id="experiments">The experiments</h2>',
            *_experiments(overview),
            '<h2 id="method">How it was done</h2>',
            _method(overview),
        ],
        (("#claims", "Claims"), ("#experiments", "Experiments"), ("#method", "How it was done")),
        "evidence.js",
    )


def in_short(overview: Overview) -> str:
    """The number of claims, and of measurements, with each verdict."""
    standings, measured = overview.standings, overview.measured
    return (
        f"Of {len(standings)} claims {_counts(standing.verdict for standing in standings)}. "
        f"Behind them are {len(measured)} measurements: {_counts(one.verdict for one in measured)}."
    )


def _counts(verdicts: Iterable[str]) -> str:
    counts = Counter(verdicts)
    parts = [f"{counts[word]} {COUNTED[word][counts[word] > 1]}" for word in VERDICTS if counts[word]]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _strip(standings: Sequence[Standing]) -> str:
    """Claims by verdict, a column of squares for each: one for each measurement."""
    groups = []
    for word in VERDICTS:
        found = [(number, standing) for number, standing in enumerate(standings) if standing.verdict == word]
        if found:
            links = "".join(
                f'<a href="#claim-{number}" title="{escape(standing.claim.text)}">{_squares(standing)}</a>'
                for number, standing in found
            )
            groups.append(
                f'<div><button type="button" class="filter {CLASS[word]}" data-verdict="{word}" aria-pressed="false">'
                f"<b>{len(found)}</b> {word}</button><span>{links}</span></div>"
            )
    return f'<div class="strip">{"".join(groups)}</div>'


def _squares(standing: Standing) -> str:
    squares = "".join(
        f'<i class="{CLASS[one.verdict]}" title="{escape(one.folder)}: {one.verdict}"></i>' for one in standing.measured
    )
    return squares or f'<i class="{CLASS[UNMEASURED]}"></i>'


def _filters(overview: Overview) -> str:
    data = "".join(f"<option>{name}</option>" for name in sorted({one.data for one in overview.measured}))
    return (
        '<form class="filters" hidden>'
        '<label>Verdict <select name="verdict"><option value="">any</option>'
        + "".join(f"<option>{word}</option>" for word in VERDICTS)
        + f'</select></label><label>Data <select name="data"><option value="">all</option>{data}</select></label>'
        '<label>Made by <select name="source"><option value="">anyone</option><option value="paper">the paper</option>'
        '<option value="ours">this project</option></select></label>'
        '<label>Words <input type="search" name="words" size="12"></label>'
        '<button type="button" name="fold">Open all</button> <output></output></form>'
    )


def _claim(number: int, standing: Standing) -> str:
    claim, word = standing.claim, standing.verdict
    data = " ".join(sorted({one.data for one in standing.measured}))
    counts = Counter(one.verdict for one in standing.measured)
    told = ", ".join(f"{counts[kind]} {COUNTED[kind][counts[kind] > 1]}" for kind in VERDICTS if counts[kind])
    results = f"{len(standing.measured)} results: {told}" if len(standing.measured) > 1 else ""
    source = "ours" if claim.place == OURS else "paper"
    place = "made by this project" if source == "ours" else f"the paper, {claim.place}"
    items = "\n".join(map(_measurement, standing.measured)) or f"<li>To measure it: {_commands(claim)}</li>"
    return (
        f'<details class="claim" id="claim-{number}" data-verdict="{word}" data-data="{data}" data-source="{source}">'
        f'<summary><b class="badge {CLASS[word]}">{word}</b><span class="what">{escape(claim.text)} '
        f"<small>{' · '.join(filter(None, (escape(place), results)))}</small></span>"
        f'<span class="squares">{_squares(standing)}</span></summary>\n'
        f'<ul class="measured">\n{items}\n</ul></details>'
    )


def _commands(claim: Claim) -> str:
    return " or ".join(f"<code>streamnorm run {name}</code>" for name in claim.experiments)


def _measurement(measured: Measured) -> str:
    several = len(measured.comparisons) > 1
    items = "".join(f"<li>{escape(text)}: {word}</li>" for text, word in measured.comparisons)
    more = f"<details><summary>all {len(measured.comparisons)} comparisons</summary><ul>{items}</ul></details>"
    return (
        f'<li><b class="badge {CLASS[measured.verdict]}">{measured.verdict}</b> '
        f'<a href="{measured.folder}/{REPORT}">{measured.folder}</a> <small>{escape(measured.data)}, version '
        f"{escape(measured.version)}</small>"
        f"<div>{escape(measured.decides)}{more if several else ''}</div></li>"
    )


def describe(contrast: Contrast) -> str:
    """Name the two sides of a contrast, and the difference with its interval."""
    score = contrast.results.experiment.score
    ours, theirs = contrast.ours, contrast.theirs
    places = ours.setting.label
    if ours.setting != theirs.setting:
        places += f" against {theirs.setting.label}"
    labels = [ours.method.label, theirs.method.label]
    if score.lower_is_better:
        labels.reverse()  # so that above zero is better, as for accuracies
    names = labels[0] if ours.method == theirs.method else " − ".join(labels)
    where = f"{names} at {places}"
    if contrast.ahead is None:
        return f"{where}: {(ours if ours.mean is None else theirs).method.label} cannot train"
    ahead = contrast.ahead
    interval = f" [{score.difference(ahead.low)}, {score.difference(ahead.high)}]" if ahead.known else " (one seed)"
    return f"{where}: {score.difference(ahead.mean)}{interval} {score.unit}, bound {score.difference(contrast.above)}"


def _experiments(overview: Overview) -> Iterable[str]:
    """The results by experiment, folded."""
    kinds = dict.fromkeys(results.experiment for results in overview.results.values())
    for kind in sorted(kinds, key=lambda kind: kind.title):
        found = {name: results for name, results in overview.results.items() if results.experiment is kind}
        count = f"{len(found)} results" if len(found) > 1 else "1 result"
        body = "\n".join(_folder(name, results) for name, results in found.items())
        yield (
            f'<details class="group" id="{kind.name}"><summary>{escape(kind.title)} <small>{count}</small>'
            f"</summary>\n<p>{escape(kind.question)} <code>streamnorm run {kind.name}</code></p>\n{body}</details>"
        )
    for folder in overview.tables:
        place = str(folder.relative_to(overview.root))
        yield (
            f'<details class="group"><summary>{Table1.title} <small>{place}</small></summary>\n'
            f'<p>{escape(table1_summary(judge(folder)))} <a href="{place}/{REPORT}">The table</a></p></details>'
        )


def _folder(name: str, results: Results) -> str:
    """A folder's first sentence and figure, warnings, configuration, and where to read on."""
    notes = "\n".join(f'<p class="warning">{escape(warning)}</p>' for warning in warnings(results))
    protocol = "\n".join(f"<li>{escape(fact)}</li>" for fact in results.protocol if fact)
    options = "; ".join(f"{key} {value}" for key, value in results.config["options"].items() if value is not None)
    return (
        f'<section><h3><a href="{name}/{REPORT}">{name}</a></h3>\n<p><b>{escape(headline(results))}</b></p>\n'
        f"{figure(charts(results)['summary'], f'{name}/figures/summary.svg')}\n"
        f"<details><summary>Warnings, configuration, command</summary>{notes}<ul>\n{protocol}\n</ul>\n"
        f"<p>{escape(options)}</p>\n<pre>{escape(chr(10).join(results.config['commands']))}</pre></details></section>"
    )


def _method(overview: Overview) -> str:
    settings = [setting for results in overview.results.values() for setting in results.settings]
    return (
        '<details class="group"><summary>How a verdict is made</summary>\n'
        "<p>A claim is made of comparisons, each paired by seed. In one folder of results it holds where the whole 95% "
        "interval of each difference is above the claim's bound, does not hold where that of one is below it, and is "
        "open otherwise. Over all folders it holds if it holds in each, and in part if it is open in the others; it "
        "does not hold if that is so in one of them, and is mixed if it holds in another. "
        "Differences of accuracies are in points, those of losses in nats, and above zero the claim's side is better. "
        f"Intervals are not corrected for their number. {explain(settings)}</p></details>\n"
        '<details class="group"><summary>Where it ran</summary>\n'
        f"{environments(run for results in overview.results.values() for run in results.logs)}</details>"
    )


def print_overview(overview: Overview, console: Console) -> None:
    """The verdicts on the terminal."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("verdict", "claim", "results"):
        table.add_column(name)
    for standing in overview.standings:
        results = "\n".join(f"{one.folder}: {one.verdict}" for one in standing.measured)
        table.add_row(standing.verdict, standing.claim.text, results)
    console.print(table, highlight=False)
    console.print(in_short(overview), highlight=False)
