"""Normalizations in a feedforward convolutional network, down to one sample at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from streamnorm_lab.common.setting import Setting
from streamnorm_lab.data.images import Data
from streamnorm_lab.experiments.images import ImageExperiment
from streamnorm_lab.experiments.options import MethodNames, Positive, Rates
from streamnorm_lab.methods.layers import NormFactory
from streamnorm_lab.networks.images import feedforward_convolutional


@dataclass(frozen=True, kw_only=True)
class ConvExperiment(ImageExperiment):
    """The common part of experiments with convolutional networks."""

    width: Positive = 8
    """Channels of the first convolution; the second has twice and the third four times as many. 32 is the full size."""

    def model(self, data: Data, method: str) -> nn.Module:
        """The network with layers of this method.

        Channels last is the memory format in which one thread trains it fastest at every setting.
        """
        model = super().model(data, method)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def work(self, setting: Setting) -> float:
        """A mini-batch costs as much by itself as its work for three images."""
        return 3.0 + setting.samples


@dataclass(frozen=True, kw_only=True)
class Conv(ConvExperiment):
    """Compare normalizations in a feedforward convolutional network, down to one sample at a time.

    Each method gets its best learning rate, chosen on validation images; then several seeds are run at that rate and
    evaluated on the test images.
    """

    name: ClassVar[str] = "conv"
    title: ClassVar[str] = "Convolutional networks, down to one sample at a time"
    summary: ClassVar[str] = "which normalization trains a convolutional network when mini-batches get small"
    question: ClassVar[str] = (
        "In a convolutional network one sample already gives each channel as many values as there are places. Does "
        "that save Batch Normalization when the mini-batch has one or two samples, how far do normalizations inside "
        "the sample fall behind, and does Streaming Normalization train as well there as with large mini-batches?"
    )

    methods: MethodNames = (
        "batch",
        "instance",
        "group",
        "layer",
        "streaming-l1",
    )
    """Normalizations to compare. There are also none, batch-renorm, mabn, rms, online, streaming-l2 and
    streaming-pixels; options make variants of any, for example streaming-l1,window=50 or group,groups=4."""

    rates: Rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Learning rates to try. Each method gets its best one per setting, chosen on data held out for that."""

    def network(self, shape: tuple[int, ...], classes: int, norm: NormFactory) -> nn.Module:
        """Architecture B."""
        return feedforward_convolutional(shape[0], classes, norm, self.width)
