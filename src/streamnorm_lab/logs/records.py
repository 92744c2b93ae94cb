"""Records in logs and in ``experiment.json``, as typed dictionaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from typing_extensions import TypedDict

from streamnorm_lab.common.forms import Between, Count, Size

Share = Annotated[float, Between(0, 1)]
Seconds = Annotated[float, Between(0)]


@dataclass(frozen=True)
class Run:
    """One training: ``stage`` is "tune" (evaluated on validation data) or "final" (on test data)."""

    stage: str
    method: str
    setting: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """The run's place below the folder of logs, without a suffix."""
        return f"{self.stage}/{self.method}_{self.setting}_rate{self.rate:g}_seed{self.seed}"


class Line(TypedDict):
    """Any line of a log."""

    type: Literal["run", "point", "end"]


class RunRecord(TypedDict):
    """The identity of a run."""

    stage: Literal["tune", "final"]
    method: str
    setting: str
    rate: Annotated[float, Between(0, above=True)]
    seed: Count


class Header(TypedDict):
    """The first line of a log."""

    type: Literal["run"]
    experiment: str
    run: RunRecord
    options: dict[str, Any]
    environment: dict[str, str | int]
    started: str


class TrainScores(TypedDict):
    """Scores since the last point."""

    loss: float
    accuracy: Share


class ScoreRecord(TypedDict):
    """Scores on data that are not trained on; the loss is None where it is not a finite number."""

    loss: float | None
    accuracy: Share


class _Point(TypedDict):
    type: Literal["point"]
    update: Count
    train: TrainScores


class Point(_Point, total=False):
    """A point of a curve; it also counts what was seen, under the name of the experiment's unit."""

    test: ScoreRecord


class _End(TypedDict):
    type: Literal["end"]
    status: Literal["done", "diverged", "fails"]
    updates: Count
    seconds: Seconds


class End(_End, total=False):
    """The last line of a log: scores by row of the result table, or the reason why the method cannot run."""

    scores: dict[str, ScoreRecord]
    reason: str


class DataRecord(TypedDict):
    """The facts that identify data, and the sizes of their parts."""

    name: str
    description: str
    classes: Annotated[int, Between(2)]
    train: Size
    validation: Size
    test: Size
    fingerprint: str


class Config(TypedDict):
    """``experiment.json``: what was asked of a folder."""

    experiment: str
    identity: dict[str, Any]
    options: dict[str, Any]
    data: DataRecord
    commands: list[str]
