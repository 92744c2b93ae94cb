"""Pages of watched runs, rebuilt from their logs, and an index of those in a folder."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import streamnorm as sn
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.files import write_text
from streamnorm_lab.reports.page import document, html_table

WATCH = "watch"
"""The folder of watched runs below that of an experiment."""

LOG, PAGE, INDEX = "monitor.jsonl", "monitor.html", "index.html"

_TAIL = 1 << 16
"""Bytes at the end of a log that hold its last line, unless there are hundreds of layers."""


def rebuild(folder: Path) -> Path:
    """Rebuild the page of every log below a folder; the page to open: the only one, or an index of all.

    Raises:
        UserError: there is none, or one is damaged.
    """
    if (folder / WATCH).is_dir():  # of an experiment
        folder = folder / WATCH
    logs = sorted(folder.rglob(LOG))
    if not logs:
        message = f"{folder} holds no {LOG}: `streamnorm run … --watch` and streamnorm.monitor(model, out=…) write some"
        raise UserError(message)
    for log in logs:
        try:
            sn.insight.write_page(sn.insight.Record.read(log), log.with_name(PAGE))
        except ValueError as error:
            place = "" if str(log) in str(error) else f"{log}: "
            raise UserError(f"{place}{error}. Remove the file, or take it from where it came") from None
    return logs[0].with_name(PAGE) if logs[0].parent == folder and len(logs) == 1 else write_index(folder)


class _Entry(NamedTuple):
    place: str
    name: str
    status: str
    updates: int
    layers: int


def write_index(folder: Path, live: bool = False) -> Path:
    """Write a page that names every watched run below a folder and leads to its own; a ``live`` one reloads itself."""
    entries = [entry for log in sorted(folder.rglob(LOG)) if (entry := _glance(log, folder)) is not None]
    rows = [
        [
            f'<a href="{escape(entry.place)}/{PAGE}">{escape(entry.name)}</a>',
            *(str(entry.layers), f"{entry.updates:,}", escape(entry.status)),
        ]
        for entry in entries
    ]
    table = f'<div class="runs">{html_table(["run", "layers", "updates", "status"], rows, numbers=True)}</div>'
    nothing = "<p>Nothing yet. Runs come here once they train, as far as they have streaming layers.</p>"
    reload = "<script>setTimeout(() => location.reload(), 3000)</script>" if live else ""
    path = folder / INDEX
    write_text(path, document("Watched runs", ["<h1>Watched runs</h1>", table if rows else nothing, reload]))
    return path


def _glance(log: Path, folder: Path) -> _Entry | None:
    """Read the first and the last line of a log; None where a run has only just begun to write it."""
    with open(log, "rb") as file:
        first = _object(file.readline())
        file.seek(max(0, log.stat().st_size - _TAIL))
        lines = [found for line in file.read().split(b"\n")[:-1] if (found := _object(line)) is not None]
    if first is None or not lines:
        return None
    last = lines[-1]
    place = log.parent.relative_to(folder).as_posix()
    name = str(first.get("name", place))
    return _Entry(place, name, str(last.get("status", "running")), last.get("update", 0), len(first.get("layers", ())))


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
