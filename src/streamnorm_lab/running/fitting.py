"""As many training samples as fit into a time: speed is measured, then runs are made shorter where needed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from streamnorm_lab.common.environment import usable_cores
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.data.image_task import Images
from streamnorm_lab.data.images import Data, Split, split_sizes, standardization
from streamnorm_lab.experiments.images import ImageExperiment
from streamnorm_lab.logs.records import Run
from streamnorm_lab.running.plan import TUNE_SEED, cells
from streamnorm_lab.running.train import Diverged, Training, evaluate

SECONDS = 0.5
"""The time for which each method is trained at each setting, to measure its speed."""

FEWEST_UPDATES = 10
"""Weight updates of a run. Fewer are not worth their time."""

SHARE = 0.8
"""Of the time; the rest is for what is not measured: starting processes, evaluations, the report."""

ExperimentT = TypeVar("ExperimentT", bound=ImageExperiment)


@dataclass(frozen=True)
class Speed:
    """Seconds that a method takes for a sample at a setting: to train on it, and to evaluate it."""

    train: float
    evaluate: float


def fitted(experiment: ExperimentT, images: Images, minutes: float) -> ExperimentT:
    """The experiment, with as many training samples as its runs get through in this time.

    Raises:
        UserError: too few.
    """
    source = images.source
    sizes = split_sizes(source, experiment.limit, experiment.validation, experiment.tune_limit)
    planned, validation = sizes
    short = experiment.tune_limit or planned
    largest = max(setting.update for setting in experiment.parsed_settings())
    data = _some(images, min(planned, 4 * largest))
    tested = min(source.test_size, experiment.test_limit or source.test_size)
    training = evaluation = 0.0
    for method, setting in cells(experiment):
        speed = _speed(experiment, method, setting, data)
        trials = len(experiment.rates) * experiment.tune_seeds
        training += speed.train * experiment.epochs * (trials * short + experiment.seeds * planned)
        points = experiment.points * min(experiment.curve_images, tested) + tested
        evaluation += speed.evaluate * (trials * validation + experiment.seeds * points)
    available = 60 * minutes * SHARE * min(experiment.jobs or usable_cores(), len(cells(experiment)))
    share = (available - evaluation) / max(training, 1e-9)
    if share >= 1:
        return replace(experiment, limit=planned)
    limit = math.floor(max(0.0, share) * planned)
    if limit < FEWEST_UPDATES * largest:
        needed = (evaluation + training * FEWEST_UPDATES * largest / planned) / available * minutes
        raise UserError(
            f"--minutes {minutes:g}: even with {FEWEST_UPDATES} weight updates a run it would take about {needed:.1g}; "
            "give more, or fewer --methods, --settings, --rates or --seeds"
        )
    tune_limit = None if experiment.tune_limit is None else max(largest, math.floor(share * short))
    return replace(experiment, limit=limit, tune_limit=tune_limit)


def _some(images: Images, count: int) -> Data:
    """The first training samples."""
    pixels, labels = images.source.train(count)
    inputs = torch.from_numpy(pixels)
    split = Split(inputs, torch.from_numpy(labels), *standardization(inputs))
    return Data(max(2, int(labels.max()) + 1), split, split, split)


def _speed(experiment: ImageExperiment, method: str, setting: str, data: Data) -> Speed:
    """Train and evaluate for a moment; nothing where the method cannot train."""
    rate = experiment.rates_at(Setting.parse(setting))[0]
    training = Training(experiment, Run("tune", method, setting, rate, TUNE_SEED), data.to(experiment.device))
    try:
        seconds, seen = _timed(training)
    except (Diverged, ValueError):
        return Speed(0.0, 0.0)
    began = time.perf_counter()
    evaluate(training.model, training.data.train)
    return Speed(seconds / seen, (time.perf_counter() - began) / len(data.train))


def _timed(training: Training) -> tuple[float, int]:
    """Seconds, and the samples trained on in them; the first weight update, which is slower, only if it is all."""
    began, before = time.perf_counter(), 0
    for number, _ in enumerate(training.advance()):
        seconds = time.perf_counter() - began
        if seconds > SECONDS:
            return seconds, training.seen - before
        if number == 0:
            first, began, before = (seconds, training.seen), time.perf_counter(), training.seen
    seconds = time.perf_counter() - began
    return (seconds, training.seen - before) if training.seen > before else first
