"""The paper's table 1: which technique works in which scenario.

It is four other experiments and one table over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from tyro import conf

from streamnorm_lab.common.files import typed_path
from streamnorm_lab.experiments.char import CharRNN
from streamnorm_lab.experiments.conv import Conv
from streamnorm_lab.experiments.experiment import Experiment
from streamnorm_lab.experiments.online_fc import OnlineFC
from streamnorm_lab.experiments.options import Amount, File, Folder, Positive, Repeats
from streamnorm_lab.experiments.recurrent_conv import RecurrentConv


@dataclass(frozen=True)
class Scenario:
    """A column of the table: where it is run, and the paper's judgement of each technique in ``TECHNIQUES``' order."""

    label: str
    experiment: str
    setting: str
    paper: tuple[str, str, str, str]


SCENARIOS = (
    Scenario("feedforward, fully connected", "online-fc", "32x1", ("works", "works", "works", "works")),
    Scenario("recurrent, fully connected", "char-rnn", "32x1", ("fails", "limited", "works", "works")),
    Scenario("feedforward, convolutional", "conv", "32x1", ("works", "works", "suboptimal", "works")),
    Scenario("recurrent, convolutional", "recurrent-conv", "32x1", ("fails", "limited", "suboptimal", "works")),
    Scenario("online learning", "online-fc", "1x1", ("fails", "fails", "works", "works")),
    Scenario("small batch", "online-fc", "2x16", ("suboptimal", "suboptimal", "works", "works")),
    Scenario("all combined", "recurrent-conv", "1x1", ("fails", "fails", "suboptimal", "works")),
)
PARTS = tuple(dict.fromkeys(scenario.experiment for scenario in SCENARIOS))
TECHNIQUES = {
    "batch": "Batch",
    "batch-per-step": "Batch, time-specific",
    "layer": "Layer",
    "streaming-l1": "Streaming L1",
}


@dataclass(frozen=True, kw_only=True)
class Table1:
    """Find out which technique works in which scenario: the paper's table 1.

    Batch Normalization, time-specific Batch Normalization, Layer and Streaming Normalization, in feedforward and
    recurrent, fully connected and convolutional networks, online, with small mini-batches, and all combined. It runs
    online-fc, conv, recurrent-conv and char-rnn, each in a folder of its own, and judges by one stated criterion. Or it
    judges such experiments that were run before, at scales of their own (--results).
    """

    name: ClassVar[str] = "table1"
    alias: ClassVar[str | None] = "table1"
    title: ClassVar[str] = "Which technique works in which scenario"
    summary: ClassVar[str] = "which technique works in which scenario: the paper's table, every cell a training run"

    data: Folder = None
    """Folder with images, as for online-fc. Default: scikit-learn's digits."""

    text: File = None
    """Text file, as for char-rnn. Default: the source files of Python's standard library."""

    out: Annotated[str, conf.arg(metavar="FOLDER")] = "runs/table1"
    """Folder for the four experiments and the table; the same command continues what an interrupted one left there."""

    limit: Amount = None
    """Train on so many images. Default: 10,000, or 800 of the digits."""

    epochs: Positive = 1
    """Passes over the training images."""

    updates: Positive = 150
    """Weight updates of the recurrent networks that read text."""

    seeds: Repeats = 3
    """Number of final runs for each cell."""

    jobs: Amount = None
    """Worker processes, one thread each. Default: one per processor core."""

    watch: bool = False
    """Watch the streaming layers of each run: pages that refresh themselves, in watch/index.html of each experiment."""

    results: Annotated[tuple[str, ...], conf.arg(metavar="FOLDER ...")] = ()
    """Run nothing, and judge what is in these four folders, of online-fc, conv, recurrent-conv and char-rnn."""

    def check(self) -> None:
        """Look at the options and the data of all parts, before anything is written.

        Raises:
            UserError: an option cannot be meant.
        """
        for part in self.parts():
            part.check()
            part.task.open(part.parsed_settings())

    def parts(self) -> Iterator[Experiment[Any]]:
        """The four experiments, with all settings that a scenario asks for."""
        images = {"data": self.data, "limit": self.limit, "epochs": self.epochs}
        kinds: tuple[tuple[Any, dict[str, Any], tuple[float, ...]], ...] = (
            (OnlineFC, images, (1e-3, 3e-3, 1e-2, 3e-2)),
            (Conv, images, (3e-3, 1e-2, 3e-2, 1e-1)),
            (RecurrentConv, images, (1e-3, 3e-3, 1e-2, 3e-2)),
            (CharRNN, {"data": self.text, "updates": self.updates}, (3e-3, 1e-2, 3e-2)),
        )
        for kind, options, rates in kinds:
            settings = tuple(scenario.setting for scenario in SCENARIOS if scenario.experiment == kind.name)
            methods = tuple(name for name in TECHNIQUES if name in kind.catalogue)
            shared = {"out": str(typed_path(self.out) / kind.name), "seeds": self.seeds, "jobs": self.jobs}
            shared["watch"] = self.watch
            yield kind(**options, **shared, methods=methods, settings=settings, rates=rates)
