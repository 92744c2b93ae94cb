"""The figures of an experiment as values: final score, curves along the run, and score by learning rate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from streamnorm_lab.analysis.results import Cell, Results
from streamnorm_lab.common.chart import Chart, Line, Missing, Panel, Row, fit, span
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.experiments.wording import SETTINGS, data_name
from streamnorm_lab.logs.runlog import LoggedRun
from streamnorm_lab.methods.method import Method


def charts(results: Results) -> dict[str, Chart]:
    """The figures by name; ``summary`` answers the experiment's question."""
    section = results.section
    own = section.chart if section is not None else None
    return {"summary": own or summary(results), "curves": curves(results), "rates": rates(results)}


def summary(results: Results) -> Chart:
    """Final score of each method: from the easiest setting to the hardest, or by the option that is asked about."""
    description, caption = results.experiment.words.summary(results.config)
    lines, x, names = _by_option(results) if results.experiment.across else _by_setting(results)
    panel = Panel("", lines, tuple(_missing(results)) if names else ())
    return Chart(
        title=f"{results.experiment.title}: {data_name(results.config)}",
        subtitle=f"{results.experiment.words.length(results.config)}, each method at its best learning rate, "
        f"{results.spread}",
        description=description,
        caption=f"{caption} {SETTINGS}" if names else caption,
        x=x,
        rows=(_row(results, results.experiment.words.test_axis, [panel], fit(lines)),),
        names=names,
        breaks=_breaks(results.settings) if names else (),
    )


def _row(results: Results, label: str, panels: Sequence[Panel], axis: tuple[float, float]) -> Row:
    score = results.experiment.score
    return Row(label, panels, axis, "%" if score.sign == "%" else "", score.digits, score.lower_is_better)


def _by_setting(results: Results) -> tuple[list[Line], str, list[str]]:
    lines = []
    for method in results.methods:
        cells = [results.cells[method.name, setting] for setting in results.settings]
        found = {float(place): cell for place, cell in enumerate(cells) if cell.mean is not None}
        if found:
            lines.append(_line(results, method, found))
    words = "samples per mini-batch × mini-batches per weight update"
    return lines, words, [setting.label for setting in results.settings]


def _by_option(results: Results) -> tuple[list[Line], str, list[str]]:
    """Final score by a number among the methods' options, a line for all methods that differ in it alone."""
    families: dict[tuple[str, Setting], dict[float, Cell]] = defaultdict(dict)
    for method in results.methods:
        family = results.experiment.family(method)
        for setting in results.settings if family is not None else ():
            cell = results.cells[method.name, setting]
            if cell.mean is not None and family is not None:
                families[family[0], setting][family[1]] = cell
    lines = []
    for (name, setting), found in families.items():
        first = next(iter(found.values())).method
        label = name if len(results.settings) == 1 else f"{name}, {setting.label}"
        lines.append(_line(results, first, dict(sorted(found.items())), label))
    return lines, f"{results.experiment.across} ({', '.join(s.label for s in results.settings)})", []


def _line(results: Results, method: Method, found: Mapping[float, Cell], label: str | None = None) -> Line:
    factor = results.experiment.score.factor
    means = [cell.mean for cell in found.values() if cell.mean is not None]
    halves = [mean.half if mean.known else 0.0 for mean in means]
    return Line(
        label or method.label,
        method.colour,
        method.marker,
        tuple(found),
        tuple(factor * mean.mean for mean in means),
        tuple(factor * (mean.mean - half) for mean, half in zip(means, halves, strict=True)),
        tuple(factor * (mean.mean + half) for mean, half in zip(means, halves, strict=True)),
        faint=method.name == "none",  # what nobody recommends stays in the background
    )


def _breaks(settings: Sequence[Setting]) -> tuple[float, ...]:
    """The places where mini-batches get larger again: a line across would say nothing."""
    return tuple(float(at) for at in range(1, len(settings)) if settings[at].samples > settings[at - 1].samples)


