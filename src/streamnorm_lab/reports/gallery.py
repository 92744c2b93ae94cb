"""The gallery of all experiments, for the documentation: figure, first sentence and command of each result folder."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.analysis.headline import headline
from streamnorm_lab.analysis.results import CONFIG, Results
from streamnorm_lab.experiments.catalogue import EXPERIMENTS
from streamnorm_lab.reports.report import REPORT


def gallery(root: Path, address: str) -> str:
    """Markdown with a heading for each experiment and a card for each of its folders below ``root``.

    Args:
        root: the folder of all results.
        address: the address of that folder, seen from the page.
    """
    found = {path.parent: open_results(path.parent) for path in sorted(root.glob(f"**/{CONFIG}"))}
    return "\n".join(_sections(root, address, found))


def _sections(root: Path, address: str, found: dict[Path, Results]) -> Iterator[str]:
    for experiment in EXPERIMENTS.values():
        folders = {folder: results for folder, results in found.items() if results.experiment is experiment}
        yield f"## {experiment.title}\n\n{experiment.question}\n"
        cards = [_card(folder.relative_to(root).as_posix(), address, results) for folder, results in folders.items()]
        if cards:
            yield "```{raw} html\n" + f'<div class="gallery">{"".join(cards)}</div>' + "\n```\n"
        else:
            yield f"No results are kept here yet. `streamnorm run {experiment.name}` makes some.\n"


def _card(name: str, address: str, results: Results) -> str:
    place = f"{address}/{name}"
    command = escape(results.config["commands"][-1])
    return (
        f'<article id="{escape(name)}"><a href="{place}/{REPORT}">'
        f'<img src="{place}/figures/summary.svg" alt="{escape(headline(results))}" loading="lazy"></a>'
        f'<p><a href="{place}/{REPORT}"><b>{escape(name)}</b></a> {escape(headline(results))}</p>'
        f"<details><summary>Command</summary><pre>{command}</pre></details></article>\n"
    )
