"""``streamnorm compare``: normalizations in a network of the user's own."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from streamnorm_lab.analysis.results import CONFIG, read_config
from streamnorm_lab.commands.run import carry_out
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.data.image_task import Images
from streamnorm_lab.experiments.compare import Compare
from streamnorm_lab.running.fitting import fitted
from streamnorm_lab.running.sweep import place_of, run_sweep


def compare(words: Sequence[str]) -> int:
    """``streamnorm compare MODULE:FUNCTION …``."""
    experiment = tyro.cli(Compare, args=list(words or ["--help"]), prog="streamnorm compare")
    return carry_out(_compare, experiment, shlex.join(["streamnorm", "compare", *words]))


def _compare(experiment: Compare, command: str) -> tuple[Path, int]:
    experiment.check()
    experiment = replace(experiment, code=experiment.fingerprint())
    images = experiment.task.open(experiment.parsed_settings())
    folder = place_of(experiment, images)
    earlier = read_config(folder)["options"] if (folder / CONFIG).exists() else {}
    if earlier.get("function") == experiment.function and earlier.get("code") != experiment.code:
        raise UserError(f"{folder} holds runs of other code of {experiment.function}: choose another folder with --out")
    return run_sweep(_within_the_time(experiment, images, earlier), command)


def _within_the_time(experiment: Compare, images: Images, earlier: Mapping[str, Any]) -> Compare:
    """The experiment with as many samples as fit into the time, or as many as an earlier command decided."""
    minutes = experiment.minutes
    if minutes is None:
        return experiment
    if earlier.get("minutes") == minutes:
        return replace(experiment, limit=earlier.get("limit"), tune_limit=earlier.get("tune_limit"))
    chosen = fitted(experiment, images, minutes)
    Console(stderr=True).print(f"Within {minutes:g} minutes: {chosen.limit:,} training samples a pass", highlight=False)
    return chosen
