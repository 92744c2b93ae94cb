"""The output of a monitor: a log of JSON lines and a page, side by side in a folder."""

from __future__ import annotations

import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from . import page
from .record import Event, Record, Sample, line

LOG, PAGE = "monitor.jsonl", "monitor.html"

PAGE_SHARE = 1000
"""Between two writings of the page passes at least this many times as long as one takes."""

PAGE_PAUSE = 2.0
"""The seconds between two writings of the page, at least."""


class Output:
    """A folder with a log and a page. A disk that is full or gone ends the writing, with a warning; training goes on.

    Args:
        folder: made if it is missing.

    Raises:
        OSError: if the folder cannot be written; before training, not during it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file: TextIO | None = None
        self._page_due = 0.0

    def begin(self, fresh: Record, update: int) -> Record:
        """Start a log, or go on with the one that is there: the part of it up to a weight update stays."""
        log, record = self._folder / LOG, fresh
        if update and log.exists():
            earlier = Record.read(log)
            if (earlier.every, earlier.layers) == (fresh.every, fresh.layers):
                record = earlier.until(update)
        record.updates = update
        self._file = log.open("w", encoding="utf-8")
        self._file.writelines(record.lines())
        self.refresh(record)
        return record

    def write(self, entry: Sample | Event) -> None:
        """Add a line to the log."""
        if self._file is not None:
            try:
                self._file.write(line(entry))
            except OSError as error:
                self._fail(error)

    def refresh(self, record: Record) -> None:
        """Bring the log to the disk, and the page where it is due."""
        if self._file is None:
            return
        try:
            self._file.flush()
            began = time.perf_counter()
            if began >= self._page_due:
                page.write(record, self._folder / PAGE)
                now = time.perf_counter()
                self._page_due = now + max(PAGE_PAUSE, PAGE_SHARE * (now - began))
        except OSError as error:
            self._fail(error)

    def end(self, record: Record) -> None:
        """Write the last line, and the page that stays."""
        if self._file is None:
            return
        try:
            self._file.write(record.tail())
            self._file.close()
            page.write(record, self._folder / PAGE)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()
        warnings.warn(
            f"streamnorm.monitor writes no more to {self._folder}, and training goes on: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
