"""Figures: final score by setting, curves along the run, and score by learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from streamnorm_lab.analysis.results import Cell, Results
from streamnorm_lab.common.files import replacing
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.common.stats import Interval
from streamnorm_lab.logs.runlog import LoggedRun
from streamnorm_lab.methods.method import Method

INK = "#222222"
FAINT = "#d9d9d9"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#ececec",
    "svg.hashsalt": "streamnorm",  # the same logs give the same file
    "figure.facecolor": "white",
}


def save_figures(results: Results, folder: Path) -> dict[str, str]:
    """Draw all figures into ``folder``, each as PNG and SVG; return the SVG text of each by name."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figures = {"summary": summary(results), "curves": curves(results), "rates": rates(results)}
        return {name: _save(figure, folder / name) for name, figure in figures.items()}


def _save(figure: Figure, stem: Path) -> str:
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        with replacing(stem.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, format=suffix[1:], dpi=160, metadata=metadata)
    return stem.with_suffix(".svg").read_text(encoding="utf-8")


def summary(results: Results) -> Figure:
    """Final score of each method, from the easiest setting to the hardest."""
    figure = Figure(figsize=(9.2, 5.2), layout="constrained")
    axes = figure.add_subplot()
    last = len(results.settings) - 1
    shifts = np.linspace(-0.14, 0.14, len(results.methods))
    ends: dict[int, list[tuple[float, Method]]] = {}
    for shift, method in zip(shifts, results.methods, strict=True):
        means = {place: mean for place, mean in enumerate(_means(results, method)) if mean is not None}
        if means:
            _draw_method(axes, method, means, shift, _rows(results.settings))
            end = max(means)
            ends.setdefault(end, []).append((means[end].mean, method))
    axes.set_ylim(*_height_range(results))
    for place, labels in ends.items():
        _label(axes, labels, place + 0.14)
    _mark_failures(axes, results)
    axes.set_xlim(-0.4, last + 0.25)
    axes.set_xticks(range(last + 1), [setting.label for setting in results.settings], fontsize=12.5, color=INK)
    axes.tick_params(axis="x", length=0, pad=8)
    axes.set_xlabel("samples per mini-batch × mini-batches per weight update", labelpad=6)
    _score_axis(axes, results, results.experiment.words.test_axis)
    title, subtitle = _summary_titles(results)
    axes.set_title(f"{title}\n", loc="left", fontsize=14, x=-0.08)
    axes.text(-0.08, 1.035, subtitle, transform=axes.transAxes, color="#666666", fontsize=10)
    return figure


def _score_axis(axes: Axes, results: Results, label: str) -> None:
    score = results.experiment.score
    if score.sign == "%":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{score.factor * value:g}%"))
    axes.set_ylabel(label)


def _means(results: Results, method: Method) -> list[Interval | None]:
    return [results.cells[method.name, setting].mean for setting in results.settings]


def _height_range(results: Results) -> tuple[float, float]:
    """The range of the means, with room at the worse end for the words about what cannot train."""
    means = [cell.mean.mean for cell in results.cells.values() if cell.mean is not None]
    low, high = min(means, default=0.0), max(means, default=1.0)
    room = max(high - low, 0.05)
    words = (0.15 + 0.07 * max(len(_failing(results, setting)) for setting in results.settings)) * room
    if results.experiment.score.lower_is_better:
        return low - 0.1 * room, min(high, _guessing(results)) + words
    return max(0.0, low - words), min(1.005, high + 0.1 * room)


def _summary_titles(results: Results) -> tuple[str, str]:
    data = results.config["data"]
    seeds = max(len(cell.scores) for cell in results.cells.values())
    return (
        f"{results.experiment.title}: {data['name']}",
        f"{results.experiment.words.length(results.config)}, each method at its best learning rate, "
        f"mean and 95% interval of {seeds} seeds",
    )


def _rows(settings: Sequence[Setting]) -> list[range]:
    """Stretches of settings in which mini-batches only get smaller: a line across their ends would say nothing."""
    starts = [at for at in range(len(settings)) if at == 0 or settings[at].samples > settings[at - 1].samples]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(settings)], strict=True)]


