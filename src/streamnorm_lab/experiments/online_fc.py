"""The paper's figure 5: normalizations in a fully connected network, down to one sample at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from streamnorm_lab.experiments.images import ImageExperiment
from streamnorm_lab.experiments.options import MethodNames, Positive
from streamnorm_lab.methods.layers import NormFactory
from streamnorm_lab.networks.images import fully_connected


@dataclass(frozen=True, kw_only=True)
class OnlineFC(ImageExperiment):
    """Compare normalizations in a fully connected network, down to one sample at a time.

    Each method gets its best learning rate, chosen on validation images; then several seeds are run at that rate and
    evaluated on the test images.
    """

    name: ClassVar[str] = "online-fc"
    alias: ClassVar[str | None] = "figure5"
    title: ClassVar[str] = "Fully connected networks, down to one sample at a time"
    summary: ClassVar[str] = "which normalization trains a fully connected network when mini-batches get small"
    question: ClassVar[str] = (
        "Batch Normalization takes its statistics from the mini-batch. What is left of it when the mini-batch has two "
        "samples, or one, and does Streaming Normalization, which collects its statistics from all samples seen, train "
        "as well there as with large mini-batches?"
    )

    methods: MethodNames = (
        "none",
        "batch",
        "layer",
        "streaming-l2",
        "streaming-l1",
    )
    """Normalizations to compare. There are also batch-renorm, mabn, group, rms, online and streaming-sigma; options
    make variants of any, for example streaming-l1,window=1000 or online,guard=clamp."""

    width: Positive = 256
    """Neurons per hidden layer."""

    depth: Positive = 3
    """Number of hidden layers."""

    def network(self, shape: tuple[int, ...], classes: int, norm: NormFactory) -> nn.Module:
        """Architecture A."""
        return fully_connected(math.prod(shape), classes, norm, self.width, self.depth)