def _missing(results: Results) -> Iterator[Missing]:
    """The settings at which a method cannot run."""
    for place, setting in enumerate(results.settings):
        for method in trained(results):
            cell = results.cells[method.name, setting]
            if cell.mean is None and cell.reason is not None:
                yield Missing(method.label, method.colour, float(place), cell.reason)


def trained(results: Results) -> list[Method]:
    """The methods that are trainings of their own."""
    return [method for method in results.methods if method.trained_as == method.name]


def curves(results: Results) -> Chart:
    """Training loss and test score along the run, a column per setting; bands span the seeds."""
    description, caption = results.experiment.words.curves(results.config)
    words, score = results.experiment.words, results.experiment.score
    loss = [_curve_panel(results, setting, "train", "loss", 1.0) for setting in results.settings]
    test = [_curve_panel(results, setting, "test", score.key, score.factor) for setting in results.settings]
    guessing = math.log(results.config["data"]["classes"])
    test_span = span([v for line in _lines(test) for v in (*line.low, *line.high)])
    if score.key == "loss":
        test_span = _loss_span(test, guessing)
    return Chart(
        title="Along the way",
        subtitle="",
        description=description,
        caption=caption,
        x=f"{results.experiment.kind.unit} seen",
        rows=(
            Row("training loss", loss, _loss_span(loss, guessing), "", 3, True),
            _row(results, words.test_curve, test, test_span),
        ),
        bands=True,
    )


def _lines(panels: Iterable[Panel]) -> Iterator[Line]:
    for panel in panels:
        yield from panel.lines


def _loss_span(panels: Sequence[Panel], guessing: float) -> tuple[float, float]:
    """Around the means, cut a little above guessing: one method that blows up must not flatten the others."""
    low, high = span([value for line in _lines(panels) for value in line.y])
    return low, min(high, 1.05 * guessing)


def _curve_panel(results: Results, setting: Setting, split: str, score: str, factor: float) -> Panel:
    unit = results.experiment.kind.unit
    lines = []
    for method in trained(results):
        table = list(_aligned(results.cells[method.name, setting].runs, split, score, unit))
        if table:
            values = [[factor * value for value in row] for _, row in table]
            lines.append(
                Line(
                    method.label,
                    method.colour,
                    method.marker,
                    tuple(float(place) for place, _ in table),
                    tuple(sum(row) / len(row) for row in values),
                    tuple(map(min, values)),
                    tuple(map(max, values)),
                )
            )
    return Panel(setting.label, lines)


def _aligned(runs: Sequence[LoggedRun], split: str, score: str, unit: str) -> Iterator[tuple[int, list[float]]]:
    """For each number of images or characters seen, the values of the runs that got so far."""
    seen = sorted({point[unit] for run in runs for point in run.points})
    for place in seen:
        points = [point for run in runs for point in run.points if point[unit] == place]
        values = [point[split][score] for point in points if split in point and point[split][score] is not None]
        if len(values) == len(runs):
            yield place, values


def rates(results: Results) -> Chart:
    """Validation score by learning rate, a panel per setting; the rate chosen is ringed."""
    description, caption = results.experiment.words.rates()
    score = results.experiment.score
    panels = []
    for setting in results.settings:
        cells = [results.cells[method.name, setting] for method in results.methods]
        panels.append(Panel(setting.label, [_rate_line(results, cell) for cell in cells if cell.tuning]))
    axis = span([value for line in _lines(panels) for value in line.y])
    if score.key == "loss":
        axis = _loss_span(panels, math.log(results.config["data"]["classes"]))
    return Chart(
        title="Learning rates",
        subtitle="",
        description=description,
        caption=caption,
        x="learning rate",
        rows=(_row(results, results.experiment.words.validation_axis, panels, axis),),
        log=True,
    )


def _rate_line(results: Results, cell: Cell) -> Line:
    method, factor = cell.method, results.experiment.score.factor
    values = tuple(factor * value for value in cell.tuning.values())
    return Line(method.label, method.colour, method.marker, tuple(cell.tuning), values, ring=cell.rate)
