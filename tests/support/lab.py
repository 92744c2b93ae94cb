"""What tests of the laboratory share: runs from start to end, logs that are changed or spoilt, pages that are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from streamnorm_lab.experiments.experiment import Experiment
from streamnorm_lab.logs.records import Run
from streamnorm_lab.logs.runlog import LoggedRun, Record, RunLog, read_log
from streamnorm_lab.running.sweep import log_header
from streamnorm_lab.running.train import Training, train


def finish(experiment: Experiment[Any], run: Run, data: Any, path: Path) -> Any:
    """Train to the end, from a checkpoint if there is one; what the log says."""
    train(experiment, run, data, RunLog(path, log_header(experiment, run)), lambda *news: None)
    logged = read_log(path)
    assert logged is not None
    assert logged.end is not None
    return logged


def stop_after(updates: int, experiment: Experiment[Any], run: Run, data: Any, path: Path) -> None:
    """Train like `finish`, and interrupt it right after so many weight updates."""
    advance = Training.advance

    def interrupted(training: Training) -> Iterator[None]:
        for done, _ in enumerate(advance(training), start=1):
            yield
            if done == updates:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finish(experiment, run, data, path)


def timeless(logged: LoggedRun | None) -> tuple[list[Record], Record]:
    """The points and the end of a finished run, without the seconds that it took."""
    assert logged is not None
    assert logged.end is not None
    return logged.points, {key: value for key, value in logged.end.items() if key != "seconds"}


def change_logs(folder: Path, change: Callable[[Record, list[Record]], None]) -> None:
    """Pass what was run and all lines of each log through ``change``."""
    for path in (folder / "logs").rglob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        change(records[0]["run"], records)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


def set_scores(
    folder: Path, table: Mapping[str, Sequence[float]], key: str = "accuracy", setting: str | None = None
) -> None:
    """Give final runs these scores: method → one for each seed, at one setting or at all of them."""

    def change(run: Record, records: list[Record]) -> None:
        fits = run["stage"] == "final" and run["method"] in table and setting in (None, run["setting"])
        if fits and "scores" in records[-1]:
            records[-1]["scores"][run["method"]][key] = table[run["method"]][run["seed"]]

    change_logs(folder, change)


OTHERS: tuple[Any, ...] = (
    None,
    True,
    5,
    -1,
    0,
    0.5,
    10**400,
    float("nan"),
    "",
    "text",
    [],
    [1, 2],
    {},
    {"a": None},
    [[]],
    ["32x1"],
)
"""Values that JSON can hold in place of another one."""


def replacements(value: Any) -> Iterator[Any]:
    """The value with one of its parts replaced, at every place, or left out."""
    yield from OTHERS
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for part in replacements(value[key]):
            changed = value.copy()
            changed[key] = part
            yield changed
        left = value.copy()
        del left[key]
        yield left


class Page(HTMLParser):
    """A page whose tags nest: what it says, what it would fetch, and where it leads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A tag begins."""
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name == "src"]
        self.links += [value or "" for name, value in attrs if name == "href"]

    def handle_endtag(self, tag: str) -> None:
        """The last one ends."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Text."""
        self.words.append(data)
