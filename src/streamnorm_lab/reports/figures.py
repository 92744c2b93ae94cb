"""Figures as files: SVG that suits a light and a dark page, and PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from streamnorm_lab.common.chart import Chart, Line, Missing, Panel, Row, stretches
from streamnorm_lab.common.files import replacing

INK, SOFT, FRAME, GRID, SHEET = "#222222", "#5f5f5f", "#888888", "#ececec", "#ffffff"
DARK = {INK: "#e6e6e3", SOFT: "#a5a5a0", FRAME: "#7a7a76", GRID: "#343432", SHEET: "#222220"}
"""The colours that a dark page has in place of the light one's; those of methods become lighter."""
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FRAME,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "svg.hashsalt": "streamnorm",  # the same logs give the same file
    "figure.facecolor": SHEET,
    "savefig.facecolor": SHEET,
}


def save_figures(charts: Mapping[str, Chart], folder: Path) -> None:
    """Draw figures into ``folder``, each as PNG and SVG under its name."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, chart in charts.items():
            save_figure(_single(chart) if chart.single else _grid(chart), folder / name)


def save_figure(figure: Figure, stem: Path) -> None:
    """Write a figure as PNG and SVG."""
    with replacing(stem.with_suffix(".png")) as temporary:
        figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
    save_drawing(figure, stem.with_suffix(".svg"))


def save_drawing(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, with dark colours for readers of dark pages."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
        temporary.write_text(_with_dark_colours(temporary.read_text(encoding="utf-8")), encoding="utf-8")


def _with_dark_colours(svg: str) -> str:
    """The drawing with rules for readers of dark pages, on whose ground it then lies."""
    used = {colour for colour in DARK if colour in svg}
    methods = {part[:7] for part in svg.split(": ")[1:] if part.startswith("#")} - DARK.keys()
    rules = [
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in sorted({**{c: DARK[c] for c in used}, **{c: _lighter(c) for c in methods}}.items())
        for kind in ("fill", "stroke")
        if f"{kind}: {light}" in svg
    ]
    style = f"<style>@media (prefers-color-scheme: dark){{{''.join(rules)}}}</style>"
    return svg.replace("<defs>", f"{style}\n <defs>", 1)


def _lighter(colour: str) -> str:
    """A method's colour on dark ground."""
    red, green, blue = to_rgb(colour)
    lift = 0.5 if max(red, green, blue) < 0.3 else 0.3
    return to_hex((red + lift * (1 - red), green + lift * (1 - green), blue + lift * (1 - blue)))


def _single(chart: Chart) -> Figure:
    """One pair of axes, large, with names at the ends of lines."""
    figure = Figure(figsize=(9.2, 5.2), layout="constrained")
    axes = figure.add_subplot()
    row = chart.rows[0]
    panel = row.panels[0]
    _draw_points(axes, chart, panel)
    low, high = row.span
    room = _room_for_missing(panel) * (high - low)
    axes.set_ylim(*((low, high + room) if row.lower_is_better else (max(0.0, low - room), high)))
    _mark_missing(axes, row, panel)
    if chart.names:
        last = len(chart.names) - 1
        axes.set_xlim(-0.4, last + 0.25)
        axes.set_xticks(range(last + 1), list(chart.names), fontsize=12.5, color=INK)
        axes.tick_params(axis="x", length=0, pad=8)
    _name_ends(axes, panel.lines, gap=0.14 if chart.names else 0.02 * np.ptp(axes.get_xlim()))
    axes.set_xlabel(chart.x, labelpad=6)
    _value_axis(axes, row)
    axes.set_title(f"{chart.title}\n", loc="left", fontsize=14, x=-0.08)
    axes.text(-0.08, 1.035, chart.subtitle, transform=axes.transAxes, color=SOFT, fontsize=10)
    return figure


def _value_axis(axes: Axes, row: Row) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{row.sign}"))
    axes.set_ylabel(row.label + (" (lower is better)" if row.lower_is_better and "lower" not in row.label else ""))


def _draw_points(axes: Axes, chart: Chart, panel: Panel) -> None:
    """Points with intervals, beside each other, joined between breaks."""
    for shift, line in zip(shifts(chart, len(panel.lines)), panel.lines, strict=True):
        x, y = [place + shift for place in line.x], list(line.y)
        strong, bar = (0.3, 0.35) if line.faint else (0.6, 0.8)
        for part in stretches(line.x, chart.breaks):
            axes.plot(x[part], y[part], color=line.colour, linewidth=1.6, alpha=strong)
        axes.errorbar(
            x,
            y,
            yerr=[np.subtract(y, line.low), np.subtract(line.high, y)] if line.low else None,
            fmt=line.marker,
            color=line.colour,
            ecolor=to_rgba(line.colour, bar),
            markersize=7.5,
            markeredgecolor=SHEET,
            markeredgewidth=0.8,
            elinewidth=1.6,
            zorder=2 if line.faint else 3,
        )


