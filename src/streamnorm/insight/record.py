"""The record of a training: readings by layer and update, and events, in memory and as lines of JSON.

However long the training, the record stays small: when it is full, every second sample is dropped, and from then on
only every second one is kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from .readings import Reading

VERSION = 1

CAPACITY = 512
"""The most samples that a record holds."""

RUNNING = "running"

EVENTS = 256
"""The most events of one kind that a record holds."""


class Event(NamedTuple):
    """Something that happened at a weight update: ``"update"``, ``"checkpoint"``, ``"rate"`` or ``"warning"``."""

    update: int
    seconds: float
    kind: str
    text: str


class Sample(NamedTuple):
    """The readings of all layers at one weight update, by name, from the input to the output.

    ``seconds`` are those since the start. ``rate`` is the largest learning rate of the optimizer that made the update,
    nan without one.
    """

    update: int
    seconds: float
    rate: float
    layers: dict[str, Reading]

    def scalars(self) -> dict[str, float]:
        """The finite numbers, as ``"field/layer"``, ``"drift/body.0"`` for example: what loggers of curves take.

        Example:
            >>> Sample(50, 1.5, 0.1, {}).scalars()
            {'rate': 0.1}
        """
        numbers = {f"{f}/{name}": v for name, reading in self.layers.items() for f, v in reading._asdict().items()}
        return {name: value for name, value in {"rate": self.rate, **numbers}.items() if math.isfinite(value)}


class LayerFacts(NamedTuple):
    """The facts of a layer that do not change: its name, its class, its number of channels, its stream's constants."""

    name: str
    kind: str
    channels: int
    stream: str


@dataclass
class Record:
    """The record of a monitored training: its layers, samples and events.

    Args:
        name: what is trained.
        every: weight updates from sample to sample.
        layers: from the input to the output.
        started: when, in seconds since 1970.
        status: ``"running"``, ``"finished"`` or ``"stopped by …"``.
        updates: how many weight updates were noticed.
        seconds: for how long.
    """

    name: str
    every: int
    layers: list[LayerFacts]
    started: float
    status: str = RUNNING
    updates: int = 0
    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    _stride: int = 1

    def add(self, sample: Sample) -> None:
        """Take in a sample. The newest is always there; it may make room for the next."""
        if self.samples and not self.keeps(self.samples[-1]):
            self.samples.pop()
        self.samples.append(sample)
        if len(self.samples) > CAPACITY:
            self._stride *= 2
            self.samples = [each for each in self.samples if self.keeps(each) or each is sample]

    @property
    def distance(self) -> int:
        """The weight updates from one sample that stays to the next."""
        return self.every * self._stride

    def keeps(self, sample: Sample) -> bool:
        """Whether a sample stays when others follow."""
        return sample.update % self.distance == 0 or sample.update <= 1

    def note(self, event: Event) -> bool:
        """Take in an event, unless it repeats one from less than ``every`` updates before; whether it was taken."""
        for earlier in reversed(self.events):
            if event.update - earlier.update >= self.every:
                break
            if (earlier.kind, earlier.text) == (event.kind, event.text):
                return False
        self.events.append(event)
        alike = [each for each in self.events if each.kind == event.kind]
        if len(alike) > EVENTS:
            gone = set(map(id, alike[1::2]))
            self.events = [each for each in self.events if id(each) not in gone]
        return True

    def until(self, update: int) -> Record:
        """The part up to a weight update, to go on from there."""
        part = replace(self, status=RUNNING, updates=update, samples=[], events=[], _stride=1)
        for sample in self.samples:
            if sample.update <= update:
                part.add(sample)
        part.events = [event for event in self.events if event.update <= update]
        part.seconds = max([*(s.seconds for s in part.samples), *(e.seconds for e in part.events), 0.0])
        return part

    def lines(self) -> Iterator[str]:
        """The record as lines of JSON; :meth:`read` understands them."""
        yield self.head()
        entries: list[Sample | Event] = [*self.samples, *self.events]
        for entry in sorted(entries, key=lambda entry: entry.update):
            yield line(entry)
        if self.status != RUNNING:
            yield self.tail()

    def head(self) -> str:
        """The first line."""
        layers = [facts._asdict() for facts in self.layers]
        about = {"name": self.name, "every": self.every, "started": self.started}
        return _dump({"type": "monitor", "version": VERSION, **about, "fields": Reading._fields, "layers": layers})

    def tail(self) -> str:
        """The last line."""
        return _dump({"type": "end", "status": self.status, "update": self.updates, "seconds": round(self.seconds, 3)})

    @classmethod
    def read(cls, path: str | Path) -> Record:
        """The record in a file ``monitor.jsonl``, of a training that is over or still runs.

        Raises:
            ValueError: if this is no such file, or one of a later version.
        """
        with open(path, encoding="utf-8", errors="replace") as file:
            entries = list(_entries(file, path))
        if not entries or entries[0].get("type") != "monitor":
            raise ValueError(f"{path} is no record of streamnorm.monitor: its first line is not one of a monitor's")
        head = entries[0]
        version = head.get("version")
        if isinstance(version, int) and version > VERSION:
            raise ValueError(f"{path} has version {version} and this streamnorm reads {VERSION}: update it")
        try:
            layers = [LayerFacts(**facts) for facts in head["layers"]]
            if not layers:
                raise ValueError("it names no layer")
            record = cls(head["name"], _every(head["every"]), layers, _seconds(head["started"]))
            for entry in entries[1:]:
                record._take(entry)
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no record of streamnorm.monitor: {error!r}") from error
        return record

    def _take(self, entry: dict[str, Any]) -> None:
        self.updates, self.seconds = int(entry["update"]), _seconds(entry["seconds"])
        if entry["type"] == "sample":
            names = (facts.name for facts in self.layers)
            readings = {name: Reading(*map(_number, row)) for name, row in zip(names, entry["layers"], strict=True)}
            self.add(Sample(self.updates, self.seconds, _number(entry["rate"]), readings))
        elif entry["type"] == "event":
            self.note(Event(self.updates, self.seconds, entry["kind"], entry["text"]))
        elif entry["type"] == "end":
            self.status = entry["status"]


def _every(updates: Any) -> int:
    """So many weight updates between two samples."""
    if not isinstance(updates, int) or updates < 1:
        raise ValueError(f"every must be a whole number of at least 1, got {updates!r}")
    return updates


def _seconds(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"seconds must be a finite number, got {value!r}")
    return number


def line(entry: Sample | Event) -> str:
    """A sample or an event as a line of JSON."""
    if isinstance(entry, Event):
        return _dump({"type": "event", **entry._asdict()})
    rows = ",".join(f"[{','.join(map(_text, reading))}]" for reading in entry.layers.values())
    start = f'{{"type":"sample","update":{entry.update},"seconds":{entry.seconds:.3f},"rate":{_text(entry.rate)}'
    return f'{start},"layers":[{rows}]}}\n'


def _text(value: float) -> str:
    """Four digits are more than a curve shows; counts stay exact, and JSON has no word for what is not finite."""
    if not math.isfinite(value):
        return "null"
    return str(int(value)) if abs(value) < 1e15 and value == int(value) else f"{value:.4g}"


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _dump(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False, separators=(",", ":")) + "\n"


def _entries(lines: Iterable[str], path: str | Path) -> Iterator[dict[str, Any]]:
    """The entries of a file; a last line that is torn belongs to a training that was killed while it wrote."""
    for number, text in enumerate(lines, 1):
        if not text.endswith("\n"):
            return
        try:
            entry = json.loads(text)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, line {number} is not an object in JSON: it is no record of streamnorm.monitor")
        yield entry
