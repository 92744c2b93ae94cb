"""Results of a folder: the rate chosen for each method and setting, and the final scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.forms import Count, FormError, check, parse
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.common.stats import Interval, interval, paired, spread_words
from streamnorm_lab.experiments.experiment import Experiment, Finals, Section
from streamnorm_lab.experiments.options import hints
from streamnorm_lab.logs.packed import read_runs
from streamnorm_lab.logs.records import Config
from streamnorm_lab.logs.runlog import LoggedRun, Record
from streamnorm_lab.methods.method import Method, reported, rows, trainable

CONFIG = "experiment.json"
CONFIG_ADVICE = "Restore this file, or run the experiment into another folder with --out"

AnyExperiment = Experiment[Any] | type[Experiment[Any]]


@dataclass(frozen=True)
class Cell:
    """One method at one setting.

    ``tuning`` is the mean validation score of each rate tried; ``rate`` is the best of them; ``scores`` has the
    test score of each seed at that rate. If the method cannot run at all there, ``reason`` says why.
    """

    method: Method
    setting: Setting
    tuning: Mapping[float, float]
    rate: float | None
    scores: Mapping[int, float]
    runs: tuple[LoggedRun, ...]
    reason: str | None

    @property
    def mean(self) -> Interval | None:
        """Mean test score with its 95% interval; None without final runs."""
        return interval(list(self.scores.values())) if self.scores else None

    @property
    def accuracy(self) -> Mapping[int, float]:
        """The scores of an experiment that is judged by accuracy."""
        return self.scores

    @property
    def train_loss(self) -> Interval | None:
        """Mean training loss since the point before the last, each target judged before it is learnt from."""
        losses = [run.points[-1]["train"]["loss"] for run in self.runs if run.points and not self.diverged]
        return interval(losses) if losses else None

    @property
    def diverged(self) -> int:
        """The number of final runs that diverged."""
        return sum(run.end is not None and run.end["status"] == "diverged" for run in self.runs)

    @property
    def edge(self) -> str | None:
        """The edge of the grid where the best rate lies, "lowest" or "highest"; a better one may lie beyond."""
        if self.rate is None or len(self.tuning) < 2:
            return None
        return {min(self.tuning): "lowest", max(self.tuning): "highest"}.get(self.rate)


@dataclass(frozen=True)
class Results:
    """The results in a folder's logs."""

    experiment: type[Experiment[Any]]
    config: Mapping[str, Any]
    logs: tuple[LoggedRun, ...]
    methods: tuple[Method, ...]
    settings: tuple[Setting, ...]
    cells: Mapping[tuple[str, Setting], Cell]

    @property
    def unfinished(self) -> int:
        """Runs that were begun and have no end."""
        return sum(run.end is None for run in self.logs)

    def method(self, name: str) -> Method:
        """A method by its name, whether it was run or not."""
        return next((method for method in self.methods if method.name == name), self.experiment.catalogue[name])

    @property
    def version(self) -> str:
        """The version of the layers, as far as it says how they compute; folders of the first one do not say it."""
        return str(self.config.get("streamnorm", "0.1"))

    @property
    def spread(self) -> str:
        """The description of the scores: a mean and its interval over so many seeds, or one value."""
        return spread_words(len(cell.scores) for cell in self.cells.values())

    @property
    def guessing(self) -> float:
        """The score of guessing among all classes alike."""
        chance: Mapping[str, Any] = self.experiment.kind.guess(self.config["data"]["classes"])
        return float(chance[self.experiment.score.key])

    @property
    def grid(self) -> list[float]:
        """All rates that were tried; those for one sample per weight update, if that is how they were named."""
        tried = ((rate, cell.setting) for cell in self.cells.values() for rate in cell.tuning)
        if not self.experiment.per_sample:
            return sorted({rate for rate, _ in tried})
        return sorted({float(f"{rate / setting.update:.4g}") for rate, setting in tried})

    def largest_rate(self, cell: Cell) -> float | None:
        """The largest rate tried that still trains: its validation score is nearer to the best one than to guessing."""
        if cell.rate is None:
            return None
        best = cell.tuning[cell.rate]
        return max(rate for rate, score in cell.tuning.items() if abs(score - best) <= abs(best - self.guessing) / 2)

    def difference(self, ours: str, theirs: str, setting: Setting) -> Interval | None:
        """Mean paired difference in the test score; None where one of the two has no result."""
        left, right = self.cells.get((ours, setting)), self.cells.get((theirs, setting))
        return paired(left.scores, right.scores) if left and right else None

    @property
    def finals(self) -> list[Finals]:
        """The final runs of each training, as an experiment's own table takes them."""
        cells = (self.cells[method.name, setting] for setting in self.settings for method in self.methods)
        return [
            Finals(cell.method, cell.setting, [run.end for run in cell.runs if run.end is not None])
            for cell in cells
            if cell.method.trained_as == cell.method.name
        ]

    @property
    def protocol(self) -> list[str]:
        """The protocol of the runs, fact by fact."""
        return self.experiment.words.protocol(self.config, self.methods)

    @property
    def section(self) -> Section | None:
        """The experiment's own table."""
        return self.experiment.section(self.config, self.finals)

    @property
    def setting_pairs(self) -> list[tuple[Setting, Setting]]:
        """The pairs of settings that the experiment compares, of those that were run."""
        pairs = [(Setting.parse(left), Setting.parse(right)) for left, right in self.experiment.setting_pairs]
        return [pair for pair in pairs if set(pair) <= set(self.settings)]

    def change(self, name: str, left: Setting, right: Setting) -> Interval | None:
        """Mean paired difference of a method's test scores at two settings; None where one of them has no result."""
        return paired(self.cells[name, left].scores, self.cells[name, right].scores)