def shifts(chart: Chart, count: int) -> Sequence[float]:
    """The shift of each line's points from their place, so that intervals do not cover each other."""
    reach = 0.14 if chart.names else 0.08
    return [float(shift) for shift in np.linspace(-reach, reach, count)] if count > 1 else [0.0] * count


def _name_ends(axes: Axes, lines: Sequence[Line], gap: float) -> None:
    """Names to the right of the lines' ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    for end in sorted({line.x[-1] for line in lines}):
        ordered = sorted((line for line in lines if line.x[-1] == end), key=lambda line: line.y[-1])
        heights = _apart([line.y[-1] for line in ordered], 0.055 * (high - low))
        too_high = max(0.0, heights[-1] - high)  # the title stands above
        for line, height in zip(ordered, (height - too_high for height in heights), strict=True):
            x = [end + gap * 1.2, end + gap * 1.8]
            axes.plot(x, [line.y[-1], height], color=line.colour, alpha=0.6, linewidth=0.9, clip_on=False)
            axes.text(end + 2 * gap, height, line.label, color=line.colour, fontweight="bold", va="center")


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


def _room_for_missing(panel: Panel) -> float:
    """The share of the axis that the words about what cannot train take at its worse end."""
    at = [missing.x for missing in panel.missing]
    return 0.1 + 0.07 * max(map(at.count, at)) if at else 0.0


def _mark_missing(axes: Axes, row: Row, panel: Panel) -> None:
    """Crosses at the worse end of the axis where a method cannot train."""
    end = axes.get_ylim()[1 if row.lower_is_better else 0]
    away, edge = (-1, "top") if row.lower_is_better else (1, "bottom")
    for place in sorted({missing.x for missing in panel.missing}):
        there = [missing for missing in panel.missing if missing.x == place]
        lines = [("cannot train", SOFT), *((missing.label, missing.colour) for missing in reversed(there))]
        for number, (text, colour) in enumerate(lines):
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
        for number, missing in enumerate(there):
            _cross(axes, missing, place + 0.09 * (number - (len(there) - 1) / 2), end)


def _cross(axes: Axes, missing: Missing, x: float, y: float) -> None:
    axes.plot([x], [y], "x", color=missing.colour, markersize=9, markeredgewidth=2.4, clip_on=False)


def _grid(chart: Chart) -> Figure:
    """Panels side by side, so far apart that the labels of their axes do not touch, and a legend above."""
    count = len(chart.rows[0].panels)
    figure = Figure(figsize=(max(9.2, 3.0 * count), 3.0 * len(chart.rows)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)  # type: ignore[union-attr,call-arg]
    grid: Any = figure.subplots(len(chart.rows), count, sharex="col", sharey="row", squeeze=False)
    for row, panels in zip(chart.rows, grid, strict=True):
        for panel, axes in zip(row.panels, panels, strict=True):
            for line in panel.lines:
                _draw_line(axes, chart, line)
            if row is chart.rows[0]:
                axes.set_title(panel.title)
        panels[0].set_ylim(*row.span)
        _value_axis(panels[0], row)
    for column, axes in enumerate(grid[-1]):
        places = sorted({place for row in chart.rows for line in row.panels[column].lines for place in line.x})
        axes.set_xlabel(chart.x)
        if not chart.log:
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        else:
            axes.set_xscale("log")
            if places and places[-1] < 100 * places[0]:  # the usual ticks, at each digit, would overlap
                axes.set_xticks(places, [f"{place:.3g}" for place in places])
                axes.xaxis.set_minor_locator(NullLocator())
    _legend(figure, chart)
    return figure


def all_lines(chart: Chart) -> list[Line]:
    """Every line of every panel."""
    return [line for row in chart.rows for panel in row.panels for line in panel.lines]


def _draw_line(axes: Axes, chart: Chart, line: Line) -> None:
    axes.plot(line.x, line.y, color=line.colour, linewidth=1.6, marker=None if chart.bands else ".", markersize=5)
    if chart.bands:
        axes.fill_between(line.x, line.low, line.high, color=line.colour, alpha=0.16, linewidth=0)
    if line.ring is not None:
        y = line.y[list(line.x).index(line.ring)]
        axes.plot([line.ring], [y], "o", markerfacecolor="none", markeredgecolor=line.colour, markersize=9)


def _legend(figure: Figure, chart: Chart) -> None:
    """The methods' colours above the panels; the figure grows, so that the panels keep their height."""
    colours = {line.label: line.colour for line in all_lines(chart)}
    handles = [Line2D([], [], color=colour, linewidth=2.4, label=label) for label, colour in colours.items()]
    longest = max(map(len, colours), default=0)
    fitting = max(1, int(figure.get_figwidth() / (0.6 + 0.1 * longest)))  # inches
    columns = max(1, min(len(colours), fitting))
    figure.set_figheight(figure.get_figheight() + 0.24 * math.ceil(len(colours) / columns))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False)
