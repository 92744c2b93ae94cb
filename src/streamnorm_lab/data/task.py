"""Learning tasks: data of one kind, and the mini-batches that a run makes of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor

from streamnorm_lab.common.setting import Setting
from streamnorm_lab.logs.records import DataRecord

Scores = dict[str, float | None]
Batch = tuple[Tensor, Tensor]
"""Inputs, samples first, and targets; a model makes one row of logits for each target."""


class Split(Protocol):
    """A part of the data."""

    def __len__(self) -> int: ...

    @property
    def count(self) -> int:
        """The number of targets."""
        ...

    def batch(self, index: Tensor | slice) -> Batch:
        """Samples by their numbers."""
        ...


class Data(Protocol):
    """The three parts. Rates are chosen on ``validation``; ``test`` is looked at once they are fixed."""

    @property
    def classes(self) -> int:
        """The number of different targets."""
        ...

    @property
    def train(self) -> Split:
        """The training data."""
        ...

    @property
    def validation(self) -> Split:
        """The data that rates are chosen on."""
        ...

    @property
    def test(self) -> Split:
        """The data that results are from."""
        ...


DataT = TypeVar("DataT", bound=Data)


class Material(Protocol):
    """Data that were found and looked at, and are not read yet."""

    @property
    def name(self) -> str:
        """A short name, for the output folder."""
        ...

    def prepare(self, folder: Path) -> dict[str, Any]:
        """Write them where workers load them from; return what identifies them, of the task's ``form``."""
        ...


class Task(ABC, Generic[DataT]):
    """Data of one kind, and the mini-batches that a run makes of them.

    ``facts`` are what `Material.prepare` returned. A run's ``stage`` is "tune" where a rate is chosen, or "final".
    """

    unit: ClassVar[str]
    """The unit that is counted along a run, such as images; a key of the logs."""
    form: ClassVar[type] = DataRecord
    """The facts, as a TypedDict."""

    @property
    @abstractmethod
    def units_per_sample(self) -> int:
        """The number of units in one sample."""

    @abstractmethod
    def open(self, settings: Sequence[Setting]) -> Material:
        """Find the data.

        Raises:
            UserError: they are not there, or do not fit the settings.
        """

    @abstractmethod
    def load(self, folder: Path) -> DataT:
        """Load the data that `Material.prepare` wrote into ``folder``."""

    def part(self, data: DataT, stage: str) -> DataT:
        """The part of the data that a run of this stage uses; all of it unless a task says otherwise."""
        return data

    @abstractmethod
    def schedule(self, data: DataT, setting: Setting) -> tuple[int, int]:
        """The number of passes of a run, and of weight updates in each."""

    @abstractmethod
    def batches(self, data: DataT, setting: Setting, seed: int, epoch: int, first_update: int) -> Iterator[Batch]:
        """The mini-batches of a pass from one of its weight updates on; their order follows from the seed alone."""

    @abstractmethod
    def watched(self, data: DataT) -> Split:
        """The part of the test data that the points of a curve are evaluated on."""

    @abstractmethod
    def mini_batches(self, facts: Mapping[str, Any], setting: Setting, stage: str) -> int:
        """The number of mini-batches of a run."""

    @abstractmethod
    def amounts(self, facts: Mapping[str, Any]) -> dict[str, int]:
        """The options that say how much of the data is used, with what they came to."""

    @staticmethod
    def measure(logits: Tensor, targets: Tensor, samples: int) -> Mapping[str, float]:
        """Scores beside loss and accuracy, summed over the samples; their means are reported."""
        return {}

    @staticmethod
    @abstractmethod
    def guess(classes: int) -> Scores:
        """The scores of guessing, with which a run that diverged counts."""
