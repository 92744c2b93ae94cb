"""Sinks, with stand-ins for the libraries; tests/integrations has them with the libraries themselves."""

from __future__ import annotations

import math
from typing import Any

import streamnorm as sn
from streamnorm.insight import Reading, Sample

SAMPLE = Sample(50, 1.0, 0.1, {"body.0": Reading(*[0.5] * len(Reading._fields))._replace(present=math.nan)})


class Writer:
    """What is asked of a SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}
        self.flushed = False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name] = value, step

    def flush(self) -> None:
        self.flushed = True


def test_a_writer_gets_the_finite_numbers_and_stays_open() -> None:
    writer = Writer()
    sink: Any = sn.insight.tensorboard(writer)
    sink(SAMPLE)
    sink.close()
    assert writer.scalars["streamnorm-drift/body.0"] == (0.5, 50)
    assert writer.scalars["streamnorm-rate"] == (0.1, 50)
    assert "streamnorm-present/body.0" not in writer.scalars
    assert writer.flushed


class Run:
    """What is asked of a run of Weights & Biases."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.metrics: dict[str, dict[str, Any]] = {}

    def define_metric(self, name: str, **options: Any) -> None:
        self.metrics[name] = options

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)


def test_a_run_gets_numbers_over_weight_updates() -> None:
    """It counts steps of its own: the update is logged beside the numbers, and is the axis of their curves."""
    run = Run()
    sn.insight.wandb(run)(SAMPLE)
    assert run.metrics["streamnorm-*"] == {"step_metric": "streamnorm-update"}
    assert run.logged[0]["streamnorm-update"] == 50
    assert run.logged[0]["streamnorm-drift/body.0"] == 0.5
    assert "streamnorm-present/body.0" not in run.logged[0]
