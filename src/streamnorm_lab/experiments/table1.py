"""The paper's table 1: which technique works in which scenario, each cell a training run and a stated criterion.

It is four other experiments, each in a folder of its own with its own report, and one table over them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from typing_extensions import TypedDict
from tyro import conf

from streamnorm_lab.analysis.results import CONFIG_ADVICE, Cell, Results, load_results
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.files import output_folder, typed_path, write_text
from streamnorm_lab.common.forms import FormError, check, parse
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.experiments.char import CharRNN
from streamnorm_lab.experiments.conv import Conv
from streamnorm_lab.experiments.experiment import Experiment, Folder, Number
from streamnorm_lab.experiments.online_fc import OnlineFC
from streamnorm_lab.experiments.recurrent_conv import RecurrentConv
from streamnorm_lab.reports.report import build_report
from streamnorm_lab.running.sweep import run_sweep

CONFIG = "table1.json"
WORKS, FAILS = 0.95, 0.5
CRITERION = (
    f"A technique works if it gains at least {WORKS:.0%} of what the best of the four gains over guessing, in accuracy "
    f"or in loss; it fails if it gains less than {FAILS:.0%}, or cannot train at all; in between it is suboptimal. "
    "Each is at its own best learning rate, and the gain is the mean over seeds."
)


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


@dataclass(frozen=True)
class Judged:
    """A cell of the table.

    ``share`` is the gain over guessing, as a share of the best technique's; None if this one cannot train.
    """

    verdict: str
    share: float | None
    cell: Cell
    results: Results


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

    text: Annotated[str | None, conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Text file, as for char-rnn. Default: the source files of Python's standard library."""

    out: Annotated[str, conf.arg(metavar="FOLDER")] = "runs/table1"
    """Folder for the four experiments and the table; the same command continues what an interrupted one left there."""

    limit: Number = None
    """Train on so many images. Default: 10,000, or 800 of the digits."""

    epochs: int = 1
    """Passes over the training images."""

    updates: int = 150
    """Weight updates of the recurrent networks that read text."""

    seeds: int = 3
    """Number of final runs for each cell."""

    jobs: Number = None
    """Worker processes, one thread each. Default: one per processor core."""

    watch: bool = False
    """Watch the streaming layers of each run: pages that refresh themselves, in watch/index.html of each experiment."""

    results: Annotated[tuple[str, ...], conf.arg(metavar="FOLDER ...")] = ()
    """Run nothing, and judge what is in these four folders, of online-fc, conv, recurrent-conv and char-rnn."""

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


def run_table(table: Table1, command: str) -> tuple[Path, int]:
    """Do all runs of all parts that are not done yet; return the folder, and how many runs failed.

    Raises:
        UserError: an option cannot be meant.
        OSError: the disk is full, or similar; what is finished stays.
    """
    folder = typed_path(table.out)
    if table.results:
        _write_config(folder, command, _folders_given(table.results))
        return folder, 0
    parts = list(table.parts())
    for part in parts:  # all options are looked at before the first run
        part.check()
        part.open()
    failed = 0
    for part in parts:
        part_folder, part_failed = run_sweep(part, command)
        build_report(part_folder)
        failed += part_failed
    _write_config(folder, command, {part.name: folder / part.name for part in parts})
    return folder, failed


def _folders_given(given: tuple[str, ...]) -> dict[str, Path]:
    """The folder of each part, told by the experiment that it holds."""
    folders: dict[str, Path] = {}
    for path in map(typed_path, given):
        name = load_results(path).experiment.name
        if name not in PARTS or name in folders:
            wrong = "is a second one of" if name in folders else "is of"
            raise UserError(f"--results: {path} {wrong} {name}; give one folder each of {', '.join(PARTS)}")
        folders[name] = path
    missing = [name for name in PARTS if name not in folders]
    if missing:
        raise UserError(f"--results: no folder of {', '.join(missing)}; give one each of {', '.join(PARTS)}")
    return folders


def _write_config(folder: Path, command: str, parts: Mapping[str, Path]) -> None:
    """Note how the table was made, and from where, so that ``streamnorm report`` can make it anew."""
    output_folder(folder)
    places = {name: Path(os.path.relpath(part, folder)).as_posix() for name, part in parts.items()}
    write_text(folder / CONFIG, json.dumps({"commands": [command], "parts": places}, indent=1))


class TableConfig(TypedDict):
    """``table1.json``: the commands that made the table, and where each part is, seen from the table's folder."""

    commands: list[str]
    parts: dict[str, str]


def read_table(folder: Path) -> TableConfig:
    """What ``table1.json`` says.

    Raises:
        UserError: it is damaged.
    """
    path = folder / CONFIG
    try:
        config: TableConfig = parse(path.read_bytes())
        check(config, TableConfig)
        if set(config["parts"]) != set(PARTS):
            raise FormError(f"parts must name {', '.join(PARTS)}, not {', '.join(config['parts']) or 'nothing'}")
    except FormError as error:
        raise UserError(f"{path}: {error}. {CONFIG_ADVICE}") from None
    except ValueError:
        raise UserError(f"{path} is not JSON. {CONFIG_ADVICE}") from None
    return config


def judge(folder: Path) -> dict[Scenario, dict[str, Judged]]:
    """Every cell of the table, from the logs.

    Raises:
        UserError: a part has no results.
    """
    results = {name: load_results(folder / place) for name, place in read_table(folder)["parts"].items()}
    for name, part in results.items():
        if part.experiment.name != name:
            raise UserError(f"{folder / CONFIG}: the part {name} holds {part.experiment.name}. {CONFIG_ADVICE}")
    return {scenario: _judge(scenario, results[scenario.experiment]) for scenario in SCENARIOS}


def _judge(scenario: Scenario, results: Results) -> dict[str, Judged]:
    setting = Setting.parse(scenario.setting)
    cells = {name: results.cells.get((trained_as(name, results), setting)) for name in TECHNIQUES}
    gains: dict[str, float | None] = {}
    for name, cell in cells.items():
        if cell is None:
            raise UserError(
                f"{scenario.experiment} has no result of {name} at {setting}: complete it by the command that made it"
            )
        gains[name] = gain(results, cell)
    best = max((value for value in gains.values() if value is not None), default=0.0)
    judged = {}
    for name, cell in cells.items():
        assert cell is not None
        value = gains[name]
        share = None if value is None else value / best if best > 0 else 0.0
        judged[name] = Judged(verdict(share), share, cell, results)
    return judged


def trained_as(technique: str, results: Results) -> str:
    """Without time steps, time-specific Batch Normalization is Batch Normalization."""
    return technique if technique in results.experiment.catalogue else "batch"


def gain(results: Results, cell: Cell) -> float | None:
    """How far the mean score is from guessing among all classes alike; None if the technique cannot train there."""
    if cell.mean is None:
        return None
    sign = -1 if results.experiment.score.lower_is_better else 1
    return sign * (cell.mean.mean - results.guessing)


def verdict(share: float | None) -> str:
    """The criterion.

    Example:
        >>> verdict(0.97), verdict(0.8), verdict(0.1), verdict(None)
        ('works', 'suboptimal', 'fails', 'fails')
    """
    if share is None or share < FAILS:
        return "fails"
    return "works" if share >= WORKS else "suboptimal"