def load_results(folder: Path, experiment: type[Experiment[Any]]) -> Results:
    """Read an output folder of this experiment.

    Raises:
        UserError: the folder is not one, or one of its files is damaged.
    """
    config = read_config(folder)
    check_config(config, experiment, folder)
    logs = checked_runs(experiment, folder)
    if not any(run.end for run in logs):
        command = config["commands"][-1]
        raise UserError(f"{folder}: no run is finished yet, there is nothing to report; continue with `{command}`")
    methods = reported({run.run["method"] for run in logs}, experiment.catalogue)
    settings = sorted({Setting.parse(run.run["setting"]) for run in logs}, key=lambda setting: setting.difficulty)
    cells = {
        (method.name, setting): _cell(experiment, logs, method, setting) for method in methods for setting in settings
    }
    return Results(experiment, config, tuple(logs), tuple(methods), tuple(settings), cells)


def checked_runs(experiment: AnyExperiment, folder: Path) -> list[LoggedRun]:
    """The runs in an output folder of this experiment.

    Raises:
        UserError: a log is damaged, or does not fit the experiment.
    """
    logs = read_runs(folder)
    catalogue = {name: _trained(experiment, name, logs) for name in {run.run["method"] for run in logs}}
    for run in logs:
        check_run(experiment, run, catalogue[run.run["method"]])
    return logs


def _trained(experiment: AnyExperiment, name: str, logs: Iterable[LoggedRun]) -> list[Method]:
    """The rows of the table that a method named in a log gives."""
    try:
        trainable([name], experiment.catalogue)
    except UserError as error:
        place = next(run.place for run in logs if run.run["method"] == name)
        raise UserError(f"{place}: {error}") from None
    return rows(name, experiment.catalogue)


def check_run(experiment: AnyExperiment, run: LoggedRun, table: Iterable[Method]) -> None:
    """Check that a log is of this experiment, whose method gives these rows of the table.

    Raises:
        UserError: it is not.
    """
    try:
        if run.header["experiment"] != experiment.name:
            raise FormError(f"it is a log of {run.header['experiment']}, in a folder of {experiment.name}")
        if str(Setting.parse(run.run["setting"])) != run.run["setting"]:
            raise FormError(f"setting {run.run['setting']!r} is not of the form SxU")
        for i, point in enumerate(run.points, start=1):
            check(point.get(experiment.kind.unit), Count, f"{experiment.kind.unit} of point {i}")
        if run.end is not None:
            _check_end(experiment, run.end, table)
    except (FormError, UserError) as error:
        raise UserError(f"{run.place}: {error}. {run.advice}") from None


