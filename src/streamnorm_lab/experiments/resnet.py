"""ResNet-20, trained as it usually is, for comparison with published figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import nn
from tyro import conf

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.data.augment import Shifts
from streamnorm_lab.data.images import Data
from streamnorm_lab.experiments.conv import ConvExperiment
from streamnorm_lab.experiments.experiment import Batch
from streamnorm_lab.experiments.wording import AugmentedWords, Words
from streamnorm_lab.methods.layers import NormFactory
from streamnorm_lab.networks.images import resnet

_SHIFT_SEED = 500_009  # the shifts of a pass are drawn apart from its order


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

    methods: Annotated[tuple[str, ...], conf.arg(metavar="METHOD ...")] = ("batch", "layer", "streaming-l1")
    """Normalizations to compare."""

    settings: Annotated[tuple[str, ...], conf.arg(metavar="SxU ...")] = ("128x1", "8x16")
    """Samples per mini-batch x mini-batches per weight update, for example 8x16."""

    rates: Annotated[tuple[float, ...], conf.arg(metavar="RATE ...")] = (0.03, 0.1, 0.3)
    """Learning rates to start from. Each method gets its best one per setting, chosen on data held out for that."""

    epochs: int = 10
    """Passes over the training images."""

    anneal: Literal["cosine", "step", "constant"] = "cosine"
    """How the learning rate falls: cosine, to 0; step, by 10 after one half and again after three quarters."""

    weight_decay: float = 1e-4
    """Weight decay of SGD."""

    width: int = 16
    """Channels of the first stage; the second and third have twice and four times as many."""

    depth: int = 3
    """Residual blocks in each of the three stages; there are 6 times as many layers, and 2 more."""

    def _counts(self) -> tuple[str, ...]:
        return (*super()._counts(), "depth")

    def check(self) -> None:
        """Look at the options before anything is read or written."""
        super().check()
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"--weight-decay {self.weight_decay:g}: must be at least 0 and finite")

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

    def batches(self, data: Data, setting: Setting, seed: int, epoch: int, first_update: int) -> Iterator[Batch]:
        """All images in an order of this pass, shifted by up to an eighth of their size; those in colour mirrored."""
        channels, height, _ = data.shape
        mirror = channels > 1  # a digit's mirror image is no digit
        shift_seed = _SHIFT_SEED + 1_000_003 * epoch + seed
        shifts = Shifts.draw(len(data.train), height // 8, mirror, shift_seed, self.device)
        start = first_update * setting.batches * setting.samples
        for images, labels in super().batches(data, setting, seed, epoch, first_update):
            yield shifts.apply(images, start), labels
            start += len(labels)
