"""Runs that are watched: ``watch/<run>/monitor.html`` for each that has streaming layers, while it trains and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

import streamnorm as sn
from streamnorm_lab.logs.records import Run
from streamnorm_lab.reports.watch import WATCH

SAMPLES, FEWEST = 200, 10
"""Samples of a run, about; but at least so many weight updates lie between two."""


def watch_folder(folder: Path, run: Run) -> Path:
    """The folder of a run's page."""
    return folder / WATCH / run.key


@contextmanager
def watched(model: nn.Module, folder: Path | None, name: str, update: int, total: int) -> Iterator[None]:
    """Watch a training from a weight update on; a model without streaming layers, or without a folder, is not.

    Args:
        model: what trains.
        folder: where log and page go, or None.
        name: what the page calls it.
        update: how many weight updates were made before, by a run that continues.
        total: how many there will be in all.
    """
    if folder is None or not any(isinstance(m, sn.Norm) and m.stream is not None for m in model.modules()):
        yield
        return
    monitor = sn.monitor(model, max(FEWEST, total // SAMPLES), folder, name=name)
    monitor.start(update)
    status = "finished"
    try:
        yield
    except BaseException as error:
        status = f"stopped by {type(error).__name__}"
        raise
    finally:
        monitor.stop(status)