def _check_end(experiment: AnyExperiment, end: Record, table: Iterable[Method]) -> None:
    check(end, experiment.end_form, "the last line")
    check(end.get(experiment.kind.unit), Count, f"{experiment.kind.unit} of the last line")
    if end["status"] == "fails":
        check(end.get("reason"), str, "reason")
        return
    for method in table:
        score = end.get("scores", {}).get(method.name, {}).get(experiment.score.key)
        check(score, float, f"scores.{method.name}.{experiment.score.key}")


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``experiment.json``.

    Raises:
        UserError: there is no such folder, it holds no experiment, or ``experiment.json`` is damaged.
    """
    if not folder.is_dir():
        what = "this is a file" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {what}; name a folder that `streamnorm run` wrote")
    path = folder / CONFIG
    try:
        config = parse(path.read_bytes())
        check(config, Config)
        if not config["commands"]:
            raise FormError("commands is empty")
    except FileNotFoundError:
        message = f"{folder}: it holds no {CONFIG}; name a folder that `streamnorm run` wrote"
        raise UserError(message) from None
    except FormError as error:
        raise damaged(folder, error) from None
    except ValueError:
        raise UserError(f"{path} is not JSON. {CONFIG_ADVICE}") from None
    return cast("dict[str, Any]", config)


def damaged(folder: Path, error: Exception) -> UserError:
    """The error for an ``experiment.json`` of another form."""
    return UserError(f"{folder / CONFIG}: {error}. {CONFIG_ADVICE}")


def check_config(config: Mapping[str, Any], experiment: AnyExperiment, folder: Path) -> None:
    """Check that what was asked of a folder fits its experiment.

    Raises:
        UserError: it does not.
    """
    kind = experiment if isinstance(experiment, type) else type(experiment)
    options, types = config["options"], hints(kind)
    try:
        check(config["data"], kind.kind.form, "data")
        for name in (*options, *(name for name in config["identity"] if name != kind.kind.unit)):
            if name not in options:
                raise FormError(f"options lacks {name!r}")
            if name in types:
                check(options[name], types[name], f"options.{name}")
    except FormError as error:
        raise damaged(folder, error) from None


def rates_to_run(experiment: AnyExperiment, logs: Iterable[LoggedRun]) -> dict[tuple[str, str], list[float]]:
    """For each trained method and setting, the best rates of its rows; nothing where it cannot run."""
    logs = list(logs)
    chosen: dict[tuple[str, str], list[float]] = {}
    for method, setting in {(run.run["method"], run.run["setting"]) for run in logs}:
        tuned = (tuning(experiment, logs, row, Setting.parse(setting)) for row in rows(method, experiment.catalogue))
        best = map(experiment.score.best, tuned)
        chosen[method, setting] = sorted({rate for rate in best if rate is not None})
    return chosen


def tuning(
    experiment: AnyExperiment, logs: Iterable[LoggedRun], method: Method, setting: Setting
) -> dict[float, float]:
    """Mean validation score of each rate."""
    scores: dict[float, list[float]] = defaultdict(list)
    for run in _matching(logs, "tune", method, setting):
        scores[run.run["rate"]].append(_score(experiment, run, method))
    return {rate: sum(values) / len(values) for rate, values in sorted(scores.items())}


def _cell(experiment: AnyExperiment, logs: list[LoggedRun], method: Method, setting: Setting) -> Cell:
    tuned = tuning(experiment, logs, method, setting)
    rate = experiment.score.best(tuned)
    runs = [run for run in _matching(logs, "final", method, setting) if run.run["rate"] == rate]
    scores = {run.run["seed"]: _score(experiment, run, method) for run in runs}
    ends = [run.end for run in logs if _is(run, method, setting) and run.end is not None]
    reason = next((end["reason"] for end in ends if end["status"] == "fails"), None)
    return Cell(method, setting, tuned, rate, scores, tuple(runs), reason)


def _matching(logs: Iterable[LoggedRun], stage: str, method: Method, setting: Setting) -> list[LoggedRun]:
    """The finished runs of a stage that have scores."""
    found = (run for run in logs if run.run["stage"] == stage and _is(run, method, setting))
    return [run for run in found if run.end is not None and "scores" in run.end]


def _is(run: LoggedRun, method: Method, setting: Setting) -> bool:
    return run.run["method"] == method.trained_as and run.run["setting"] == str(setting)


def _score(experiment: AnyExperiment, run: LoggedRun, method: Method) -> float:
    assert run.end is not None
    return float(run.end["scores"][method.name][experiment.score.key])
