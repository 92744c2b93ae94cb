"""All experiments by name."""

from __future__ import annotations

from typing import Any

from streamnorm.experiments.adapt import Adapt
from streamnorm.experiments.char import CharGRU, CharLSTM, CharRNN
from streamnorm.experiments.coefficients import Coefficients
from streamnorm.experiments.conv import Conv
from streamnorm.experiments.dau import DAU
from streamnorm.experiments.errors import unknown
from streamnorm.experiments.experiment import Experiment
from streamnorm.experiments.lp import Lp
from streamnorm.experiments.online_fc import OnlineFC
from streamnorm.experiments.recurrent_conv import RecurrentConv
from streamnorm.experiments.resnet import ResNet
from streamnorm.experiments.variants import Variants

_ALL: tuple[type[Experiment[Any]], ...] = (
    OnlineFC,
    Lp,
    DAU,
    Conv,
    RecurrentConv,
    Variants,
    Coefficients,
    CharRNN,
    CharGRU,
    CharLSTM,
    ResNet,
    Adapt,
)
EXPERIMENTS = {experiment.name: experiment for experiment in _ALL}


def find(name: str) -> type[Experiment[Any]]:
    """The experiment of this name or alias.

    Raises:
        UserError: there is none.
    """
    for experiment in EXPERIMENTS.values():
        if name in (experiment.name, experiment.alias):
            return experiment
    raise unknown("experiment", name, EXPERIMENTS)
