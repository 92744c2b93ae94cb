"""Normalizations in the segmentation of volumes, one or two in a mini-batch, from one scanner or from many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import nn
from tyro import conf

from streamnorm_lab.common.forms import Between
from streamnorm_lab.common.score import DICE, Score
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.data.volume_task import VolumeTask
from streamnorm_lab.experiments.images import ImageExperiment
from streamnorm_lab.experiments.options import FREE, Amount, MethodNames, Positive, Rates, SettingNames
from streamnorm_lab.experiments.wording import VolumeWords, Words
from streamnorm_lab.methods.layers import NormFactory
from streamnorm_lab.networks.volumes import UNet


@dataclass(frozen=True, kw_only=True)
class Volumes(ImageExperiment):
    """Compare normalizations in a 3D U-Net that learns from one or two volumes at a time.

    The volumes are generated. With --scanners many each one has a gain and an offset of its own, as images of several
    scanners or exposures have; with --scanners one all have the same. Each method gets its best learning rate, chosen
    on validation volumes; then several seeds are run at that rate and evaluated on the test volumes.
    """

    name: ClassVar[str] = "volumes"
    title: ClassVar[str] = "Segmentation of volumes, one at a time"
    summary: ClassVar[str] = "which normalization segments volumes, where samples differ in gain and offset or not"
    question: ClassVar[str] = (
        "Volumes are large, and a mini-batch has one or two of them. Where they come from many scanners, each with a "
        "gain and an offset of its own, is a reference inside the sample better than one over samples, by how much, "
        "and what is left of the difference where all volumes come from one scanner?"
    )
    kind: ClassVar[type[VolumeTask]] = VolumeTask
    score: ClassVar[Score] = DICE
    words: ClassVar[Words] = VolumeWords()
    reference: ClassVar[str] = "instance"
    comparisons: ClassVar[tuple[tuple[str, str], ...]] = (
        ("streaming-l1", "instance"),
        ("streaming-l1", "group"),
        ("streaming-l1", "layer"),
        ("streaming-l1", "batch"),
        ("streaming-l1", "batch-recalibrated"),
        ("streaming-l1", "streaming-l2"),
    )

    data: Annotated[None, conf.Suppress, FREE] = None
    """No folder: volumes are generated."""

    scanners: Literal["many", "one"] = "many"
    """Whether each volume has a gain and an offset of its own (many), or all have the same (one)."""

    standardize: bool = False
    """Give each volume mean 0 and deviation 1 before the network sees it."""

    edge: Annotated[int, Between(8, 64)] = 16
    """Places along each axis of a volume."""

    width: Positive = 8
    """Channels of the network at full resolution; each of two steps down doubles them."""

    methods: MethodNames = ("batch", "instance", "group", "layer", "streaming-l1")
    """Normalizations to compare. There are also none, batch-renorm, mabn, rms, online and streaming-l2; options make
    variants of any, for example streaming-l1,window=50 or group,groups=4."""

    settings: SettingNames = ("2x1", "1x1")
    """Samples per mini-batch x mini-batches per weight update, for example 2x16."""

    rates: Rates = (3e-3, 1e-2, 3e-2, 1e-1)
    """Learning rates to try. Each method gets its best one per setting, chosen on data held out for that."""

    limit: Amount = None
    """Train on so many volumes, of 2,000. Default: 120."""

    validation: Amount = None
    """Choose rates on so many volumes, those after the training volumes. Default: 64."""

    tune_limit: Amount = None
    """Choose rates with short runs, on the first so many training volumes; the validation volumes then are those right
    after these, and the final runs may train on them too. Default: rates are chosen with whole runs."""

    test_limit: Amount = None
    """Test on the first so many test volumes. Default: all 64."""

    epochs: Positive = 1
    """Passes over the training volumes."""

    points: Positive = 8
    """Points of each curve."""

    curve_images: Positive = 16
    """Test volumes used for the points of a curve; the final Dice coefficient always uses all of them."""

    def network(self, shape: tuple[int, ...], classes: int, norm: NormFactory) -> nn.Module:
        """A 3D U-Net."""
        return UNet(shape[0], classes, norm, self.width)

    def work(self, setting: Setting) -> float:
        """A mini-batch costs as much by itself as a tenth of its work for a volume."""
        return 0.1 + setting.samples
