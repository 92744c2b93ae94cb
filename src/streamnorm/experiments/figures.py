"""Figures: final accuracy by setting, curves along the pass, and accuracy by learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from streamnorm.experiments.files import replacing
from streamnorm.experiments.methods import Method
from streamnorm.experiments.results import Cell, Results
from streamnorm.experiments.runlog import LoggedRun
from streamnorm.experiments.stats import interval

INK = "#222222"
FAINT = "#d9d9d9"
STYLE = {
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
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:g}%")


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
    """Final accuracy of each method, from the easiest setting to the hardest."""
    figure = Figure(figsize=(9.2, 5.0), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(results.settings))
    shifts = np.linspace(-0.12, 0.12, len(results.methods))
    labels: list[tuple[float, Method]] = []
    for shift, method in zip(shifts, results.methods, strict=True):
        cells = [results.cells[method.name, setting] for setting in results.settings]
        _draw_method(axes, cells, [place + shift for place in places])
        if cells[-1].mean is not None:
            labels.append((cells[-1].mean.mean, method))
    _label_right(axes, labels, len(results.settings) - 1 + 0.2)
    _mark_failures(axes, results)
    axes.set_xlim(-0.4, len(results.settings) - 0.3)
    axes.set_xticks(list(places), [_setting_text(setting.samples, setting.batches) for setting in results.settings])
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.set_ylabel("test accuracy")
    figure.suptitle(_summary_title(results), x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def _summary_title(results: Results) -> str:
    data = results.config["data"]
    passes = results.config["options"]["epochs"]
    times = "one pass" if passes == 1 else f"{passes} passes"
    return f"Accuracy after {times} over {data['train']:,} images of {data['name']}"


def _setting_text(samples: int, batches: int) -> str:
    return f"{samples}×{batches}\n{samples} per batch,\n{batches} per update"


def _draw_method(axes: Axes, cells: Sequence[Cell], places: Sequence[float]) -> None:
    """A line through the settings at which the method runs, with its 95% intervals."""
    shown = [(place, cell.mean) for place, cell in zip(places, cells, strict=True) if cell.mean is not None]
    if not shown:
        return
    method = cells[0].method
    xs, means = zip(*shown, strict=True)
    axes.plot(xs, [m.mean for m in means], color=method.colour, linewidth=1.6, alpha=0.55, zorder=2)
    axes.errorbar(
        xs,
        [m.mean for m in means],
        yerr=[m.half if m.known else 0 for m in means],
        fmt=method.marker,
        color=method.colour,
        markersize=7,
        markeredgecolor="white",
        markeredgewidth=0.8,
        elinewidth=1.6,
        capsize=2.5,
        zorder=3,
    )


def _label_right(axes: Axes, labels: list[tuple[float, Method]], x: float) -> None:
    """Names at the right end of the lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.052 * (high - low)
    ordered = sorted(labels, key=lambda label: label[0])
    heights = _apart([value for value, _ in ordered], gap)
    for (value, method), height in zip(ordered, heights, strict=True):
        axes.annotate(
            method.label,
            (x - 0.05, value),
            (x + 0.12, height),
            color=method.colour,
            fontweight="bold",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": method.colour, "alpha": 0.5, "linewidth": 0.8},
        )


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
    """Crosses on the floor where a method cannot run, and its name where its line breaks off."""
    bottom = axes.get_ylim()[0]
    for method in results.methods:
        cells = [results.cells[method.name, setting] for setting in results.settings]
        failing = [place for place, cell in enumerate(cells) if cell.mean is None and cell.reason]
        if not failing or method.trained_as != method.name:
            continue
        axes.plot(failing, [bottom] * len(failing), "x", color=method.colour, markersize=8, markeredgewidth=2, clip_on=False)
        for place in failing:
            axes.annotate(
                f"{method.label}\ncannot train",
                (place, bottom),
                (0, 8),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8.5,
                color=method.colour,
            )


def curves(results: Results) -> Figure:
    """Training loss and test accuracy along the pass, a column per setting; bands span the seeds."""
    count = len(results.settings)
    figure = Figure(figsize=(max(6.0, 3.0 * count), 6.4), layout="constrained")
    grid: Any = figure.subplots(2, count, sharex="col", sharey="row", squeeze=False)
    for column, setting in enumerate(results.settings):
        for method in results.methods:
            cell = results.cells[method.name, setting]
            if method.trained_as == method.name:
                _draw_curve(grid[0][column], cell, "train", "loss")
                _draw_curve(grid[1][column], cell, "test", "accuracy")
        grid[0][column].set_title(setting.label)
        grid[1][column].set_xlabel("images seen")
        grid[1][column].xaxis.set_major_locator(MaxNLocator(3))
        grid[1][column].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    grid[0][0].set_ylabel("training loss")
    grid[0][0].set_ylim(*_loss_range(results))
    grid[1][0].set_ylabel("test accuracy")
    grid[1][0].yaxis.set_major_formatter(PERCENT)
    _legend(figure, [method for method in results.methods if method.trained_as == method.name])
    return figure


def _draw_curve(axes: Axes, cell: Cell, split: str, score: str) -> None:
    """The mean over seeds as a line, and a band from the lowest to the highest seed."""
    table = [row for row in _aligned(cell.runs, split, score)]
    if not table:
        return
    images = [image for image, _ in table]
    values = np.array([row for _, row in table])
    colour = cell.method.colour
    axes.plot(images, values.mean(1), color=colour, linewidth=1.8)
    axes.fill_between(images, values.min(1), values.max(1), color=colour, alpha=0.16, linewidth=0)


def _aligned(runs: Sequence[LoggedRun], split: str, score: str) -> Iterator[tuple[int, list[float]]]:
    """For each number of images seen, the values of the runs that got so far."""
    seen = sorted({point["images"] for run in runs for point in run.points})
    for images in seen:
        points = [point for run in runs for point in run.points if point["images"] == images]
        values = [point[split][score] for point in points if split in point and point[split][score] is not None]
        if len(values) == len(runs):
            yield images, values


def _loss_range(results: Results) -> tuple[float, float]:
    """From 0 to a little above guessing, so that one method that blows up does not flatten the others."""
    return 0.0, 1.15 * float(np.log(results.config["data"]["classes"]))


def _legend(figure: Figure, methods: Sequence[Method]) -> None:
    handles = [Line2D([], [], color=method.colour, linewidth=2.4, label=method.label) for method in methods]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(methods), frameon=False)


def rates(results: Results) -> Figure:
    """Validation accuracy by learning rate, a panel per setting; the rate chosen is ringed."""
    count = len(results.settings)
    figure = Figure(figsize=(max(6.0, 3.0 * count), 3.6), layout="constrained")
    panels: Any = figure.subplots(1, count, sharey=True, squeeze=False)
    for axes, setting in zip(panels[0], results.settings, strict=True):
        for method in results.methods:
            _draw_rates(axes, results.cells[method.name, setting])
        axes.set_xscale("log")
        axes.set_title(setting.label)
        axes.set_xlabel("learning rate")
    panels[0][0].set_ylabel("validation accuracy")
    panels[0][0].yaxis.set_major_formatter(PERCENT)
    _legend(figure, results.methods)
    return figure


def _draw_rates(axes: Axes, cell: Cell) -> None:
    if cell.rate is None:
        return
    colour = cell.method.colour
    axes.plot(list(cell.tuning), list(cell.tuning.values()), color=colour, linewidth=1.4, marker=".", markersize=5)
    axes.plot([cell.rate], [cell.tuning[cell.rate]], "o", markerfacecolor="none", markeredgecolor=colour, markersize=9)
