"""Normalizations in a convolutional network whose blocks are applied several times with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from streamnorm_lab.common.setting import Setting
from streamnorm_lab.experiments.conv import ConvExperiment
from streamnorm_lab.experiments.options import MethodNames, Positive, Rates, SettingNames
from streamnorm_lab.methods.layers import METHODS, LayerMethod, NormFactory
from streamnorm_lab.methods.method import Methods
from streamnorm_lab.networks.images import PerApplication, recurrent_convolutional


def _per_step(features: int, axes: int, **options: Any) -> nn.Module:
    return PerApplication(METHODS["batch"].factory(features, axes, **options))


PER_STEP = LayerMethod(
    *("batch-per-step", "Batch per step", "#999933", "d", "batch-per-step", _per_step),
    accepts=METHODS["batch"].accepts,
)
# Beside Batch Normalization, then all others in their order.
CATALOGUE = Methods(
    {
        **{name: METHODS[name] for name in ("none", "batch", "batch-recalibrated")},
        PER_STEP.name: PER_STEP,
        **METHODS,
    }
)


@dataclass(frozen=True, kw_only=True)
class RecurrentConv(ConvExperiment):
    """Compare normalizations in a recurrent convolutional network, down to one sample at a time.

    It is the network of `streamnorm run conv` with its two residual blocks applied --k1 and --k2 times, each with the
    same weights and the same normalization layers at every application. Each method gets its best learning rate,
    chosen on validation images; then several seeds are run at that rate and evaluated on the test images.
    """

    name: ClassVar[str] = "recurrent-conv"
    title: ClassVar[str] = "Recurrent convolutional networks, down to one sample at a time"
    summary: ClassVar[str] = "the same with blocks that are applied several times with the same weights"
    question: ClassVar[str] = (
        "When a block is applied several times, its activations are distributed differently each time. Batch "
        "Normalization normalizes each application by its own mini-batch, but has one set of running statistics for "
        "all of them when it is evaluated; with statistics for each application it is no longer the same layer every "
        "time. Does Streaming Normalization, with one set of statistics over all applications and samples, train as "
        "well as these, with mini-batches and with one sample at a time?"
    )
    comparisons: ClassVar[tuple[tuple[str, str], ...]] = (
        *ConvExperiment.comparisons,
        ("streaming-l1", "batch-per-step"),
    )
    catalogue: ClassVar[Mapping[str, LayerMethod]] = CATALOGUE

    methods: MethodNames = (
        "none",
        "batch",
        "batch-per-step",
        "layer",
        "streaming-l1",
    )
    """Normalizations to compare. Those of `streamnorm run conv`, and batch-per-step: Batch Normalization with layers of
    its own, running statistics included, for each application of a block (time-specific)."""

    settings: SettingNames = ("32x1", "2x16", "1x1")
    """Samples per mini-batch x mini-batches per weight update, for example 2x16."""

    rates: Rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Learning rates to try. Each method gets its best one per setting, chosen on data held out for that."""

    k1: Positive = 2
    """Number of times the first block is applied."""

    k2: Positive = 2
    """Number of times the second block is applied. With --k1 1 --k2 1 the network is that of `streamnorm run conv`."""

    def network(self, shape: tuple[int, ...], classes: int, norm: NormFactory) -> nn.Module:
        """Architecture C."""
        return recurrent_convolutional(shape[0], classes, norm, self.width, (self.k1, self.k2))

    def work(self, setting: Setting) -> float:
        """The work of `conv`, plus a fifth of it for each application of a block beyond the first two."""
        return super().work(setting) * (3 + self.k1 + self.k2) / 5
