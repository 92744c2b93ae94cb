"""ResNet-20, trained as it usually is, for comparison with published figures."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import nn

from streamnorm_lab.common.forms import Between
from streamnorm_lab.experiments.conv import ConvExperiment
from streamnorm_lab.experiments.options import MethodNames, Positive, Rates, SettingNames
from streamnorm_lab.experiments.wording import AugmentedWords, Words
from streamnorm_lab.methods.layers import NormFactory
from streamnorm_lab.networks.images import resnet


@dataclass(frozen=True, kw_only=True)
class ResNet(ConvExperiment):
    """Compare normalizations in ResNet-20 (He et al. 2016), with large mini-batches and with small ones.

    Images are shifted and mirrored at random, and the learning rate falls along the run. Each method gets its best
    learning rate, chosen on validation images; then several seeds are run at that rate and evaluated on the test
    images. For CIFAR-10 and a graphics card:

    streamnorm run resnet --data FOLDER --limit 50000 --tune-limit 10000 --epochs 30 --device cuda
    """

    name: ClassVar[str] = "resnet"
    title: ClassVar[str] = "ResNet-20, with large and with small mini-batches"
    summary: ClassVar[str] = "whether ResNet-20 reaches with small mini-batches what it reaches with large ones"
    question: ClassVar[str] = (
        "In a network trained as usual, is Streaming Normalization as good as Batch Normalization where that is "
        "at its best, with 128 samples per mini-batch, and does it stay as good with mini-batches of 8 samples, 16 of "
        "them per weight update?"
    )
    words: ClassVar[Words] = AugmentedWords()
    augment: ClassVar[bool] = True

    methods: MethodNames = ("batch", "layer", "streaming-l1")
    """Normalizations to compare."""

    settings: SettingNames = ("128x1", "8x16")
    """Samples per mini-batch x mini-batches per weight update, for example 8x16."""

    rates: Rates = (0.03, 0.1, 0.3)
    """Learning rates to start from. Each method gets its best one per setting, chosen on data held out for that."""

    epochs: Positive = 10
    """Passes over the training images."""

    anneal: Literal["cosine", "step", "constant"] = "cosine"
    """Decay of the learning rate: cosine, to 0; step, divided by 10 after one half and again after three quarters;
    constant, none."""

    weight_decay: Annotated[float, Between(0)] = 1e-4
    """Weight decay of SGD."""

    width: Positive = 16
    """Channels of the first stage; the second and third have twice and four times as many."""

    depth: Positive = 3
    """Residual blocks in each of the three stages; there are 6 times as many layers, and 2 more."""

    def network(self, shape: tuple[int, ...], classes: int, norm: NormFactory) -> nn.Module:
        """ResNet-20, for a depth of 3."""
        return resnet(shape[0], classes, norm, self.width, self.depth)

    def optimizer(self, parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """SGD with momentum and weight decay."""
        return torch.optim.SGD(parameters, lr=rate, momentum=self.momentum, weight_decay=self.weight_decay, fused=True)

    def rate(self, rate: float, share: float) -> float:
        """The annealed learning rate."""
        if self.anneal == "cosine":
            return rate * (1 + math.cos(math.pi * share)) / 2
        if self.anneal == "step":
            return rate / 100 if share >= 0.75 else rate / 10 if share >= 0.5 else rate
        return rate