def _draw_method(axes: Axes, method: Method, means: dict[int, Interval], shift: float, rows: list[range]) -> None:
    """Points with 95% intervals, joined where neighbouring settings of a row both have a result."""
    plain = method.name == "none"  # what nobody recommends stays in the background
    line, bar = (0.3, 0.35) if plain else (0.6, 0.8)
    for row in rows:
        heights = [means[place].mean if place in means else np.nan for place in row]
        axes.plot([place + shift for place in row], heights, color=method.colour, linewidth=1.6, alpha=line)
    axes.errorbar(
        [place + shift for place in means],
        [mean.mean for mean in means.values()],
        yerr=[mean.half if mean.known else 0 for mean in means.values()],
        fmt=method.marker,
        color=method.colour,
        ecolor=to_rgba(method.colour, bar),
        markersize=7.5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        elinewidth=1.6,
        zorder=2 if plain else 3,
    )


def _label(axes: Axes, labels: list[tuple[float, Method]], x: float) -> None:
    """Names to the right of the lines' ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    ordered = sorted(labels, key=lambda label: label[0])
    heights = _apart([value for value, _ in ordered], 0.055 * (high - low))
    too_high = max(0.0, heights[-1] - high)  # the title stands above
    heights = [height - too_high for height in heights]
    for (value, method), height in zip(ordered, heights, strict=True):
        axes.plot([x + 0.03, x + 0.11], [value, height], color=method.colour, alpha=0.6, linewidth=0.9, clip_on=False)
        axes.text(x + 0.14, height, method.label, color=method.colour, fontweight="bold", va="center")


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Move sorted values as little as is easily done so that neighbours are at least ``gap`` apart."""
    moved = list(values)
    for _ in range(200):
        for i in range(len(moved) - 1):
            overlap = gap - (moved[i + 1] - moved[i])
            if overlap > 1e-12:
                moved[i] -= overlap / 2
                moved[i + 1] += overlap / 2
    return moved


def _mark_failures(axes: Axes, results: Results) -> None:
    """Crosses at the worse end of the axis where a method cannot run."""
    lower_is_better = results.experiment.score.lower_is_better
    end = axes.get_ylim()[1 if lower_is_better else 0]
    away, edge = (-1, "top") if lower_is_better else (1, "bottom")
    for place, setting in enumerate(results.settings):
        failing = _failing(results, setting)
        lines = [("cannot train", "#666666"), *((method.label, method.colour) for method in reversed(failing))]
        for number, (text, colour) in enumerate(lines if failing else []):
            axes.annotate(
                text,
                (place, end),
                (0, away * (9 + 13 * number)),
                textcoords="offset points",
                ha="center",
                va=edge,
                fontsize=9.5,
                color=colour,
            )
        for number, method in enumerate(failing):
            x = place + 0.09 * (number - (len(failing) - 1) / 2)
            axes.plot([x], [end], "x", color=method.colour, markersize=9, markeredgewidth=2.4, clip_on=False)


def _failing(results: Results, setting: Setting) -> list[Method]:
    """The methods that cannot run at a setting."""
    trained = [method for method in results.methods if method.trained_as == method.name]
    cells = (results.cells[method.name, setting] for method in trained)
    return [cell.method for cell in cells if cell.mean is None and cell.reason is not None]


