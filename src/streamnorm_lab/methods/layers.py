"""The normalizations that experiments compare: name, label, colour, and how a layer is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any, TypeVar, cast

import torch
from torch import nn

import streamnorm as sn
from streamnorm_lab.common.errors import UserError, first_line, unknown
from streamnorm_lab.methods.peers.batch_renorm import BatchRenorm
from streamnorm_lab.methods.peers.mabn import MABN, centre_weights
from streamnorm_lab.methods.peers.online import OnlineNorm
from streamnorm_lab.methods.peers.sample import InstanceNorm, RMSNorm, group_norm
from streamnorm_lab.methods.streaming_pixels import StreamingPixels
from streamnorm_lab.methods.streaming_sigma import StreamingSigma

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

    def variant(self, options: Mapping[str, Any]) -> Method:
        """This normalization with options of its own.

        Raises:
            Exception: it has no such option, or not with this value.
        """
        raise TypeError(f"{self.name} has no options")


MethodT = TypeVar("MethodT", bound=Method)


class Methods(dict[str, MethodT]):
    """The methods by name, and any of them with options of its own, by a name that says them.

    A variant is written ``method,option=value,…``; several numbers are joined by ``+``.

    Example:
        >>> METHODS["streaming-l1,beta=0.7+0+0.3,kappa=0.9"].options
        {'p': 1, 'beta': (0.7, 0.0, 0.3), 'kappa': 0.9}
    """

    def __missing__(self, name: str) -> MethodT:
        base, *words = name.split(",")
        if base not in self or not words:
            raise KeyError(name)
        try:
            options = [_option(word) for word in words]
            variant = self[base].variant(dict(options))
            if len(dict(options)) < len(options):
                raise ValueError("an option is named twice")
        except TypeError as error:
            message = f"method {name!r}: a value of another kind is needed ({first_line(error)})"
            raise UserError(message) from None
        except Exception as error:  # layers of many kinds refuse a value each in its way
            raise UserError(f"method {name!r}: {first_line(error)}") from None
        label = ", ".join([self[base].label, *words])
        return cast(MethodT, replace(variant, name=name, label=label, trained_as=name))


def _option(word: str) -> tuple[str, Any]:
    option, equals, text = word.partition("=")
    if not (option and equals and text):
        raise ValueError(f"{word!r} is not of the form option=value, for example streaming-l1,window=20000")
    if text.isdecimal():
        return option, int(text)
    try:
        numbers = tuple(float(number) for number in text.split("+"))
    except ValueError:
        return option, text
    return option, numbers if len(numbers) > 1 else numbers[0]


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
        """Makes a layer; it is ``factory`` itself where there are no options, and so keeps a mark that it carries."""
        return partial(self.factory, **self.options) if self.options else self.factory

    def variant(self, options: Mapping[str, Any]) -> LayerMethod:
        """The same layer with more options; a small one is tried, to see whether it takes them."""
        refuse_unknown(options, self.accepts)
        variant = replace(self, options={**self.options, **options})
        if not variant.make(8, 2)(_EXAMPLE).isfinite().all():
            raise ValueError("with these options its output is not finite")
        return variant


_EXAMPLE = torch.linspace(-1, 1, 4 * 8 * 9).view(4, 8, 3, 3)
"""What a layer with options is tried on."""

_NO_OPTIONS = ("features", "axes", "num_features", "affine", "bias", "track_running_stats", "device", "dtype")


def keywords(layer: Callable[..., Any]) -> tuple[str, ...]:
    """The options of a layer that have numbers or words as values."""
    return tuple(name for name in signature(layer).parameters if name not in _NO_OPTIONS)


def refuse_unknown(options: Iterable[str], known: Sequence[str]) -> None:
    """Refuse an option that is none of those known.

    Raises:
        UserError: naming the nearest one.
    """
    for option in options:
        if not known:
            raise UserError("it has no options")
        if option not in known:
            raise unknown("option", option, known)


def _none(features: int, axes: int) -> nn.Module:
    return nn.Identity()


def _batch(features: int, axes: int, **options: Any) -> nn.Module:
    return (nn.BatchNorm2d if axes == 2 else nn.BatchNorm1d)(features, **options)


def _layer(features: int, axes: int) -> nn.Module:
    return nn.GroupNorm(1, features) if axes == 2 else nn.LayerNorm(features)


def _group(features: int, axes: int, groups: int = 8) -> nn.Module:
    return group_norm(features, groups)


def _streaming(features: int, axes: int, **options: Any) -> nn.Module:
    return (sn.StreamingNorm2d if axes == 2 else sn.StreamingNorm1d)(features, **options)


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

# For methods that a user put together: colours and markers in the order in which they come.
_SPARE = (
    *(("#56b4e9", "P"), ("#882255", "<"), ("#117733", ">"), ("#332288", "p"), ("#999933", "h"), ("#000000", "*")),
    *(("#aa4499", "d"), ("#44aa99", "H"), ("#661100", "8"), ("#6699cc", "s"), ("#ddaa33", "D"), ("#bb5566", "^")),
)


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
            known = [method.name for method in methods.values() if method.trained_as == method.name]
            raise unknown("method", name, known) from None
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
