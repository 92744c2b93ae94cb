"""The page over all results: the claims with their verdicts, then each folder's figure, words and configuration."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from streamnorm_lab.analysis.claims import CLAIMS, FALSE, HOLDS, OPEN, Claim, Contrast, verdict
from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.analysis.results import CONFIG, Results
from streamnorm_lab.analysis.table1 import CONFIG as TABLE1_CONFIG
from streamnorm_lab.analysis.table1 import judge
from streamnorm_lab.analysis.verdict import sentences, warnings
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.files import write_text
from streamnorm_lab.experiments.table1 import TECHNIQUES, Table1
from streamnorm_lab.reports.report import REPORT, build_report, document, environments, figure, html_table
from streamnorm_lab.reports.table1 import summary as table1_summary
from streamnorm_lab.reports.tables import Row, as_csv

_CLASS = {HOLDS: "ahead", FALSE: "behind", OPEN: ""}


EVERYWHERE = Claim(
    f"{TECHNIQUES['streaming-l1']} works in every scenario: feedforward and recurrent, fully connected and "
    "convolutional, online, with small mini-batches, and all combined.",
    "table 1",
    (Table1.name,),
    lambda results: iter(()),
)


@dataclass(frozen=True)
class Measured:
    """A claim in the results of one folder."""

    claim: Claim
    folder: str
    results: Results
    contrasts: list[Contrast]

    @property
    def verdict(self) -> str:
        """Holds, does not hold, or open."""
        return verdict(self.contrasts)

    @property
    def tightest(self) -> Contrast:
        """The contrast that decides: one with the verdict's own, and of these the one least ahead of its bound."""
        deciding = [contrast for contrast in self.contrasts if contrast.verdict == self.verdict]
        return min(deciding, key=_margin)


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
    def measured(self) -> list[Measured]:
        """Every claim in every folder that has something to say about it."""
        return [
            Measured(claim, name, results, contrasts)
            for claim in CLAIMS
            for name, results in self.results.items()
            if results.experiment.name in claim.experiments and (contrasts := list(claim.contrasts(results)))
        ]

    @property
    def not_measured(self) -> list[Claim]:
        """Claims that no folder says anything about."""
        known = {id(measured.claim) for measured in self.measured}
        return [claim for claim in CLAIMS if id(claim) not in known]


def load_overview(root: Path) -> Overview:
    """Read every result folder below ``root``.

    Raises:
        UserError: there is none, or a log is damaged.
    """
    configs = sorted(root.glob(f"**/{CONFIG}"))
    if not configs:
        raise UserError(f"{root}: no results there; name a folder that `streamnorm run` wrote, or one that holds such")
    results = {str(path.parent.relative_to(root)): open_results(path.parent) for path in configs}
    return Overview(root, results, tuple(path.parent for path in sorted(root.glob(f"**/{TABLE1_CONFIG}"))))


def build_overview(root: Path) -> Overview:
    """Make the page ``report.html`` and ``claims.csv`` in ``root`` from all logs below it.

    Raises:
        UserError: there are no results, or a log is damaged.
    """
    overview = load_overview(root)
    write_text(root / REPORT, page(overview))
    write_text(root / "claims.csv", as_csv(claim_rows(overview)))
    return overview


def claim_rows(overview: Overview) -> list[Row]:
    """The lines of ``claims.csv``: each claim in each folder that says something about it, and the others."""
    rows = [
        _row(one.claim, one.folder, describe(one.tightest), len(one.contrasts), one.verdict)
        for one in overview.measured
    ]
    for folder in overview.tables:
        place = str(folder.relative_to(overview.root))
        rows.append(_row(EVERYWHERE, place, table1_summary(judge(folder)), 1, everywhere_verdict(folder)))
    missing = [*overview.not_measured, *([] if overview.tables else [EVERYWHERE])]
    return rows + [_row(claim, "", "", 0, "not measured") for claim in missing]


def _row(claim: Claim, folder: str, decides: str, comparisons: int, verdict: str) -> Row:
    return {
        "claim": claim.text,
        "in_the_paper": claim.place,
        "results": folder,
        "what_decides": decides,
        "comparisons": comparisons,
        "verdict": verdict,
    }


def page(overview: Overview) -> str:
    """The page's text."""
    return document(
        "streamnorm: the evidence",
        [
            "<h1>The evidence</h1>",
            '<p class="lead">What the paper and we claim, and what came out.</p>',
            f'<section class="verdict"><h2>In short</h2><p>{escape(in_short(overview))}</p></section>',
            _claims(overview),
            *(_folder(overview, name, results) for name, results in overview.results.items()),
            "<h2>Where it ran</h2>",
            environments(run for results in overview.results.values() for run in results.logs),
        ],
    )


