"""The figure: ratios to the stock layers, with quartiles and targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from streamnorm_lab.bench.results import Results, TimeRow, together
from streamnorm_lab.common.files import replacing
from streamnorm_lab.reports.figures import INK, STYLE

COLOURS = {"L1": "#0072b2", "L2": "#d55e00"}
SHIFT = 0.15


def save_figure(results: Results, folder: Path) -> None:
    """Draw ``ratios.png`` and ``ratios.svg``, where layers were measured beside those of torch.nn."""
    if not any(row.stock for row in results.times):
        return
    with matplotlib.rc_context(STYLE):
        figure = ratios(results)
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            with replacing(folder / f"ratios.{suffix}") as temporary:
                figure.savefig(temporary, format=suffix, dpi=160, metadata=metadata)


def ratios(results: Results) -> Figure:
    """A line per case and a column per number of threads; the tick is the target."""
    rows = [row for row in together(results.times) if row.stock]
    cases = list(dict.fromkeys((row.suite, row.case, row.rival) for row in rows))
    threads = sorted({row.threads for row in rows})
    figure = Figure(figsize=(3.4 + 3.4 * len(threads), 1.9 + 0.33 * len(cases)), layout="constrained")
    columns: Any = figure.subplots(1, len(threads), sharex=True, sharey=True, squeeze=False)
    for axes, count in zip(columns[0], threads):
        _draw(axes, [row for row in rows if row.threads == count], cases)
        axes.set_title(f"{count} thread{'s' * (count > 1)}", loc="left")
    figure.suptitle("Time of forward and backward, as ratio to the stock layer", x=0.01, ha="left", fontsize=13)
    figure.supxlabel(
        "below 1 is faster; dot and bar: median and quartiles; tick: target", fontsize=9.5, color="#666666"
    )
    handles = [columns[0][0].plot([], [], "o", color=colour, label=name)[0] for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    return figure


def _draw(axes: Axes, rows: list[TimeRow], cases: list[tuple[str, str, str]]) -> None:
    axes.axvline(1, color="#888888", linewidth=1)
    for row in rows:
        place = cases.index((row.suite, row.case, row.rival))
        y = place + (SHIFT if row.ours.endswith("L2") else -SHIFT if row.ours.endswith("L1") else 0)
        colour = COLOURS.get(row.ours[-2:], COLOURS["L1"])
        axes.plot([row.ratio_q1, row.ratio_q3], [y, y], color=colour, alpha=0.5, linewidth=2.2)
        axes.plot([row.ratio], [y], "o", color=colour, markersize=5.5, markeredgecolor="white", markeredgewidth=0.6)
        if row.target is not None:
            axes.plot([row.target] * 2, [place - 0.36, place + 0.36], color=INK, linewidth=1.6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(cases)), [_label(*case) for case in cases])
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")


def _label(suite: str, case: str, rival: str) -> str:
    return f"{case}{' one-pass' if suite == 'one-pass' else ''} / {rival}"
