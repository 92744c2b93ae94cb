"""The normalizations that experiments compare: name, label, colour, and how a layer is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

import streamnorm as sn
from streamnorm.experiments.errors import UserError

NormFactory = Callable[[int, int], nn.Module]
"""Makes a layer from the number of features and the number of spatial axes (0, or 2 for images)."""


@dataclass(frozen=True)
class Method:
    """One row of a result table.

    ``colour`` and ``marker`` are the same in every figure. A method that is ``trained_as`` another one is the same
    training evaluated differently, and is reported whenever the other one is.
    """

    name: str
    label: str
    colour: str
    marker: str
    make: NormFactory
    trained_as: str


def _none(features: int, axes: int) -> nn.Module:
    return nn.Identity()


def _batch(features: int, axes: int) -> nn.Module:
    return nn.BatchNorm2d(features) if axes == 2 else nn.BatchNorm1d(features)


def _layer(features: int, axes: int) -> nn.Module:
    return nn.GroupNorm(1, features) if axes == 2 else nn.LayerNorm(features)


def _streaming(p: float) -> NormFactory:
    def make(features: int, axes: int) -> nn.Module:
        return sn.StreamingNorm2d(features, p=p) if axes == 2 else sn.StreamingNorm1d(features, p=p)

    return make


# The colours are Okabe and Ito's, which people with the common kinds of colour blindness can tell apart.
_ALL = (
    Method("none", "No normalization", "#7f7f7f", "X", _none, "none"),
    Method("batch", "Batch", "#d55e00", "s", _batch, "batch"),
    Method("batch-recalibrated", "Recalibrated Batch", "#e69f00", "D", _batch, "batch"),
    Method("layer", "Layer", "#0072b2", "^", _layer, "layer"),
    Method("streaming-l2", "Streaming L2", "#cc79a7", "v", _streaming(2), "streaming-l2"),
    Method("streaming-l1", "Streaming L1", "#009e73", "o", _streaming(1), "streaming-l1"),
)
METHODS = {method.name: method for method in _ALL}


def trainable(names: Iterable[str]) -> list[Method]:
    """The methods of these names.

    Raises:
        UserError: a name is unknown, or is a row that comes with another method.
    """
    known = [method.name for method in _ALL if method.trained_as == method.name]
    chosen = []
    for name in names:
        if name in METHODS and METHODS[name].trained_as != name:
            raise UserError(f"method {name!r} comes by itself with {METHODS[name].trained_as!r}: name that one instead")
        if name not in METHODS:
            raise UserError(f"unknown method {name!r}: choose from {', '.join(known)}")
        chosen.append(METHODS[name])
    return chosen


def rows(trained: str) -> list[Method]:
    """The rows of the result table that one training gives."""
    return [method for method in _ALL if method.trained_as == trained]
