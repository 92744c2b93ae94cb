"""The picture of the README and of the documentation's home: small mini-batches, and images that change.

``make reports`` draws it from the logs; a test compares it with them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from streamnorm_lab.analysis.results import Cell, Results
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.experiments.adapt import Adapt, Evaluated
from streamnorm_lab.reports.facts import OURS, SIZES, newest, of_small_batches, results_of
from streamnorm_lab.reports.figures import FRAME, INK, SHEET, SOFT, STYLE, save_drawing

PICTURE, NARROW = Path("docs", "figures", "evidence.svg"), Path("docs", "figures", "evidence-narrow.svg")
METHODS = {
    "batch": "Batch Normalization",
    "layer": "Layer Normalization",
    "group": "Group Normalization",
    OURS: "Streaming Normalization",
}


def picture(root: Path, narrow: bool = False) -> Figure:
    """Two panels of test accuracy by size of the mini-batch, and one of accuracy on images that change.

    Args:
        root: the folder of results.
        narrow: panels below one another, for the screen of a telephone.
    """
    figure = Figure(figsize=(4.6, 10.6) if narrow else (11.6, 4.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)  # type: ignore[union-attr,call-arg]
    panels: Any = figure.subplots(3, 1) if narrow else figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
    colours: dict[str, tuple[str, str]] = {}
    for axes, (results, kind) in zip(panels, of_small_batches(root), strict=False):
        colours |= _sizes(axes, results)
        axes.set_title(f"{kind.capitalize()} network\n", loc="left")
        _below(axes, f"trained on {results.config['data']['train']:,} images of CIFAR-10")
    _changes(panels[2], results_of(newest(root, "adapt-cifar10", OURS)))
    for axes in panels:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
        axes.set_ylim(bottom=0)
    for axes in panels if narrow else panels[:1]:
        axes.set_ylabel("test accuracy")
    handles = [
        Line2D([], [], color=colours[name][0], marker=colours[name][1], markersize=7, label=label)
        for name, label in METHODS.items()
        if name in colours
    ]
    columns = 1 if narrow else len(handles)
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=11)
    return figure


def _below(axes: Axes, words: str) -> None:
    axes.text(0, 1.03, words, transform=axes.transAxes, color=SOFT, fontsize=9.5)


def _sizes(axes: Axes, results: Results) -> dict[str, tuple[str, str]]:
    """Accuracy by size of the mini-batch; the colours and markers of the methods drawn."""
    names = [name for name in METHODS if (name, Setting.parse(SIZES[0])) in results.cells]
    for shift, name in zip(np.linspace(-0.09, 0.09, len(names)), names, strict=True):
        cells = [results.cells[name, Setting.parse(size)] for size in SIZES]
        _draw(axes, cells, float(shift))
    axes.set_xticks(range(len(SIZES)), [str(Setting.parse(size).samples) for size in SIZES], fontsize=12, color=INK)
    axes.set_xlim(-0.4, len(SIZES) - 0.6)
    axes.set_xlabel("images in a mini-batch")
    return {name: (results.method(name).colour, results.method(name).marker) for name in names}


def _draw(axes: Axes, cells: Sequence[Cell], shift: float) -> None:
    method = cells[0].method
    found = [(place + shift, cell.mean) for place, cell in enumerate(cells) if cell.mean is not None]
    x, means = [place for place, _ in found], [100 * mean.mean for _, mean in found]
    axes.plot(x, means, color=method.colour, linewidth=1.6, alpha=0.6)
    halves = [100 * mean.half if mean.known else 0.0 for _, mean in found]
    axes.errorbar(
        x,
        means,
        halves,
        fmt=method.marker,
        color=method.colour,
        markersize=7,
        markeredgecolor=SHEET,
        markeredgewidth=0.8,
    )
    for place, cell in enumerate(cells):
        if cell.mean is None and cell.reason:
            axes.plot([place], [1.2], "x", color=method.colour, markersize=9, markeredgewidth=2.4)
            axes.text(place, 4, "cannot train", color=method.colour, ha="center", fontsize=10)


def adapted(results: Results) -> tuple[Evaluated, Evaluated]:
    """Streaming Normalization as trained, and adapting."""
    evaluated = {(one.finals.method.name, one.mode): one for one in Adapt.evaluated(results.finals)}
    return evaluated[OURS, "as trained"], evaluated[OURS, "adapting"]


def _changes(axes: Axes, results: Results) -> None:
    """From as trained to adapting, by kind of images."""
    before, after = adapted(results)
    colour = before.finals.method.colour
    for place, kind in enumerate(before.means):
        low, high = 100 * before.means[kind].mean, 100 * after.means[kind].mean
        axes.annotate(
            "",
            (place, high),
            (place, low),
            arrowprops={
                "arrowstyle": "-|>",
                "color": colour,
                "alpha": 0.6,
                "shrinkA": 5,
                "shrinkB": 5,
                "linewidth": 1.6,
            },
        )
        axes.plot([place], [low], "o", markerfacecolor=SHEET, markeredgecolor=FRAME, markeredgewidth=1.8, markersize=8)
        axes.plot([place], [high], "o", color=colour, markersize=8)
        if abs(high - low) > 5:  # the arrow is long enough for numbers at both of its ends
            for value, ink in ((low, SOFT), (high, colour)):
                above = value == max(low, high)
                shift, side = (1.4, "bottom") if above else (-1.6, "top")
                axes.text(place, value + shift, f"{value:.0f}", ha="center", va=side, fontsize=10, color=ink)
    axes.set_xticks(range(len(before.means)), list(before.means), fontsize=10.5, color=INK, rotation=35)
    axes.set_xlim(-0.5, len(before.means) - 0.5)
    axes.set_xlabel("test images")
    axes.set_title("Adapting without labels\n", loc="left")
    _below(axes, "one image at a time; grey: as trained")


def save_pictures(home: Path, folder: Path) -> None:
    """Draw the picture of a checkout's results for wide screens and for narrow ones."""
    with matplotlib.rc_context({**STYLE, "font.size": 11}):
        for path in (PICTURE, NARROW):
            save_drawing(picture(home / "results", narrow=path is NARROW), folder / path.name)


if __name__ == "__main__":
    home = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    save_pictures(home, (home / PICTURE).parent)