def in_short(overview: Overview) -> str:
    """The number of claims with each verdict."""
    verdicts = [measured.verdict for measured in overview.measured]
    verdicts += [everywhere_verdict(folder) for folder in overview.tables]
    counts = Counter(verdicts)
    parts = [f"{counts[word]} {word}" for word in (HOLDS, FALSE, OPEN)]
    left = len(overview.not_measured) + (not overview.tables)
    return (
        f"Of {len(verdicts)} measurements of {len(CLAIMS) + 1 - left} claims: {', '.join(parts)}. "
        f"{left} claims are not measured in these results."
    )


def everywhere_verdict(folder: Path) -> str:
    """The verdict on Streaming Normalization in every scenario of a table 1, by its criterion."""
    return HOLDS if all(row["streaming-l1"].verdict == "works" for row in judge(folder).values()) else FALSE


def _claims(overview: Overview) -> str:
    head = [f"<th>{word}</th>" for word in ("Claim", "In the paper", "Measured", "Ahead by", "Verdict")]
    table1 = [_table1_claim(overview, folder) for folder in overview.tables] or [_unmeasured(EVERYWHERE)]
    rows = [*map(_claim, overview.measured), *table1, *map(_unmeasured, overview.not_measured)]
    words = (
        "<p>A claim is made of comparisons, each paired by seed. It holds where the whole 95% interval of each "
        "difference is above the claim's bound, does not hold where that of one is below it, and is open otherwise. "
        "“Ahead by” shows the comparison that decides: accuracy in points, losses in nats, above zero where the "
        "claim's side is better. Intervals are not corrected for their number. Click for all comparisons.</p>\n"
    )
    return "<h2>The claims</h2>\n" + words + html_table(head, rows)


def _claim(measured: Measured) -> str:
    items = "".join(f"<li>{escape(describe(contrast))}: {contrast.verdict}</li>" for contrast in measured.contrasts)
    count = len(measured.contrasts)
    return (
        f'<tr><td class="text">{escape(measured.claim.text)}</td><td>{escape(measured.claim.place)}</td>'
        f'<td><a href="{measured.folder}/{REPORT}">{measured.folder}</a><br><small>'
        f"{escape(measured.results.config['data']['name'])}</small></td>"
        f'<td class="text">{escape(describe(measured.tightest))}<details><summary>{count} in all</summary>'
        f"<ul>{items}</ul></details></td>"
        f'<td><b class="{_CLASS[measured.verdict]}">{measured.verdict}</b></td></tr>'
    )


def _table1_claim(overview: Overview, folder: Path) -> str:
    place, verdict = escape(str(folder.relative_to(overview.root))), everywhere_verdict(folder)
    return (
        f'<tr><td class="text">{EVERYWHERE.text}</td><td>{EVERYWHERE.place}</td>'
        f'<td><a href="{place}/{REPORT}">{place}</a></td><td class="text">{table1_summary(judge(folder))}</td>'
        f'<td><b class="{_CLASS[verdict]}">{verdict}</b></td></tr>'
    )


def _unmeasured(claim: Claim) -> str:
    names = ", ".join(claim.experiments)
    return (
        f'<tr><td class="text">{escape(claim.text)}</td><td>{escape(claim.place)}</td><td>–</td>'
        f'<td class="text"><small>streamnorm run {names}</small></td><td>not measured</td></tr>'
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


def _folder(overview: Overview, name: str, results: Results) -> str:
    """A folder's own words, figure and configuration, and where to read on."""
    folder = overview.root / name
    drawing = folder / "figures" / "summary.svg"
    if not drawing.exists() or not (folder / REPORT).exists():
        build_report(folder)
    items = "\n".join(f"<li>{escape(sentence)}</li>" for sentence in sentences(results))
    notes = "\n".join(f'<p class="warning">{escape(warning)}</p>' for warning in warnings(results))
    protocol = "\n".join(f"<li>{escape(fact)}</li>" for fact in results.protocol if fact)
    link = f'<a href="{name}/{REPORT}">The whole report</a>'
    return (
        f"<h2>{escape(results.experiment.title)}: {escape(results.config['data']['name'])}</h2>\n"
        f"<p>{escape(results.experiment.question)} {link}</p>\n<ul>\n{items}\n</ul>\n"
        f"{notes}\n{figure(drawing.read_text(encoding='utf-8'), *results.experiment.words.summary(results.config))}\n"
        f"<details><summary>Configuration</summary><ul>\n{protocol}\n</ul>\n"
        f"<p>{escape(_options(results))}</p>\n<pre>{escape(chr(10).join(results.config['commands']))}</pre></details>"
    )


def _options(results: Results) -> str:
    options = results.config["options"]
    return "; ".join(f"{name} {value}" for name, value in options.items() if value is not None)


def print_overview(overview: Overview, console: Console) -> None:
    """The verdicts on the terminal."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("claim", "measured", "verdict"):
        table.add_column(name)
    for measured in overview.measured:
        table.add_row(measured.claim.text, f"{measured.folder}\n{describe(measured.tightest)}", measured.verdict)
    console.print(table, highlight=False)
    console.print(in_short(overview), highlight=False)
