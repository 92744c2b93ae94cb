"""The declaration of an experiment: a question, a network, the methods and settings compared, and its options.

A new experiment is a subclass with a name, its texts, its network and its defaults, added to ``catalogue.py``;
training, resuming, statistics, figures and the report follow from the declaration. The fields are the options of
``streamnorm run NAME``, and their docstrings are its help. What is learnt from is a `Task`, made from the options by
``ImageExperiment`` and ``CharExperiment``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple

import torch
from torch import nn
from tyro import conf

from streamnorm_lab.common.chart import Chart
from streamnorm_lab.common.forms import Between
from streamnorm_lab.common.score import Score
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.data.task import DataT, Task
from streamnorm_lab.experiments.options import (
    FREE,
    Amount,
    Folder,
    MethodNames,
    Positive,
    Rates,
    Repeats,
    SettingNames,
    check_options,
    hints,
    is_free,
)
from streamnorm_lab.experiments.wording import Words
from streamnorm_lab.logs.records import End, Run
from streamnorm_lab.methods.method import Method, trainable


class Section(NamedTuple):
    """A table of its own in an experiment's report, with a text above it; the first cell of a row names it.

    It is also written to a CSV file of this name. Where ``chart`` and ``headline`` are given, they answer the
    experiment's question, and stand in place of the figure by setting and of the first sentence.
    """

    name: str
    title: str
    text: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    chart: Chart | None = None
    headline: str = ""


class Finals(NamedTuple):
    """The last lines of the logs of one method's final runs at one setting."""

    method: Method
    setting: Setting
    ends: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Experiment(ABC, Generic[DataT]):
    """The options that every experiment has, and what it has to tell."""

    name: ClassVar[str]
    alias: ClassVar[str | None] = None
    title: ClassVar[str]
    summary: ClassVar[str]
    """One line for ``streamnorm list``."""
    question: ClassVar[str]
    """The question that the experiment asks, for the report."""
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
    across: ClassVar[str | None] = None
    """The number on the horizontal axis of the summary figure, in place of the setting: methods differ in it."""
    catalogue: ClassVar[Mapping[str, Method]]
    """The methods that can be named."""
    score: ClassVar[Score]
    """The score by which rates are chosen and methods compared."""
    kind: ClassVar[type[Task[Any]]]
    """The class of the learning task."""
    words: ClassVar[Words]
    """The sentences of reports and figures about the data."""
    end_form: ClassVar[type] = End
    """The last line of a log, as a TypedDict."""
    per_sample: ClassVar[bool] = False
    """Whether ``rates`` are for one sample per weight update, and scaled with the number of samples."""

    data: Folder = None
    """Folder or file of the data."""

    out: Folder = None
    """Folder for logs, figures and the report; the same command continues what an interrupted one left there.

    Default: runs/EXPERIMENT-DATA."""

    methods: MethodNames = ("none", "batch", "layer", "streaming-l2", "streaming-l1")
    """Normalizations to compare."""

    settings: SettingNames = ("32x1", "2x16", "1x32", "2x1", "1x1")
    """Samples per mini-batch x mini-batches per weight update, for example 2x16."""

    rates: Rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Learning rates to try. Each method gets its best one per setting, chosen on data held out for that."""

    seeds: Repeats = 3
    """Number of final runs per method and setting; each has its own initial weights and order of the data."""

    tune_seeds: Repeats = 1
    """Number of runs per learning rate when rates are chosen (with other seeds than the final runs)."""

    points: Positive = 16
    """Points of each curve."""

    jobs: Amount = None
    """Worker processes, one thread each. Default: one per processor core, or 100 jobs of a cluster."""

    launcher: Annotated[Literal["local", "slurm"], FREE] = "local"
    """Launcher of the runs: local, in processes of this machine, or slurm, as jobs of a cluster, with submitit (extra
    "slurm")."""

    slurm_partition: Annotated[str | None, conf.arg(metavar="NAME", help_behavior_hint=""), FREE] = None
    """Partition of the cluster. Default: the cluster's own."""

    slurm_minutes: Repeats = 240
    """Minutes after which the cluster ends a job; each is one run."""

    checkpoint_every: Annotated[float, Between(0), FREE] = 5.0
    """Seconds between the checkpoints from which a killed run continues."""

    watch: Annotated[bool, FREE] = False
    """Watch the streaming layers of each run: a page for each that refreshes itself in a browser, and an index of them
    in watch/index.html below the output folder. The numbers stay the same."""

    @property
    def label(self) -> str:
        """The name of the default output folder, before the name of the data."""
        return self.name

    @property
    @abstractmethod
    def task(self) -> Task[DataT]:
        """The learning task, with these options."""

    @abstractmethod
    def model(self, data: DataT, method: str) -> nn.Module:
        """The network; its weights are drawn from torch's own generator, and are the same for every method."""

    @abstractmethod
    def optimizer(self, parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """The optimizer."""

    def rate(self, rate: float, share: float) -> float:
        """The learning rate of the next update, for a run at ``rate`` of which this share is done: always the same."""
        return rate

    @abstractmethod
    def work(self, setting: Setting) -> float:
        """About how long a mini-batch takes, in units of its own."""

    def epilogue(self, model: nn.Module, data: DataT, run: Run) -> dict[str, Any]:
        """Extra entries of the last line of a finished run's log."""
        return {}

    @classmethod
    def family(cls, method: Method) -> tuple[str, float] | None:
        """The methods that one is of, and its number among them; None for a method without such a number."""
        return None

    @classmethod
    def section(cls, config: Mapping[str, Any], finals: Iterable[Finals]) -> Section | None:
        """An extra section of the report, with a table of the experiment's own."""
        return None

    def check(self) -> None:
        """Look at the options before anything is read or written.

        Raises:
            UserError: an option cannot be meant.
        """
        check_options(self)
        trainable(self.methods, self.catalogue)
        self.parsed_settings()

    def rehearse(self, facts: Mapping[str, Any]) -> None:
        """Look at the options once the data are known, before the first run.

        Raises:
            UserError: they do not fit the data.
        """

    def rates_at(self, setting: Setting) -> list[float]:
        """The learning rates to try at a setting."""
        if not self.per_sample:
            return list(self.rates)
        return [float(f"{rate * setting.update:.6g}") for rate in self.rates]

    def parsed_settings(self) -> list[Setting]:
        """The settings."""
        return [Setting.parse(setting) for setting in self.settings]

    def identity(self) -> dict[str, Any]:
        """The options that, with the data, decide a run's numbers: an output folder holds runs of one identity."""
        return {name: getattr(self, name) for name, hint in hints(type(self)).items() if not is_free(hint)}
