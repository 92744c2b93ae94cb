"""Sentences computed from the numbers: what held, what did not, and by how much."""

from __future__ import annotations

from collections.abc import Iterator

from streamnorm.experiments.methods import METHODS
from streamnorm.experiments.results import Results
from streamnorm.experiments.stats import Interval


def percent(value: float) -> str:
    """An accuracy as a reader sees it.

    Example:
        >>> percent(0.9312)
        '93.1%'
    """
    return f"{100 * value:.1f}%"


def points(value: float) -> str:
    """A difference of accuracies in percentage points, with its sign.

    Example:
        >>> points(-0.0123)
        '−1.2'
    """
    return f"{100 * value:+.1f}".replace("-", "−")


def between(difference: Interval) -> str:
    """The 95% interval of a difference in words, if it is known."""
    return f"{points(difference.low)} to {points(difference.high)}" if difference.known else "one seed only"


def sentences(results: Results) -> list[str]:
    """The verdict, one statement per sentence."""
    return [*_failures(results), *_comparisons(results), *_divergences(results)]


def _comparisons(results: Results) -> Iterator[str]:
    for ours, theirs in results.experiment.comparisons:
        outcomes: dict[str, list[str]] = {"ahead": [], "behind": [], "not told apart": []}
        for setting in results.settings:
            difference = results.difference(ours, theirs, setting)
            if difference is not None:
                text = f"{setting.label} ({points(difference.mean)} points, {between(difference)})"
                outcomes[_outcome(difference)].append(text)
        parts = [f"{outcome} at {_listed(places)}" for outcome, places in outcomes.items() if places]
        if parts:
            yield f"{METHODS[ours].label} against {METHODS[theirs].label}: {'; '.join(parts)}."


def _outcome(difference: Interval) -> str:
    if difference.known and difference.low > 0:
        return "ahead"
    if difference.known and difference.high < 0:
        return "behind"
    return "not told apart"


def _failures(results: Results) -> Iterator[str]:
    for method in results.methods:
        cells = [results.cells[method.name, setting] for setting in results.settings]
        failing = [cell for cell in cells if cell.reason is not None]
        if failing and method.trained_as == method.name:
            places = _listed([cell.setting.label for cell in failing])
            yield f"{method.label} cannot train at {places}: “{failing[0].reason}”."


def _divergences(results: Results) -> Iterator[str]:
    for (name, setting), cell in results.cells.items():
        if cell.diverged:
            yield (
                f"{METHODS[name].label} diverged in {cell.diverged} of {len(cell.runs)} runs at {setting.label}, "
                f"at its best rate {cell.rate:g}; they count with the accuracy of guessing."
            )


def warnings(results: Results) -> list[str]:
    """What a reader should know before trusting the numbers."""
    return [*_edges(results), *_unfinished(results), *_few_seeds(results)]


def _edges(results: Results) -> Iterator[str]:
    for edge in ("lowest", "highest"):
        cells = [cell for cell in results.cells.values() if cell.edge == edge]
        if cells:
            places = _listed([f"{cell.method.label} {cell.setting.label} ({cell.rate:g})" for cell in cells])
            yield f"The best rate is the {edge} of the grid for {places}: a better one may lie beyond; widen --rates."


def _unfinished(results: Results) -> Iterator[str]:
    if results.unfinished:
        yield (
            f"{results.unfinished} of {len(results.logs)} runs were begun and are not finished; "
            f"continue with: {results.config['commands'][-1]}"
        )


def _few_seeds(results: Results) -> Iterator[str]:
    counts = {len(cell.accuracy) for cell in results.cells.values() if cell.accuracy}
    if len(counts) > 1:
        yield f"Not all results have the same number of seeds (from {min(counts)} to {max(counts)})."
    if counts and min(counts) < 3:
        yield "Fewer than three seeds: the intervals say little."


def _listed(items: list[str]) -> str:
    """Join as one writes: a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
