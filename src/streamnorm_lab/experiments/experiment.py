"""What an experiment declares: a question, a network, the methods and settings compared, and its options.

A new experiment is a subclass with a name, its texts, its network and its defaults, added to ``catalogue.py``;
training, resuming, statistics, figures and the report follow from the declaration. The fields are the options of
``streamnorm run NAME``, and their docstrings are its help. What is learnt from, images or text, is declared in
between, by ``ImageExperiment`` and ``CharExperiment``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tyro import conf

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.score import Score
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.experiments.wording import Words
from streamnorm_lab.logs.records import DataRecord, End, Run
from streamnorm_lab.methods.layers import Method, trainable

if TYPE_CHECKING:
    from streamnorm_lab.analysis.results import Results

# For the help text: what stands in for the value, and no "(default: None)" where the text tells the default.
Folder = Annotated[str | None, conf.arg(metavar="FOLDER", help_behavior_hint="")]
Number = Annotated[int | None, conf.arg(metavar="INT", help_behavior_hint="")]

Scores = dict[str, float | None]
Batch = tuple[Tensor, Tensor]
"""Inputs, samples first, and targets; a model makes one row of logits for each target."""

TUNE_SEED = 1000  # rates are chosen with other seeds than those that are reported


class Split(Protocol):
    """A part of the data."""

    def __len__(self) -> int: ...

    @property
    def count(self) -> int:
        """How many targets it has."""
        ...

    def batch(self, index: Tensor | slice) -> Batch:
        """Samples by their numbers."""
        ...


class Data(Protocol):
    """The three parts. Rates are chosen on ``validation``; ``test`` is looked at once they are fixed."""

    @property
    def classes(self) -> int:
        """How many different targets there are."""
        ...

    @property
    def train(self) -> Split:
        """What is learnt from."""
        ...

    @property
    def validation(self) -> Split:
        """What rates are chosen on."""
        ...

    @property
    def test(self) -> Split:
        """What results are from."""
        ...


DataT = TypeVar("DataT", bound=Data)


class Material(Protocol):
    """Data that were found and looked at, and are not read yet."""

    @property
    def name(self) -> str:
        """A short name, for the output folder."""
        ...

    def prepare(self, folder: Path) -> dict[str, Any]:
        """Write them where workers load them from; return what identifies them: sizes, classes, a fingerprint."""
        ...


class Section(NamedTuple):
    """A table of its own in an experiment's report, with a text above it; the first cell of a row names it.

    It is also written to a CSV file of this name.
    """

    name: str
    title: str
    text: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Experiment(ABC, Generic[DataT]):
    """The options that every experiment has, and what each kind of data has to tell."""

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
        ("streaming-l1", "batch-renorm"),
        ("streaming-l1", "mabn"),
        ("streaming-l1", "group"),
        ("streaming-l1", "rms"),
        ("streaming-l1", "online"),
        ("streaming-l2", "layer"),
        ("streaming-l1", "streaming-l2"),
    )
    """The pairs of methods that the verdict speaks of, ours first."""
    setting_pairs: ClassVar[tuple[tuple[str, str], ...]] = ()
    """The pairs of settings at which each method is compared with itself, for experiments that ask about settings."""
    catalogue: ClassVar[Mapping[str, Method]]
    """The methods that can be named."""
    score: ClassVar[Score]
    """What rates are chosen by, and methods compared."""
    unit: ClassVar[str]
    """What is counted along a run, such as images; a key of the logs."""
    words: ClassVar[Words]
    """What reports and figures say about the data."""
    data_form: ClassVar[type] = DataRecord
    """What ``Material.prepare`` returns, as a TypedDict."""
    end_form: ClassVar[type] = End
    """The last line of a log, as a TypedDict."""

    data: Folder = None
    """Where the data lie."""

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
    """Learning rates to try. Each method gets its best one per setting, chosen on data held out for that."""

    seeds: int = 3
    """Number of final runs per method and setting; each has its own initial weights and order of the data."""

    tune_seeds: int = 1
    """Number of runs per learning rate when rates are chosen (with other seeds than the final runs)."""

    points: int = 16
    """Points of each curve."""

    jobs: Number = None
    """Worker processes, one thread each. Default: one per processor core, or 100 jobs of a cluster."""

    launcher: Literal["local", "slurm"] = "local"
    """Where runs go: to processes of this machine, or to a SLURM cluster as jobs, with submitit (extra "slurm")."""

    slurm_partition: Annotated[str | None, conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """Partition of the cluster. Default: the cluster's own."""

    slurm_minutes: int = 240
    """Minutes after which the cluster ends a job; each is one run."""

    checkpoint_every: float = 5.0
    """Seconds between the checkpoints from which a killed run continues."""

    watch: bool = False
    """Watch the streaming layers of each run: a page for each that refreshes itself in a browser, and an index of them
    in watch/index.html below the output folder. The numbers stay the same."""

    @abstractmethod
    def open(self) -> Material:
        """Find the data.

        Raises:
            UserError: they are not there, or do not fit the options.
        """

    @abstractmethod
    def load(self, folder: Path) -> DataT:
        """What ``Material.prepare`` wrote into ``folder``."""

    def part(self, data: DataT, run: Run) -> DataT:
        """What this run learns from and is judged on, if not all."""
        return data

    def size(self, data: Mapping[str, Any], run: Run) -> Mapping[str, Any]:
        """``part`` for what ``Material.prepare`` returned."""
        return data

    @abstractmethod
    def model(self, data: DataT, method: str) -> nn.Module:
        """The network; its weights are drawn from torch's own generator, and are the same for every method."""

    @abstractmethod
    def optimizer(self, parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """What changes the weights."""

    def rate(self, rate: float, share: float) -> float:
        """The learning rate of the next update, for a run at ``rate`` of which this share is done: always the same."""
        return rate

    @abstractmethod
    def schedule(self, data: DataT, setting: Setting) -> tuple[int, int]:
        """How many passes a run makes, and how many weight updates in each."""

    @abstractmethod
    def batches(self, data: DataT, setting: Setting, seed: int, epoch: int, first_update: int) -> Iterator[Batch]:
        """The mini-batches of a pass from one of its weight updates on; their order follows from the seed alone."""

    @abstractmethod
    def watched(self, data: DataT) -> Split:
        """The part of the test data that the points of a curve are evaluated on."""

    @classmethod
    @abstractmethod
    def guess(cls, classes: int) -> Scores:
        """The scores of guessing, with which a run that diverged counts."""

    @abstractmethod
    def amounts(self, data: Mapping[str, Any]) -> dict[str, int]:
        """The options that say how much of the data is used, with what they came to, from what was prepared."""

    @abstractmethod
    def seen(self, data: Mapping[str, Any], setting: Setting) -> int:
        """How many units one run sees, about, from what ``Material.prepare`` returned."""

    @abstractmethod
    def cost(self, data: Mapping[str, Any], setting: Setting) -> float:
        """About how long a run takes, in units of its own."""

    def hardware(self) -> dict[str, str]:
        """What a log's environment tells beyond the processor."""
        return {}

    def epilogue(self, model: nn.Module, data: DataT, run: Run) -> dict[str, Any]:
        """What else the log of a finished run keeps."""
        return {}

    @classmethod
    def section(cls, results: Results) -> Section | None:
        """What else the report shows."""
        return None

    def check(self) -> None:
        """Look at the options before anything is read or written.

        Raises:
            UserError: an option cannot be meant.
        """
        trainable(self.methods, self.catalogue)
        for name in ("methods", "settings", "rates"):
            _check_list(name, getattr(self, name))
        for setting in self.settings:
            Setting.parse(setting)
        for rate in self.rates:
            if not 0 < rate < math.inf:
                raise UserError(f"--rates {rate:g}: a learning rate must be above 0 and finite")
        if not 0 <= self.checkpoint_every < math.inf:
            raise UserError(f"--checkpoint-every {self.checkpoint_every:g}: must be at least 0 and finite")
        for name in ("seeds", "tune_seeds", "points", "slurm_minutes", *self._counts()):
            _check_at_least_one(name, getattr(self, name))
        if self.jobs is not None:
            _check_at_least_one("jobs", self.jobs)

    def _counts(self) -> tuple[str, ...]:
        """The names of a subclass's options that must be at least 1."""
        return ()

    def identity(self) -> dict[str, Any]:
        """The options that, with the data, decide a run's numbers: an output folder holds runs of one identity."""
        found = ("data", "limit", "validation", "tune_limit")  # the data's fingerprint stands for these
        place = ("launcher", "slurm_partition", "slurm_minutes")
        sweep = ("methods", "settings", "rates", "seeds", "tune_seeds")
        free = (*found, *sweep, *place, "out", "jobs", "checkpoint_every", "watch")
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
