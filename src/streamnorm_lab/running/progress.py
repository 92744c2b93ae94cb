"""Progress display: a bar for everything, a line for each running run."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn

from streamnorm_lab.common.setting import Setting
from streamnorm_lab.experiments.experiment import Experiment
from streamnorm_lab.logs.records import Run
from streamnorm_lab.logs.runlog import LoggedRun
from streamnorm_lab.running.plan import units


class Display:
    """Bars on a terminal; elsewhere one line for each run that ends.

    Args:
        experiment: what is run.
        data: what identifies its data.
    """

    def __init__(self, experiment: Experiment[Any], data: Mapping[str, Any]) -> None:
        self._experiment = experiment
        self._data = data
        self._console = Console(stderr=True)
        columns: tuple[ProgressColumn, ...] = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
        )
        self._progress = Progress(
            *columns, console=self._console, disable=not self._console.is_terminal, speed_estimate_period=120
        )
        self._all = self._progress.add_task("[bold]all runs", total=None, note="")
        self._single: dict[Run, TaskID] = {}
        self._ended = 0
        self._kept = 0
        self._count = 0

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._single.values():
            self._progress.remove_task(task)
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text, highlight=False, soft_wrap=True)

    def plan(self, work: float, count: int) -> None:
        """Set how much there is to do in all: in units of work for the bar, and in runs for the text."""
        self._count = count
        self._progress.update(self._all, total=work, note=f"run {self._ended} of {count}")

    def start(self, run: Run) -> None:
        """A worker began a run."""
        total = units(self._experiment, self._data, run)
        self._single[run] = self._progress.add_task(f"  {self._describe(run)}", total=total, note="")

    def news(self, run: Run, seen: int, loss: float, accuracy: float) -> None:
        """A run got on."""
        note = f"loss {loss:.2f}  accuracy {accuracy:.0%}"
        self._progress.update(self._single[run], completed=seen, note=note)

    def end(self, run: Run, work: float, logged: LoggedRun | None, kept: bool = False) -> None:
        """A run ended, well or badly, or was kept from an earlier command; ``logged`` is None if it left no result."""
        self._ended += 1
        self._kept += kept
        note = f"run {self._ended} of {self._count}" + (f", {self._kept} kept from before" if self._kept else "")
        self._progress.update(self._all, advance=work, note=note)
        self._progress.remove_task(self._single.pop(run))
        if not self._console.is_terminal:
            mark = " (kept from before)" if kept else ""
            text = f"[{self._ended}/{self._count}] {self._describe(run)}: {self._outcome(logged)}{mark}"
            self.say(text.replace("[", r"\["))

    def _describe(self, run: Run) -> str:
        goal = "tuning" if run.stage == "tune" else f"seed {run.seed}"
        label = self._experiment.catalogue[run.method].label
        return f"{label} {Setting.parse(run.setting).label} rate {run.rate:g} {goal}"

    def _outcome(self, logged: LoggedRun | None) -> str:
        if logged is None or logged.end is None:
            return "failed"
        if logged.end["status"] != "done":
            return str(logged.end["status"])
        score = self._experiment.score
        value = score.value(logged.end["scores"][logged.run["method"]][score.key])
        return f"{score.key} {value} in {logged.end['seconds']:.1f} s"
