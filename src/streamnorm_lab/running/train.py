"""One training run: from its first mini-batch to its last log line, over any number of kills in between."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import streamnorm as sn
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.data.task import Batch, Data, Scores, Split, Task
from streamnorm_lab.experiments.experiment import Experiment
from streamnorm_lab.logs.records import Run
from streamnorm_lab.logs.runlog import RunLog
from streamnorm_lab.methods.method import rows
from streamnorm_lab.methods.peers.batch_renorm import BatchRenorm
from streamnorm_lab.running.watching import watched

EVALUATION_BATCH = 1000
RECALIBRATION_BATCH = 128
TICK_SECONDS = 0.2

Measure = Callable[[Tensor, Tensor, int], Mapping[str, float]]
"""`Task.measure`."""

Tick = Callable[[int, float, float], None]
"""Told now and then: images or characters seen, and the training loss and accuracy of the last point."""


class Diverged(Exception):
    """The loss is no longer a finite number."""


@dataclass
class Meter:
    """Loss and accuracy over what was seen since the last point, each target judged before it is learnt from."""

    seen: int = 0
    total_loss: float = 0.0
    correct: int = 0

    def add(self, loss: float, correct: int, targets: int) -> None:
        """Take in one mini-batch: its mean loss, and how many of its targets the highest logit was right about."""
        self.seen += targets
        self.total_loss += loss * targets
        self.correct += correct

    @property
    def loss(self) -> float:
        """The mean loss."""
        return self.total_loss / max(1, self.seen)

    @property
    def accuracy(self) -> float:
        """The share of targets that the highest logit was right about."""
        return self.correct / max(1, self.seen)


class Training:
    """Model, optimizer and position of one run: all that a checkpoint has to hold.

    The initial weights and the order of the data follow from the seed alone, so that they are the same for every
    method.
    """

    def __init__(self, experiment: Experiment[Any], run: Run, data: Data) -> None:
        self.experiment = experiment
        self.run = run
        self.data = data
        self.setting = Setting.parse(run.setting)
        torch.manual_seed(run.seed)
        self.model: nn.Module = experiment.model(data, run.method)
        self.network = self.model  # what is trained through
        self.optimizer = experiment.optimizer(self.model.parameters(), run.rate)
        self.task = experiment.task
        passes, self.updates_per_epoch = self.task.schedule(data, self.setting)
        self.total_updates = passes * self.updates_per_epoch
        for layer in self.model.modules():
            if isinstance(layer, BatchRenorm):  # its limits follow a schedule
                layer.plan(self.total_updates * self.setting.batches)
        self.updates = 0
        self.seen = 0
        self.meter = Meter()

    def advance(self) -> Iterator[None]:
        """Train to the end, stopping after every weight update.

        Raises:
            Diverged: the loss is not finite.
        """
        while self.updates < self.total_updates:
            epoch, first = divmod(self.updates, self.updates_per_epoch)
            for group in sn.accumulate(self._batches(epoch, first), self.setting.batches):
                self.optimizer.zero_grad()
                for (inputs, targets), weight in group:
                    logits = self.network(inputs)
                    loss = F.cross_entropy(logits, targets)
                    self._watch(loss, logits, targets)
                    (weight * loss).backward()
                self._set_rate()
                self.optimizer.step()
                self.updates += 1
                yield

    def _set_rate(self) -> None:
        rate = self.experiment.rate(self.run.rate, self.updates / self.total_updates)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate

    def _batches(self, epoch: int, first_update: int) -> Iterator[Batch]:
        return self.task.batches(self.data, self.setting, self.run.seed, epoch, first_update)

    def _watch(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        self._note(loss.item(), int((logits.argmax(1) == targets).sum()), len(targets))

    def _note(self, loss: float, correct: int, targets: int) -> None:
        if not math.isfinite(loss):
            raise Diverged
        self.seen += targets
        self.meter.add(loss, correct, targets)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, between two weight updates."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": torch.get_rng_state(),
            "updates": self.updates,
            "seen": self.seen,
            "meter": vars(self.meter).copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["generator"])
        self.updates = state["updates"]
        self.seen = state["seen"]
        self.meter = Meter(**state["meter"])


def train(
    experiment: Experiment[Any],
    run: Run,
    data: Data,
    log: RunLog,
    tick: Tick,
    kind: type[Training] = Training,
    watch: Path | None = None,
) -> None:
    """Run to the end, from the last checkpoint if there is one; with a folder to ``watch`` in, a monitor looks on.

    A run that diverges ends early with the scores of guessing; a layer that refuses its very first mini-batch, as
    Batch Normalization does for one sample, ends the run as one that fails. Both are results, not errors.
    """
    training = kind(experiment, run, data)
    state = log.start()
    began = time.monotonic()
    if state is not None:
        began -= state.pop("seconds")
        training.load_state_dict(state)
    try:
        watching = watched(training.model, watch, _title(training), training.updates, training.total_updates)
        with _noting_runaway(training) as ran_away, watching:
            _follow(training, experiment, log, began, tick)
        end: dict[str, Any] = {"status": "done", **_final_scores(training)}
        end.update(experiment.epilogue(training.model, data, run))
    except Diverged:
        end = {"status": "diverged", **_guessing(training)}
    except ValueError as refusal:
        if training.updates > 0:
            raise
        end = {"status": "fails", "reason": str(refusal)}
    if ran_away:
        end["ran_away"] = ran_away[0]
    seconds = round(time.monotonic() - began, 3)
    log.finish({**end, "updates": training.updates, experiment.kind.unit: training.seen, "seconds": seconds})


@contextmanager
def _noting_runaway(training: Training) -> Iterator[list[int]]:
    """Keep the warnings of layers that run away for the log: rates that are too high are tried here.

    Yields:
        The weight updates at which there was one.
    """
    updates: list[int] = []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Any, *rest: Any, **options: Any) -> None:
            if " runs away: " in str(message):
                updates.append(training.updates)
            else:
                show(message, *rest, **options)

        warnings.filterwarnings("always", message=".* runs away: ")
        warnings.showwarning = note
        yield updates


def _title(training: Training) -> str:
    """The title of a run's page."""
    run, method = training.run, training.experiment.catalogue[training.run.method].label
    goal = "choosing a rate" if run.stage == "tune" else f"seed {run.seed}"
    return f"{training.experiment.name}, {method} at {training.setting.label}, rate {run.rate:g}, {goal}"


