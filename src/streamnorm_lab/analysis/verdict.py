"""Sentences computed from the numbers: what held, what did not, and by how much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from streamnorm_lab.analysis.results import Results
from streamnorm_lab.common.score import Score
from streamnorm_lab.common.stats import Interval


def sentences(results: Results) -> list[str]:
    """The verdict, one statement per sentence."""
    return [
        *_failures(results),
        *_comparisons(results),
        *_changes(results),
        *_same_rates(results),
        *_divergences(results),
    ]


def _comparisons(results: Results) -> Iterator[str]:
    score = results.experiment.score
    for ours, theirs in results.experiment.comparisons:
        found = {setting.label: results.difference(ours, theirs, setting) for setting in results.settings}
        parts = [f"{word} {results.method(theirs).label} at {places}" for word, places in _outcomes(score, found)]
        if parts:
            yield f"{results.method(ours).label} is {'; '.join(parts)}."


def _changes(results: Results) -> Iterator[str]:
    """Each method at one setting of a pair, compared with itself at the other one."""
    score = results.experiment.score
    for method in results.methods:
        found = {f"{a.label} against {b.label}": results.change(method.name, a, b) for a, b in results.setting_pairs}
        words = {"ahead of": "better", "not clearly different from": "not clearly different", "behind": "worse"}
        parts = [f"{words[word]} at {places}" for word, places in _outcomes(score, found)]
        if parts:
            yield f"{method.label} is {'; '.join(parts)}."


def _same_rates(results: Results) -> Iterator[str]:
    """The same at equal learning rates, on validation data: the best rate of each may hide what happens there."""
    score = results.experiment.score
    for method in results.methods:
        for left, right in results.setting_pairs:
            ours, theirs = results.cells[method.name, left].tuning, results.cells[method.name, right].tuning
            found = {rate: score.difference(ours[rate] - theirs[rate]) for rate in sorted(ours.keys() & theirs.keys())}
            if found and method.trained_as == method.name:
                listed = _listed([f"{difference} at {rate:g}" for rate, difference in found.items()])
                yield (
                    f"At equal learning rates {method.label} at {left.label} less {right.label} is {listed} "
                    f"({score.unit}, validation)."
                )


def _outcomes(score: Score, found: Mapping[str, Interval | None]) -> Iterator[tuple[str, str]]:
    """The differences by what their intervals say: places, and how large the differences are there."""
    for word in ("ahead of", "not clearly different from", "behind"):
        places = {place: d.mean for place, d in found.items() if d is not None and score.outcome(d) == word}
        if places:
            yield word, f"{_listed(list(places))} ({_range(score, places.values())} {score.unit})"


def _range(score: Score, values: Iterable[float]) -> str:
    ordered = sorted(values)
    lowest, highest = score.difference(ordered[0]), score.difference(ordered[-1])
    return lowest if lowest == highest else f"{lowest} to {highest}"


def _failures(results: Results) -> Iterator[str]:
    for method in results.methods:
        cells = [results.cells[method.name, setting] for setting in results.settings]
        failing = [cell for cell in cells if cell.reason is not None]
        if failing and method.trained_as == method.name:
            places = _listed([cell.setting.label for cell in failing])
            yield f"{method.label} cannot train at {places}: “{failing[0].reason}”."


def _divergences(results: Results) -> Iterator[str]:
    cells = [cell for cell in results.cells.values() if cell.diverged]
    if cells:
        places = [f"{c.method.label} at {c.setting.label} ({c.diverged} of {len(c.runs)} runs)" for c in cells]
        guessing = results.experiment.words.guessing
        yield f"Diverged even at the best rate: {_listed(places)}; such runs count with the {guessing}."


def warnings(results: Results) -> list[str]:
    """Warnings about the numbers, for the reader of a report."""
    return [*_edges(results), *_unfinished(results), *_few_seeds(results)]


def _edges(results: Results) -> Iterator[str]:
    for edge in ("lowest", "highest"):
        places = []
        for method in results.methods:
            cells = [cell for cell in results.cells.values() if cell.method is method and cell.edge == edge]
            if cells:
                places.append(f"{method.label} at {_listed([cell.setting.label for cell in cells])}")
        if places:
            found = "; ".join(places)
            yield f"The best rate is the {edge} one tried for {found}: a better one may lie beyond (--rates)."


def _unfinished(results: Results) -> Iterator[str]:
    if results.unfinished:
        yield (
            f"{results.unfinished} of {len(results.logs)} runs were begun and are not finished; "
            f"continue with: {results.config['commands'][-1]}"
        )


def _few_seeds(results: Results) -> Iterator[str]:
    counts = {len(cell.scores) for cell in results.cells.values() if cell.scores}
    if len(counts) > 1:
        yield f"Not all results have the same number of seeds (from {min(counts)} to {max(counts)})."
    if counts and min(counts) < 3:
        yield "Fewer than three seeds: the intervals say little."


def _listed(items: list[str]) -> str:
    """Join as one writes: a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
