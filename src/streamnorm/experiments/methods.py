"""The normalizations that experiments compare: name, label, colour, and how a layer is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, replace

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
    trained_as: str


@dataclass(frozen=True)
class LayerMethod(Method):
    """A normalization that is a layer between two others."""

    make: NormFactory


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
    LayerMethod("none", "No normalization", "#7f7f7f", "X", "none", _none),
    LayerMethod("batch", "Batch", "#d55e00", "s", "batch", _batch),
    LayerMethod("batch-recalibrated", "Recalibrated Batch", "#e69f00", "D", "batch", _batch),
    LayerMethod("layer", "Layer", "#0072b2", "^", "layer", _layer),
    LayerMethod("streaming-l2", "Streaming L2", "#cc79a7", "v", "streaming-l2", _streaming(2)),
    LayerMethod("streaming-l1", "Streaming L1", "#009e73", "o", "streaming-l1", _streaming(1)),
)
METHODS = {method.name: method for method in _ALL}

# For methods that a user put together: colours and markers in the order in which they come.
_SPARE = (("#56b4e9", "P"), ("#882255", "<"), ("#117733", ">"), ("#332288", "p"), ("#999933", "h"), ("#000000", "*"))


def trainable(names: Iterable[str], methods: Mapping[str, Method] = METHODS) -> list[Method]:
    """The methods of these names.

    Raises:
        UserError: a name is unknown, or is a row that comes with another method.
    """
    chosen = []
    for name in names:
        try:
            method = methods[name]
        except KeyError:
            known = ", ".join(method.name for method in methods.values() if method.trained_as == method.name)
            raise UserError(f"unknown method {name!r}: choose from {known}") from None
        if method.trained_as != name:
            raise UserError(f"method {name!r} comes by itself with {method.trained_as!r}: name that one instead")
        chosen.append(method)
    return chosen


def rows(trained: str, methods: Mapping[str, Method] = METHODS) -> list[Method]:
    """The rows of the result table that one training gives."""
    return [method for method in methods.values() if method.trained_as == trained] or [methods[trained]]


def reported(trained: Set[str], methods: Mapping[str, Method]) -> list[Method]:
    """The rows that these trainings give, in the order of ``methods``; then those that only the user named."""
    known = [method for method in methods.values() if method.trained_as in trained]
    own = sorted(trained - {method.trained_as for method in known})
    spare = (_SPARE[i % len(_SPARE)] for i in range(len(own)))
    return known + [replace(methods[name], colour=c, marker=m) for name, (c, m) in zip(own, spare, strict=True)]