def _follow(training: Training, experiment: Experiment[Any], log: RunLog, began: float, tick: Tick) -> None:
    """Train; write points, checkpoints and ticks when they are due."""
    points = {math.ceil(training.total_updates * i / experiment.points) for i in range(1, experiment.points + 1)}
    latest = training.meter
    saved = ticked = time.monotonic()
    for _ in training.advance():
        now = time.monotonic()
        if now - ticked >= TICK_SECONDS:
            tick(training.seen, latest.loss, latest.accuracy)
            ticked = now
        if training.updates in points:
            log.write(_point(training, experiment))
            latest = training.meter
            training.meter = Meter()
        if now - saved >= experiment.checkpoint_every:
            log.save({**training.state_dict(), "seconds": now - began})
            saved = now


def _point(training: Training, experiment: Experiment[Any]) -> dict[str, Any]:
    point: dict[str, Any] = {
        "type": "point",
        "update": training.updates,
        experiment.kind.unit: training.seen,
        "train": {"loss": training.meter.loss, "accuracy": training.meter.accuracy},
    }
    if training.run.stage == "final":
        point["test"] = evaluate(training.model, training.task.watched(training.data), training.task.measure)
    return point


def _final_scores(training: Training) -> dict[str, Any]:
    """Scores on all validation or test data, for each row of the result table that this training gives."""
    held_out = training.data.validation if training.run.stage == "tune" else training.data.test
    scores = {}
    for row in rows(training.run.method, training.experiment.catalogue):
        model = training.model if row.name == training.run.method else _recalibrated(training)
        scores[row.name] = evaluate(model, held_out, training.task.measure)
    if any(score["loss"] is None for score in scores.values()):
        raise Diverged
    return {f"{training.experiment.kind.unit}_evaluated": held_out.count, "scores": scores}


def _guessing(training: Training) -> dict[str, Any]:
    chance = training.task.guess(training.data.classes)
    return {"scores": {row.name: chance for row in rows(training.run.method, training.experiment.catalogue)}}


def _recalibrated(training: Training) -> nn.Module:
    """A copy whose Batch Normalization has the statistics of the training images in mini-batches of about 128.

    The running statistics of tiny mini-batches are poor, and judging Batch Normalization by them alone would be unfair.
    """
    model = copy.deepcopy(training.model)
    train = training.data.train
    parts = torch.arange(len(train)).tensor_split(math.ceil(len(train) / RECALIBRATION_BATCH))
    update_bn((train.batch(index) for index in parts), model)
    return model


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, measure: Measure = Task.measure) -> Scores:
    """Mean loss and accuracy, and what ``measure`` adds; the loss is None where it is not a finite number."""
    model.eval()
    loss, correct, further = 0.0, 0, defaultdict[str, float](float)
    for start in range(0, len(split), EVALUATION_BATCH):
        inputs, targets = split.batch(slice(start, start + EVALUATION_BATCH))
        logits = model(inputs)
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        correct += int((logits.argmax(1) == targets).sum())
        for name, total in measure(logits, targets, len(inputs)).items():
            further[name] += total
    model.train()
    return {
        "loss": loss / split.count if math.isfinite(loss) else None,
        "accuracy": correct / split.count,
        **{name: total / len(split) for name, total in further.items()},
    }
