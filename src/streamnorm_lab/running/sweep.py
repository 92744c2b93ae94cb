"""The sweep over all runs of an experiment: first those that choose rates, then those that are reported.

Runs that an earlier command finished are skipped, and interrupted ones continue from their checkpoints.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import streamnorm as sn
from streamnorm_lab.analysis.results import CONFIG, check_config, check_run, checked_runs, rates_to_run, read_config
from streamnorm_lab.common.environment import card, environment, usable_cores
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.files import locked, output_folder, typed_path, write_text
from streamnorm_lab.data.task import Material
from streamnorm_lab.experiments.experiment import Experiment
from streamnorm_lab.experiments.options import option
from streamnorm_lab.logs.packed import log_path, read_packed
from streamnorm_lab.logs.records import Run
from streamnorm_lab.logs.runlog import LoggedRun, Record, RunLog, read_log
from streamnorm_lab.methods.method import rows
from streamnorm_lab.reports.watch import WATCH, write_index
from streamnorm_lab.running import together
from streamnorm_lab.running.cluster import Cluster
from streamnorm_lab.running.plan import cells, cost, final_runs, tune_runs
from streamnorm_lab.running.pool import Pool, Send
from streamnorm_lab.running.progress import Display
from streamnorm_lab.running.train import Training, train
from streamnorm_lab.running.watching import watch_folder

CLUSTER_JOBS = 100

INDEX_SECONDS = 3.0
"""Between two writings of the index of watched runs, at least."""


def run_sweep(experiment: Experiment[Any], command: str) -> tuple[Path, int]:
    """Do all runs that are not done yet.

    Args:
        experiment: the experiment with its options.
        command: what the user typed, for the report.

    Returns:
        The output folder, and how many runs failed.

    Raises:
        UserError: an option cannot be meant, or the folder holds something else.
        OSError: the disk is full, or similar; what is finished stays.
    """
    experiment.check()
    together.check(experiment.settings)
    material = experiment.task.open(experiment.parsed_settings())
    folder = output_folder(place_of(experiment, material))
    with _removed_if_empty(folder), locked(folder), _prepared(material, folder) as (cache, information):
        experiment.rehearse(information)
        for torn in folder.rglob(".*.tmp"):  # left by a kill in the middle of a write
            torn.unlink()
        _write_config(experiment, information, command, folder)
        failed = _Sweep(experiment, folder, cache, information).run()
    return folder, failed


def place_of(experiment: Experiment[Any], material: Material) -> Path:
    """The output folder."""
    return typed_path(experiment.out or f"runs/{experiment.label}-{material.name}")


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove a folder that holds nothing, if what was asked cannot be done."""
    try:
        yield
    except UserError:
        with suppress(OSError):  # it is not empty
            folder.rmdir()
        raise


