"""The page: a record as one HTML file that needs no server and no network, and reloads itself while training runs."""

from __future__ import annotations

import html
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .readings import Reading
from .record import RUNNING, Record, Sample

TEMPLATE = Path(__file__).with_name("page.html")

CELLS = 4000
"""Layers times columns of a page, about: some hundred KB."""

FEWEST, MOST = 40, 240
"""Columns, whatever the number of layers."""


def write(record: Record, path: Path) -> None:
    """Write the page of a record, so that a browser finds the old file or the new one and never a part.

    Raises:
        OSError: if the file cannot be written; the old one is as it was.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(render(record))
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def embedded(record: Record, height: int = 640) -> str:
    """The page of a record as an element for another page, such as a notebook; it does not refresh itself."""
    style = f"width: 100%; height: {height}px; border: 0"
    return f'<iframe srcdoc="{html.escape(render(record, live=False))}" style="{style}"></iframe>'


def render(record: Record, live: bool = True) -> str:
    """The page of a record, as text. While training runs it reads its file again, unless it is not ``live``."""
    about = {"live": live and record.status == RUNNING}
    data = json.dumps({**about, **_data(record)}, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = _template().replace("{{title}}", html.escape(f"{record.name} · streamnorm"))
    return text.replace("{{data}}", data.replace("<", "\\u003c"))


@cache
def _template() -> str:
    return TEMPLATE.read_text(encoding="utf-8")


def _data(record: Record) -> dict[str, Any]:
    samples = _columns(record.samples, min(MOST, max(FEWEST, CELLS // len(record.layers))))
    layers = []
    for facts in record.layers:
        columns = zip(*(sample.layers[facts.name] for sample in samples))
        layers.append({**facts._asdict(), **{f: _series(values) for f, values in zip(Reading._fields, columns)}})
    return {
        "name": record.name,
        "status": record.status,
        "started": round(record.started),
        "written": round(time.time()),
        "updates": record.updates,
        "seconds": round(record.seconds, 1),
        "at": [sample.update for sample in samples],
        "rate": _series([sample.rate for sample in samples]),
        "layers": layers,
        "events": [[event.update, event.kind, event.text] for event in record.events],
    }


def _columns(samples: list[Sample], most: int) -> list[Sample]:
    """At most so many of the samples, at equal distances, the newest among them."""
    step = 1 << max(0, math.ceil(math.log2(len(samples) / most))) if samples else 1
    return samples[::-1][::step][::-1]


def _series(values: Sequence[float]) -> list[float | None] | float | None:
    """Numbers of three digits; one number that is always the same stands for all."""
    short = [_short(value) for value in values]
    return short[0] if len(set(short)) == 1 else short


def _short(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    if value == int(value) and abs(value) < 1e15:
        return int(value)
    return float(f"{value:.3g}")
