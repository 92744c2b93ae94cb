"""The catalogue of experiments, by name."""

from __future__ import annotations

from typing import Any

from streamnorm_lab.common.errors import unknown
from streamnorm_lab.experiments.adapt import Adapt
from streamnorm_lab.experiments.char import CharGRU, CharLSTM, CharRNN
from streamnorm_lab.experiments.coefficients import Coefficients
from streamnorm_lab.experiments.compare import Compare
from streamnorm_lab.experiments.conv import Conv
from streamnorm_lab.experiments.dau import DAU
from streamnorm_lab.experiments.experiment import Experiment
from streamnorm_lab.experiments.finetune import Finetune
from streamnorm_lab.experiments.lp import Lp
from streamnorm_lab.experiments.online_fc import OnlineFC
from streamnorm_lab.experiments.recurrent_conv import RecurrentConv
from streamnorm_lab.experiments.resnet import ResNet
from streamnorm_lab.experiments.variants import Variants
from streamnorm_lab.experiments.volumes import Volumes

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
    Finetune,
    Volumes,
)
EXPERIMENTS = {experiment.name: experiment for experiment in _ALL}
"""The experiments that ``streamnorm run`` runs, by name."""


def find(name: str) -> type[Experiment[Any]]:
    """The experiment of this name or alias, that of ``streamnorm compare`` among them.

    Raises:
        UserError: there is none.
    """
    known: list[type[Experiment[Any]]] = [*EXPERIMENTS.values(), Compare]
    for experiment in known:
        if name in (experiment.name, experiment.alias):
            return experiment
    raise unknown("experiment", name, EXPERIMENTS)
