"""The runs of an experiment: those that choose rates, and those that are reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamnorm_lab.common.setting import Setting
from streamnorm_lab.experiments.experiment import Experiment
from streamnorm_lab.logs.records import Run

TUNE_SEED = 1000
"""Rates are chosen with other seeds than those that are reported."""


def cells(experiment: Experiment[Any]) -> list[tuple[str, str]]:
    """Every (method, setting)."""
    return [(method, str(setting)) for setting in experiment.parsed_settings() for method in experiment.methods]


def tune_runs(experiment: Experiment[Any]) -> list[Run]:
    """The runs that choose the rates."""
    seeds = range(TUNE_SEED, TUNE_SEED + experiment.tune_seeds)
    return [
        Run("tune", method, setting, rate, seed)
        for method, setting in cells(experiment)
        for rate in experiment.rates_at(Setting.parse(setting))
        for seed in seeds
    ]


def final_runs(experiment: Experiment[Any], rates: Mapping[tuple[str, str], Sequence[float]]) -> list[Run]:
    """The runs that are reported, at the ``rates`` chosen for each (method, setting); none where none works."""
    return [
        Run("final", *cell, rate, seed)
        for cell in cells(experiment)
        for rate in rates.get(cell, ())
        for seed in range(experiment.seeds)
    ]


def cost(experiment: Experiment[Any], facts: Mapping[str, Any], run: Run) -> float:
    """About how long a run takes, in units of the experiment's own."""
    setting = Setting.parse(run.setting)
    return experiment.task.mini_batches(facts, setting, run.stage) * experiment.work(setting)


def units(experiment: Experiment[Any], facts: Mapping[str, Any], run: Run) -> int:
    """The number of images or characters that a run sees."""
    task, setting = experiment.task, Setting.parse(run.setting)
    return task.mini_batches(facts, setting, run.stage) * setting.samples * task.units_per_sample