@contextmanager
def _prepared(material: Material, folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The data as plain arrays in a folder that goes away in the end."""
    cache = folder / "cache"
    try:
        yield cache, material.prepare(cache)
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def _write_config(experiment: Experiment[Any], data: dict[str, Any], command: str, folder: Path) -> None:
    """Note what is run in this folder, or refuse if it is something else than what was run there before."""
    options = {name: value for name, value in asdict(experiment).items() if name != "data"}
    config = {
        "experiment": experiment.name,
        "streamnorm": _layers(sn.__version__),
        "identity": {**experiment.identity(), experiment.kind.unit: data["fingerprint"]},
        "options": options,
        "data": data,
        "commands": [command],
    }
    if (folder / CONFIG).exists():
        earlier = read_config(folder)
        _refuse_another(experiment, earlier, config, folder)
        config["commands"] = [*(c for c in earlier["commands"] if c != command), command]
    write_text(folder / CONFIG, json.dumps(config, indent=1))


def _refuse_another(experiment: Experiment[Any], earlier: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    if earlier["experiment"] != config["experiment"]:
        raise UserError(f"{folder} holds the experiment {earlier['experiment']}: choose another folder with --out")
    check_config(earlier, experiment, folder)
    before, now = earlier.get("streamnorm", "0.1"), config["streamnorm"]
    if before != now:
        raise UserError(
            f"{folder} holds runs of streamnorm {before}, whose layers do not compute as those of {now} do: choose "
            "another folder with --out"
        )
    changed = {**_other_options(earlier, config, experiment.kind.unit), **_other_data(experiment, earlier, config)}
    for words, (before, now) in changed.items():
        raise UserError(f"{folder} holds runs with {words} {before}, not {now}: choose another folder with --out")


def _layers(version: str) -> str:
    """The part of a version that says how layers compute."""
    return ".".join(version.split(".")[:2])


def _other_options(earlier: dict[str, Any], config: dict[str, Any], unit: str) -> dict[str, tuple[Any, Any]]:
    """The options that decide the numbers and differ."""
    now = {name: value for name, value in config["identity"].items() if name != unit}
    return {
        option(name): (earlier["identity"].get(name), value)
        for name, value in now.items()
        if earlier["identity"].get(name) != value
    }


def _other_data(
    experiment: Experiment[Any], earlier: dict[str, Any], config: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The differences between two sets of data: name, amounts used, or content."""
    before, now = earlier["data"], config["data"]
    if before["fingerprint"] == now["fingerprint"]:
        return {}
    if before["name"] != now["name"]:
        return {"the data": (before["name"], now["name"])}
    amounts, others = experiment.task.amounts(now), experiment.task.amounts(before)
    changed = {option(name): (others[name], amount) for name, amount in amounts.items() if others[name] != amount}
    found = f"{experiment.kind.unit} of {now['name']} of fingerprint"
    return changed or {found: (before["fingerprint"], now["fingerprint"])}


class _Sweep:
    def __init__(self, experiment: Experiment[Any], folder: Path, cache: Path, data: dict[str, Any]) -> None:
        self._experiment = experiment
        self._folder = folder
        self._data = data
        self._display = Display(experiment, data)
        self._work = partial(_work, experiment, folder, cache)
        self._packed = read_packed(folder)
        self._failed = 0
        self._index_due = 0.0

    def run(self) -> int:
        """Do both stages; return how many runs failed."""
        tune = tune_runs(self._experiment)
        most = final_runs(self._experiment, {cell: [0.0] for cell in cells(self._experiment)})
        with self._display, self._indexed(), self._workers(len(tune)) as pool:
            self._display.plan(sum(map(self._cost, tune + most)), len(tune + most))
            self._do(pool, tune)
            rates = rates_to_run(self._experiment, checked_runs(self._experiment, self._folder))
            final = final_runs(self._experiment, rates)
            self._display.plan(sum(map(self._cost, tune + final)), len(tune + final))
            self._do(pool, final)
        return self._failed

    @contextmanager
    def _indexed(self) -> Iterator[None]:
        """Keep the index of watched runs up to date, and leave one that stays."""
        if not self._experiment.watch:
            yield
            return
        index = write_index(output_folder(self._folder / WATCH), live=True)
        self._display.say(f"Watch: {index}")
        try:
            yield
        finally:
            write_index(index.parent)

    def _refresh_index(self) -> None:
        if self._experiment.watch and time.monotonic() >= self._index_due:
            write_index(self._folder / WATCH, live=True)
            self._index_due = time.monotonic() + INDEX_SECONDS

    def _workers(self, tasks: int) -> Pool | Cluster | together.Together:
        options = self._experiment
        if together.count() > 1:
            return together.Together(self._work)
        if options.launcher == "local":
            return Pool(min(options.jobs or usable_cores(), tasks), self._work)
        jobs = options.jobs or CLUSTER_JOBS
        cluster = Cluster(jobs, self._work, self._folder, options.slurm_partition, options.slurm_minutes)
        if cluster.name == "local":
            self._display.say("There is no SLURM here: its jobs run as processes of this machine.")
        return cluster

    def _do(self, pool: Pool | Cluster | together.Together, runs: list[Run]) -> None:
        """Do what is left of ``runs``, the longest first, so that no core waits long for the last one."""
        left = []
        for run in sorted(runs, key=self._cost, reverse=True):
            logged = self._read(run)
            if logged is not None and logged.end is not None:
                self._display.start(run)
                self._display.end(run, self._cost(run), logged, kept=True)
            else:
                left.append(run)
        for kind, run, payload in pool.run(left):
            self._refresh_index()
            if kind == "start":
                self._display.start(run)
            elif kind == "news":
                self._display.news(run, *payload)
            elif kind == "broken":
                raise OSError(*payload)
            else:
                if kind == "failed":
                    self._note_failure(run, payload)
                self._display.end(run, self._cost(run), self._read(run))

    def _cost(self, run: Run) -> float:
        return cost(self._experiment, self._data, run)

    def _note_failure(self, run: Run, reason: str) -> None:
        self._failed += 1
        path = log_path(self._folder, run).with_suffix(".error.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, reason)
        self._display.say(f"{run.key} failed ({reason.strip().splitlines()[-1]}); see {path}")

    def _read(self, run: Run) -> LoggedRun | None:
        path = log_path(self._folder, run)
        logged = self._packed.get(run.key) or (read_log(path) if path.exists() else None)
        if logged is not None:
            check_run(self._experiment, logged, rows(run.method, self._experiment.catalogue))
            if logged.run != vars(run):
                raise UserError(f"{logged.place}: it is the log of another run. {logged.advice}")
        return logged


def log_header(experiment: Experiment[Any], run: Run) -> Record:
    """The first line of a run's log."""
    return {
        "experiment": experiment.name,
        "run": vars(run),
        "options": experiment.identity(),
        "environment": {**environment(), **card(getattr(experiment, "device", "cpu")), **together.described()},
    }


def _work(experiment: Experiment[Any], folder: Path, cache: Path, run: Run, send: Send) -> None:
    """One run in a worker process."""
    path = log_path(folder, run)
    if path.exists() and (logged := read_log(path)) and logged.end:
        return  # an earlier job of a cluster, which this one waited for, has done it
    path.with_suffix(".error.txt").unlink(missing_ok=True)
    data = experiment.task.part(experiment.task.load(cache), run.stage)
    log, kind = (RunLog, Training) if together.count() == 1 else (together.SharedLog, together.SharedTraining)
    watch = watch_folder(folder, run) if experiment.watch else None
    train(experiment, run, data, log(path, log_header(experiment, run)), lambda *scores: send(scores), kind, watch)
