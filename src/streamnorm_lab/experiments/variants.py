"""The spectrum of references: which activations share their statistics, in a convolutional network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

import streamnorm as sn
from streamnorm_lab.experiments.conv import ConvExperiment
from streamnorm_lab.experiments.options import MethodNames, Rates, Repeats, SettingNames
from streamnorm_lab.methods.layers import METHODS, LayerMethod, NormFactory
from streamnorm_lab.methods.method import Methods, keywords
from streamnorm_lab.networks.images import feedforward_convolutional


def _over(layer: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A factory for layers with a reference by name, where "group" takes a number of groups."""

    def factory(features: int, axes: int, ref: str, groups: int = 4, **options: Any) -> nn.Module:
        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        reference = ("group", math.gcd(groups, features)) if ref == "group" else ref
        return layer(features, ref=reference, **options)

    return factory


def _ghost(features: int, axes: int, ghosts: int = 8, **options: Any) -> nn.Module:
    return sn.GeneralBatchNorm(features, ghosts=ghosts, **options)


def _method(
    name: str,
    label: str,
    colour: str,
    marker: str,
    layer: Callable[..., nn.Module],
    factory: Callable[..., nn.Module] | None = None,
    **options: Any,
) -> LayerMethod:
    accepts = tuple(option for option in keywords(layer) if option != "ref")
    accepts += ("groups",) if options.get("ref") == "group" else ()
    return LayerMethod(name, label, colour, marker, name, factory or _over(layer), options, accepts=accepts)


# Blue for what is inside a sample, orange and red for the mini-batch, green for the stream.
_ALL = (
    METHODS["none"],
    _method("sample-position", "Sample, position", "#88ccee", "v", sn.SampleNorm, ref="position"),
    _method("sample-channel", "Sample, channel (Instance)", "#56b4e9", "<", sn.SampleNorm, ref="channel"),
    _method("sample-group", "Sample, group", "#332288", "p", sn.SampleNorm, ref="group"),
    _method("sample-layer", "Sample, layer", "#0072b2", "^", sn.SampleNorm, ref="layer"),
    _method("batch-ghost", "Batch, ghost", "#cc79a7", "d", sn.GeneralBatchNorm, _ghost),
    _method("batch-channel", "Batch, channel", "#d55e00", "s", sn.GeneralBatchNorm, ref="channel"),
    _method("batch-group", "Batch, group", "#e69f00", "D", sn.GeneralBatchNorm, ref="group"),
    _method("batch-layer", "Batch, layer", "#882255", "P", sn.GeneralBatchNorm, ref="layer"),
    _method("streaming-layer", "Streaming, layer", "#44aa99", "h", sn.StreamingNorm2d, ref="layer"),
    _method("streaming-group", "Streaming, group", "#999933", ">", sn.StreamingNorm2d, ref="group"),
    _method("streaming-channel", "Streaming, channel", "#009e73", "o", sn.StreamingNorm2d, ref="channel"),
)


@dataclass(frozen=True, kw_only=True)
class Variants(ConvExperiment):
    """Compare which activations share their statistics, in a feedforward convolutional network.

    Inside a sample (Sample Normalization): those at one position, of one channel, of a group of channels, or all. Over
    the mini-batch (General Batch Normalization): those of one channel, also in several ghost batches, of a group, or
    all. Over all samples seen (Streaming Normalization): those of one channel, of a group, or all. Sample and batch
    statistics are L2, the streaming ones L1, each as it is commonly used; there are 4 groups and 8 ghost batches. Each
    gets its best learning rate, chosen on validation images; then several seeds are run at that rate and evaluated on
    the test images. The digits are 8×8: the last maps have 2×2 places, on which Instance Normalization leaves next to
    nothing; judge it by larger images.
    """

    name: ClassVar[str] = "variants"
    title: ClassVar[str] = "Which activations share their statistics"
    summary: ClassVar[str] = "the spectrum of references: sample, batch and stream, by channel, group and layer"
    question: ClassVar[str] = (
        "A normalization reference is the set of activations that a neuron's statistics are collected from. Inside one "
        "sample, over a mini-batch, or over all samples seen; of one channel, of some, or of the whole layer: which "
        "references train a convolutional network, with mini-batches and with very small ones?"
    )
    reference: ClassVar[str] = "batch-channel"
    comparisons: ClassVar[tuple[tuple[str, str], ...]] = tuple(
        ("streaming-channel", method.name) for method in reversed(_ALL[:-1])
    )
    catalogue: ClassVar[Mapping[str, LayerMethod]] = Methods({method.name: method for method in _ALL})

    methods: MethodNames = tuple(method.name for method in _ALL[1:])
    """References to compare: none; sample-position, -channel, -group, -layer; batch-ghost, -channel, -group, -layer;
    streaming-layer, -group, -channel. Options of the layer make a variant, as in batch-ghost,ghosts=4."""

    settings: SettingNames = ("32x1", "2x16")
    """Samples per mini-batch x mini-batches per weight update, for example 2x16."""

    rates: Rates = (3e-3, 1e-2, 3e-2, 1e-1)
    """Learning rates to try. Each method gets its best one per setting, chosen on data held out for that."""

    tune_seeds: Repeats = 2
    """Number of runs per learning rate when rates are chosen (with other seeds than the final runs)."""

    def network(self, shape: tuple[int, ...], classes: int, norm: NormFactory) -> nn.Module:
        """Architecture B."""
        return feedforward_convolutional(shape[0], classes, norm, self.width)
