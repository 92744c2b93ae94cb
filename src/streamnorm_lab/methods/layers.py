"""The normalizations that are layers between two others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import streamnorm as sn
from streamnorm_lab.methods.method import Method, Methods, keywords, refuse_unknown
from streamnorm_lab.methods.peers.batch_renorm import BatchRenorm
from streamnorm_lab.methods.peers.mabn import MABN, centre_weights
from streamnorm_lab.methods.peers.online import OnlineNorm
from streamnorm_lab.methods.peers.sample import InstanceNorm, RMSNorm, group_norm
from streamnorm_lab.methods.streaming_pixels import StreamingPixels
from streamnorm_lab.methods.streaming_sigma import StreamingSigma

NormFactory = Callable[[int, int], nn.Module]
"""Makes a layer from the number of features and the number of spatial axes (0, or 2 for images, up to 3)."""


@dataclass(frozen=True)
class LayerMethod(Method):
    """A normalization that is a layer between two others.

    Args:
        factory: makes the layer from features, axes and ``options``.
        options: keywords for ``factory``.
        finish: what is done to a network of such layers.
        accepts: the keywords that a variant may have.
    """

    factory: Callable[..., nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[nn.Module], nn.Module] = lambda model: model
    accepts: Sequence[str] = ()

    @property
    def make(self) -> NormFactory:
        """The factory with its options bound; ``factory`` itself where there are none."""
        return partial(self.factory, **self.options) if self.options else self.factory

    def variant(self, options: Mapping[str, Any]) -> LayerMethod:
        """The same layer with more options; a small one is tried, to see whether it takes them."""
        refuse_unknown(options, self.accepts)
        variant = replace(self, options={**self.options, **options})
        if not variant.make(8, 2)(_EXAMPLE).isfinite().all():
            raise ValueError("with these options its output is not finite")
        return variant


_EXAMPLE = torch.linspace(-1, 1, 4 * 8 * 9).view(4, 8, 3, 3)
"""The input on which a layer with options is tried."""


def _none(features: int, axes: int) -> nn.Module:
    return nn.Identity()


def _batch(features: int, axes: int, **options: Any) -> nn.Module:
    return {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}.get(axes, nn.BatchNorm1d)(features, **options)


def _layer(features: int, axes: int) -> nn.Module:
    return nn.GroupNorm(1, features) if axes else nn.LayerNorm(features)


def _group(features: int, axes: int, groups: int = 8) -> nn.Module:
    return group_norm(features, groups)


def _streaming(features: int, axes: int, **options: Any) -> nn.Module:
    return {2: sn.StreamingNorm2d, 3: sn.StreamingNorm3d}.get(axes, sn.StreamingNorm1d)(features, **options)


def _of_any_rank(name: str, label: str, colour: str, marker: str, layer: Callable[..., nn.Module]) -> LayerMethod:
    """A method whose layer takes any number of axes."""

    def factory(features: int, axes: int, **options: Any) -> nn.Module:
        return layer(features, **options)

    return LayerMethod(name, label, colour, marker, name, factory, accepts=keywords(layer))


def _streaming_method(name: str, label: str, colour: str, marker: str, p: float) -> LayerMethod:
    accepts = keywords(sn.StreamingNorm1d)
    return LayerMethod(name, label, colour, marker, name, _streaming, {"p": p}, accepts=accepts)


# The first colours are Okabe and Ito's, which people with the common kinds of colour blindness can tell apart; with so
# many methods that is no longer possible for all, and labels and markers help.
_ALL = (
    LayerMethod("none", "No normalization", "#7f7f7f", "X", "none", _none),
    LayerMethod("batch", "Batch", "#d55e00", "s", "batch", _batch, accepts=keywords(nn.BatchNorm1d)),
    LayerMethod("batch-recalibrated", "Recalibrated Batch", "#e69f00", "D", "batch", _batch),
    _of_any_rank("batch-renorm", "Batch Renormalization", "#8b4513", "<", BatchRenorm),
    replace(_of_any_rank("mabn", "Moving Average Batch", "#e0b000", ">", MABN), finish=centre_weights),
    _of_any_rank("instance", "Instance", "#5c8a00", "*", InstanceNorm),
    LayerMethod("group", "Group", "#6a3d9a", "p", "group", _group, accepts=("groups",)),
    _of_any_rank("rms", "RMS", "#17becf", "h", RMSNorm),
    LayerMethod("layer", "Layer", "#0072b2", "^", "layer", _layer),
    _of_any_rank("online", "Online", "#ee3377", "P", OnlineNorm),
    _of_any_rank("streaming-sigma", "Streaming sigma, L2", "#a08aa8", "d", StreamingSigma),
    _of_any_rank("streaming-pixels", "Streaming, pixels", "#6c757d", "8", StreamingPixels),
    _streaming_method("streaming-l2", "Streaming L2", "#cc79a7", "v", p=2),
    _streaming_method("streaming-l1", "Streaming L1", "#009e73", "o", p=1),
)
METHODS = Methods({method.name: method for method in _ALL})
