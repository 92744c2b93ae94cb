"""Options: which of them decide numbers, and what values they take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.experiments.catalogue import EXPERIMENTS, find
from streamnorm_lab.experiments.char import CharGRU
from streamnorm_lab.experiments.images import ImageTraining
from streamnorm_lab.experiments.online_fc import OnlineFC
from streamnorm_lab.experiments.options import hints, is_free
from streamnorm_lab.experiments.resnet import ResNet

COMMITTED = sorted((Path(__file__).parents[3] / "results").glob("**/experiment.json"))

FREE = {
    *("data", "out", "methods", "settings", "rates", "seeds", "tune_seeds", "jobs", "limit"),
    *("launcher", "slurm_partition", "slurm_minutes", "checkpoint_every", "watch"),
}
"""What may change from command to command in one output folder, in every experiment."""


@pytest.mark.parametrize("kind", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_which_options_decide_the_numbers(kind):
    images = {"validation", "tune_limit", "test_limit", "device"} if issubclass(kind, ImageTraining) else set()
    assert {name for name, hint in hints(kind).items() if is_free(hint)} == FREE | images
    assert list(kind().identity()) == [name for name in hints(kind) if name not in FREE | images]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_the_identity_is_that_of_committed_results(path):
    """So that their folders can be continued."""
    config = json.loads(path.read_text())
    kind = find(config["experiment"])
    read = config["options"].items()
    options: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in read}
    identity = {**kind(**options).identity(), kind.kind.unit: config["data"]["fingerprint"]}
    assert identity == config["identity"]


def test_the_values_of_the_options_are_their_identity():
    assert OnlineFC(width=5, seeds=9).identity() == {
        "points": 16,
        "epochs": 1,
        "momentum": 0.9,
        "curve_images": 1000,
        "width": 5,
        "depth": 3,
    }


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (OnlineFC(points=0), "--points 0: must be at least 1"),
        (OnlineFC(tune_seeds=0), "--tune-seeds 0: must be at least 1"),
        (OnlineFC(rates=(0.1, 0.0)), "--rates 0: must be above 0"),
        (OnlineFC(rates=(0.1, float("inf"))), "--rates inf: must be a finite number"),
        (OnlineFC(rates=()), "--rates: name at least one"),
        (OnlineFC(rates=(0.1, 0.1000000001)), "--rates: 0.1 is named twice"),
        (OnlineFC(methods=("layer", "layer")), "--methods: layer is named twice"),
        (OnlineFC(momentum=1.0), "--momentum 1: must be at least 0 and below 1"),
        (OnlineFC(limit=0), "--limit 0: must be at least 1"),
        (OnlineFC(jobs=0), "--jobs 0: must be at least 1"),
        (OnlineFC(checkpoint_every=-1.0), "--checkpoint-every -1: must be at least 0"),
        (ResNet(weight_decay=float("nan")), "--weight-decay nan: must be a finite number"),
        (CharGRU(hidden=0), "--hidden 0: must be at least 1"),
    ],
)
def test_a_value_out_of_bounds_is_named(experiment, message):
    with pytest.raises(UserError) as error:
        experiment.check()
    assert str(error.value) == message


def test_options_at_their_bounds():
    OnlineFC(momentum=0.0, checkpoint_every=0.0, points=1, limit=1, jobs=None).check()