def _panels(count: int, height: float) -> Figure:
    """A figure for panels side by side, so far apart that the labels of their axes do not touch."""
    figure = Figure(figsize=(max(9.2, 3.0 * count), height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)  # type: ignore[union-attr,call-arg]
    return figure


def curves(results: Results) -> Figure:
    """Training loss and test score along the run, a column per setting; bands span the seeds."""
    count, unit, score = len(results.settings), results.experiment.kind.unit, results.experiment.score
    figure = _panels(count, 6.0)
    grid: Any = figure.subplots(2, count, sharex="col", sharey="row", squeeze=False)
    for column, setting in enumerate(results.settings):
        for method in results.methods:
            cell = results.cells[method.name, setting]
            if method.trained_as == method.name:
                _draw_curve(grid[0][column], cell, "train", "loss", unit)
                _draw_curve(grid[1][column], cell, "test", score.key, unit)
        grid[0][column].set_title(setting.label)
        grid[1][column].set_xlabel(f"{unit} seen")
        grid[1][column].xaxis.set_major_locator(MaxNLocator(3))
        grid[1][column].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    grid[0][0].set_ylabel("training loss")
    grid[0][0].set_ylim(*_loss_range(results, "train"))
    _score_axis(grid[1][0], results, results.experiment.words.test_curve)
    if score.key == "loss":
        grid[1][0].set_ylim(*_loss_range(results, "test"))
    _legend(figure, [method for method in results.methods if method.trained_as == method.name])
    return figure


def _draw_curve(axes: Axes, cell: Cell, split: str, score: str, unit: str) -> None:
    """The mean over seeds as a line, and a band from the lowest to the highest seed."""
    table = list(_aligned(cell.runs, split, score, unit))
    if not table:
        return
    seen = [place for place, _ in table]
    values = np.array([row for _, row in table])
    colour = cell.method.colour
    axes.plot(seen, values.mean(1), color=colour, linewidth=1.8)
    axes.fill_between(seen, values.min(1), values.max(1), color=colour, alpha=0.16, linewidth=0)


def _aligned(runs: Sequence[LoggedRun], split: str, score: str, unit: str) -> Iterator[tuple[int, list[float]]]:
    """For each number of images or characters seen, the values of the runs that got so far."""
    seen = sorted({point[unit] for run in runs for point in run.points})
    for place in seen:
        points = [point for run in runs for point in run.points if point[unit] == place]
        values = [point[split][score] for point in points if split in point and point[split][score] is not None]
        if len(values) == len(runs):
            yield place, values


def _loss_range(results: Results, split: str) -> tuple[float, float]:
    points = [point[split]["loss"] for cell in results.cells.values() for run in cell.runs for point in run.points]
    return results.experiment.words.loss_axis([loss for loss in points if loss is not None], _guessing(results))


def _guessing(results: Results) -> float:
    """The loss of guessing among all classes alike."""
    return float(np.log(results.config["data"]["classes"]))


def _legend(figure: Figure, methods: Sequence[Method]) -> None:
    """The methods' colours above the panels; the figure grows, so that the panels keep their height."""
    handles = [Line2D([], [], color=method.colour, linewidth=2.4, label=method.label) for method in methods]
    longest = max((len(method.label) for method in methods), default=0)
    fitting = max(1, int(figure.get_figwidth() / (0.6 + 0.1 * longest)))  # inches
    columns = min(len(methods), fitting)
    figure.set_figheight(figure.get_figheight() + 0.24 * math.ceil(len(methods) / columns))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False)


def rates(results: Results) -> Figure:
    """Validation score by learning rate, a panel per setting; the rate chosen is ringed."""
    count = len(results.settings)
    figure = _panels(count, 3.2)
    grid = sorted({rate for cell in results.cells.values() for rate in cell.tuning})
    panels: Any = figure.subplots(1, count, sharey=True, squeeze=False)
    for axes, setting in zip(panels[0], results.settings, strict=True):
        for method in results.methods:
            _draw_rates(axes, results.cells[method.name, setting])
        axes.set_xscale("log")
        axes.set_title(setting.label)
        axes.set_xlabel("learning rate")
        if grid and grid[-1] < 100 * grid[0]:  # the usual ticks, at each digit, would overlap
            axes.set_xticks(grid, [f"{rate:g}" for rate in grid])
            axes.xaxis.set_minor_locator(NullLocator())
    _score_axis(panels[0][0], results, results.experiment.words.validation_axis)
    if results.experiment.score.key == "loss":
        tuned = [loss for cell in results.cells.values() for loss in cell.tuning.values()]
        panels[0][0].set_ylim(*results.experiment.words.loss_axis(tuned, _guessing(results)))
    _legend(figure, results.methods)
    return figure


def _draw_rates(axes: Axes, cell: Cell) -> None:
    if cell.rate is None:
        return
    colour = cell.method.colour
    axes.plot(list(cell.tuning), list(cell.tuning.values()), color=colour, linewidth=1.4, marker=".", markersize=5)
    axes.plot([cell.rate], [cell.tuning[cell.rate]], "o", markerfacecolor="none", markeredgecolor=colour, markersize=9)
