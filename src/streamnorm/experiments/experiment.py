"""What an experiment declares: a question, a network, the methods and settings compared, and its options.

A new experiment is a subclass with a name, its texts, its network and its defaults, added to ``catalogue.py``;
training, resuming, statistics, figures and the report follow from the declaration. The fields are the options of
``streamnorm run NAME``, and their docstrings are its help.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from torch import nn
from tyro import conf

from streamnorm.experiments.errors import UserError
from streamnorm.experiments.methods import NormFactory, trainable
from streamnorm.experiments.setting import Setting

# For the help text: what stands in for the value, and no "(default: None)" where the text tells the default.
Folder = Annotated[str | None, conf.arg(metavar="FOLDER", help_behavior_hint="")]
Number = Annotated[int | None, conf.arg(metavar="INT", help_behavior_hint="")]

TUNE_SEED = 1000  # rates are chosen with other seeds than those that are reported


@dataclass(frozen=True)
class Run:
    """One training: ``stage`` is "tune" (evaluated on validation images) or "final" (on test images)."""

    stage: str
    method: str
    setting: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """The run's place below the folder of logs, without a suffix."""
        return f"{self.stage}/{self.method}_{self.setting}_rate{self.rate:g}_seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Experiment(ABC):
    """The options that every experiment has."""

    name: ClassVar[str]
    alias: ClassVar[str | None] = None
    title: ClassVar[str]
    summary: ClassVar[str]
    """One line for ``streamnorm list``."""
    question: ClassVar[str]
    """What is asked, for the report."""
    reference: ClassVar[str] = "layer"
    """The method that the others' differences are taken to."""
    comparisons: ClassVar[tuple[tuple[str, str], ...]] = (
        ("streaming-l1", "layer"),
        ("streaming-l1", "batch"),
        ("streaming-l1", "batch-recalibrated"),
        ("streaming-l2", "layer"),
        ("streaming-l1", "streaming-l2"),
    )
    """The pairs of methods that the verdict speaks of, ours first."""

    data: Folder = None
    """Folder with images: Parquet files in the Hub's cifar10 layout, or CIFAR-10's binary files.

    Default: scikit-learn's digits, so that nothing is downloaded. `streamnorm data --help` tells more."""

    out: Folder = None
    """Folder for logs, figures and the report; the same command continues what an interrupted one left there.

    Default: runs/EXPERIMENT-DATA."""

    methods: Annotated[tuple[str, ...], conf.arg(metavar="METHOD ...")] = (
        "none",
        "batch",
        "layer",
        "streaming-l2",
        "streaming-l1",
    )
    """Normalizations to compare."""

    settings: Annotated[tuple[str, ...], conf.arg(metavar="SxU ...")] = ("32x1", "2x16", "1x32", "2x1", "1x1")
    """Samples per mini-batch x mini-batches per weight update, for example 2x16."""

    rates: Annotated[tuple[float, ...], conf.arg(metavar="RATE ...")] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Learning rates to try. Each method gets its best one per setting, chosen on validation images."""

    seeds: int = 3
    """Number of final runs per method and setting; each has its own initial weights and order of the data."""

    tune_seeds: int = 1
    """Number of runs per learning rate when rates are chosen (with other seeds than the final runs)."""

    epochs: int = 1
    """Passes over the training images."""

    limit: Number = None
    """Train on so many images, the first ones. Default: 10,000, or 800 of the digits."""

    validation: Number = None
    """Choose rates on so many images, those after the training images. Default: 5,000, or 297 of the digits."""

    momentum: float = 0.9
    """Momentum of SGD."""

    points: int = 16
    """Points of each curve."""

    curve_images: int = 1000
    """Test images used for the points of a curve; the final accuracy always uses all of them."""

    jobs: Number = None
    """Worker processes, one thread each. Default: one per processor core."""

    checkpoint_every: float = 5.0
    """Seconds between the checkpoints from which a killed run continues."""

    @abstractmethod
    def network(self, shape: tuple[int, ...], classes: int, norm: NormFactory) -> nn.Module:
        """The network for images of ``shape`` (C, H, W), with layers made by ``norm``."""

    def check(self) -> None:
        """Look at the options before anything is read or written.

        Raises:
            UserError: an option cannot be meant.
        """
        trainable(self.methods)
        for name in ("methods", "settings", "rates"):
            _check_list(name, getattr(self, name))
        for setting in self.settings:
            Setting.parse(setting)
        for rate in self.rates:
            if not rate > 0:
                raise UserError(f"--rates {rate:g}: a learning rate must be above 0")
        for name in ("seeds", "tune_seeds", "epochs", "points", "curve_images", *self._counts()):
            _check_at_least_one(name, getattr(self, name))
        if self.jobs is not None:
            _check_at_least_one("jobs", self.jobs)
        if not 0 <= self.momentum < 1:
            raise UserError(f"--momentum {self.momentum:g}: must be at least 0 and below 1")

    def _counts(self) -> tuple[str, ...]:
        """The names of a subclass's options that must be at least 1."""
        return ()

    def identity(self) -> dict[str, Any]:
        """The options that, with the images, decide a run's numbers: an output folder holds runs of one identity."""
        images = ("data", "limit", "validation")  # the images' fingerprint stands for these
        sweep = ("methods", "settings", "rates", "seeds", "tune_seeds")
        free = (*images, *sweep, "out", "jobs", "checkpoint_every")
        return {name: value for name, value in asdict(self).items() if name not in free}

    def tune_runs(self) -> list[Run]:
        """The runs that choose the rates."""
        seeds = range(TUNE_SEED, TUNE_SEED + self.tune_seeds)
        return [Run("tune", *cell, rate, seed) for cell in self.cells() for rate in self.rates for seed in seeds]

    def final_runs(self, rates: Mapping[tuple[str, str], Sequence[float]]) -> list[Run]:
        """The runs that are reported, at the ``rates`` chosen for each (method, setting); none where none works."""
        return [
            Run("final", *cell, rate, seed)
            for cell in self.cells()
            for rate in rates.get(cell, ())
            for seed in range(self.seeds)
        ]

    def cells(self) -> list[tuple[str, str]]:
        """Every (method, setting)."""
        settings = [str(Setting.parse(text)) for text in self.settings]
        return [(method, setting) for setting in settings for method in self.methods]


def _check_list(name: str, values: Sequence[object]) -> None:
    if not values:
        raise UserError(f"--{name}: name at least one")
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"--{name}: {value} is named twice")


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
