"""The first sentence of a report: what came out, in plain words, computed from the numbers."""

from __future__ import annotations

from collections.abc import Iterable

from streamnorm_lab.analysis.results import Cell, Results
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.common.stats import Interval
from streamnorm_lab.methods.method import Method

MANY = 8
"""From so many methods on, a sentence gives the main one's place among them, and not all of their numbers."""

FAMILIES = ("Batch", "Recalibrated Batch", "Layer", "Group", "Instance", "Online", "RMS")


def headline(results: Results) -> str:
    """The outcome of an experiment, in one or two sentences."""
    section = results.section
    if section is not None and section.headline:
        return section.headline
    if results.setting_pairs:
        return _pairs(results)
    if results.experiment.across:
        return _orders(results)
    if len(results.methods) >= MANY:
        return _places(results)
    return _alone(results) if len(results.settings) == 1 else _downwards(results)


def plain(method: Method) -> str:
    """A method's name in a sentence.

    Example:
        >>> from streamnorm_lab.methods.layers import METHODS
        >>> plain(METHODS["batch"]), plain(METHODS["streaming-l1"])
        ('Batch Normalization', 'Streaming L1')
    """
    return f"{method.label} Normalization" if method.label in FAMILIES else method.label


def main_method(results: Results) -> str:
    """The method that the experiment is about, if it was run; else the best one at the hardest setting."""
    name = results.experiment.comparisons[0][0]
    if any(cell.mean is not None for (method, _), cell in results.cells.items() if method == name):
        return name
    ordered = _ordered(results, results.settings[-1])
    return ordered[0].method.name if ordered else results.methods[0].name


def _cells(results: Results, setting: Setting) -> list[Cell]:
    return [results.cells[method.name, setting] for method in results.methods]


def _ordered(results: Results, setting: Setting) -> list[Cell]:
    """The cells with a result at a setting, the best one first."""
    sign = 1 if results.experiment.score.lower_is_better else -1
    found = [cell for cell in _cells(results, setting) if cell.mean is not None]
    return sorted(found, key=lambda cell: sign * (cell.mean.mean if cell.mean else 0.0))


def _value(results: Results, cell: Cell) -> str:
    return "no result" if cell.mean is None else results.experiment.score.value(cell.mean.mean)


def _downwards(results: Results) -> str:
    """From large mini-batches to small ones: the main method, Batch Normalization, and the best of the others."""
    easy, hard = results.settings[0], results.settings[-1]
    main = main_method(results)
    label = plain(results.method(main))
    ours = [results.cells[main, setting] for setting in (easy, hard)]
    parts = [
        f"{label} reaches a {results.experiment.words.measure} of {_value(results, ours[0])} with {easy.words} and of "
        f"{_value(results, ours[1])} with {hard.words}"
    ]
    if main != "batch" and ("batch", easy) in results.cells:
        parts.append(_fall(results, results.cells["batch", easy], results.cells["batch", hard]))
    others = [cell for cell in _ordered(results, hard) if cell.method.trained_as not in (main, "batch")]
    if others:
        parts.append(f"the best of the others there is {plain(others[0].method)} with {_value(results, others[0])}")
    return _sentence(parts)


def _fall(results: Results, easy: Cell, hard: Cell) -> str:
    """A method from its easiest to its hardest setting."""
    label, start = plain(easy.method), _value(results, easy)
    if hard.mean is None and hard.reason:
        return f"{label} reaches {start} with {easy.setting.words} and cannot train with {hard.setting.words}"
    return f"{label} goes from {start} to {_value(results, hard)}"


def _alone(results: Results) -> str:
    """One setting: the methods in order."""
    setting = results.settings[0]
    listed = [f"{plain(cell.method)} {_value(results, cell)}" for cell in _ordered(results, setting)]
    failing = [plain(cell.method) for cell in _cells(results, setting) if cell.mean is None and cell.reason]
    parts = [f"With {setting.words} the {results.experiment.words.measure}, best first, is: {', '.join(listed)}"]
    return _sentence(parts + [f"{name} cannot train" for name in failing])


def _places(results: Results) -> str:
    """Many methods: which one is best, and the place of the main one."""
    main = main_method(results)
    parts = []
    for setting in dict.fromkeys((results.settings[0], results.settings[-1])):
        ordered = _ordered(results, setting)
        place = next((i for i, cell in enumerate(ordered, start=1) if cell.method.name == main), None)
        if place is None:
            continue
        other = ordered[1] if place == 1 and len(ordered) > 1 else ordered[0]
        best = "best other" if place == 1 else "best"
        parts.append(
            f"With {setting.words} {plain(results.method(main))} is number {place} of {len(ordered)}, with a "
            f"{results.experiment.words.measure} of {_value(results, ordered[place - 1])}; the {best} is "
            f"{plain(other.method)} with {_value(results, other)}"
        )
    return " ".join(f"{part}." for part in parts)


def _pairs(results: Results) -> str:
    """Each method at a setting beside itself at another one: the pair that the experiment names last."""
    left, right = results.setting_pairs[-1]
    parts = []
    for method in results.methods:
        change = results.change(method.name, left, right)
        if change is not None and method.trained_as == method.name:
            before, after = (_value(results, results.cells[method.name, setting]) for setting in (right, left))
            parts.append(f"{plain(method)} goes from {before} to {after} ({_clearly(results, change)})")
    if not parts:
        return ""
    return _sentence(
        [f"When the weights change after {left.batches} mini-batches of {left.samples}, not after each, {parts[0]}"]
        + parts[1:]
    )


def _clearly(results: Results, difference: Interval) -> str:
    score = results.experiment.score
    amount = f"{score.difference(difference.mean)} {score.unit}"
    return f"{amount}, not clearly a change" if score.outcome(difference).startswith("not") else amount


def _orders(results: Results) -> str:
    """A number that methods differ in: where it is as good as the reference's, and where not."""
    setting, reference, score = results.settings[0], results.experiment.reference, results.experiment.score
    family = results.experiment.family(results.method(reference))
    found: dict[str, list[str]] = {word: [] for word in ("behind", "not clearly different from", "ahead of")}
    for method in results.methods:
        other = results.experiment.family(method)
        difference = results.difference(method.name, reference, setting)
        if family and other and other[0] == family[0] and method.name != reference and difference is not None:
            outcome = score.outcome(difference)
            amount = "" if outcome.startswith("not") else f" ({score.difference(difference.mean)} {score.unit})"
            found[outcome].append(f"{other[1]:g}{amount}")
    if family is None or not any(found.values()):
        return ""
    symbol = (results.experiment.across or "").partition(",")[0]
    base = f"{symbol} = {family[1]:g}"
    parts = [
        f"with {symbol} = {_listed(numbers)} is {word} that with {base}" for word, numbers in found.items() if numbers
    ]
    return _sentence(
        [f"{family[0]} Normalization {parts[0]}", *(part.replace(" is ", " it is ") for part in parts[1:])]
    )


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _sentence(parts: Iterable[str]) -> str:
    return "; ".join(parts) + "."
