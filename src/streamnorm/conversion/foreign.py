"""Table of the normalization layers that convert knows: how to recognize each, and what it becomes.

Layers of other libraries are recognized by name, so that none of these libraries is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from torch import nn

from ..core.moment import LpMoment
from ..core.reference import NormRef, RefName
from ..core.stream import Stream
from ..layers import Norm, StreamingNorm1d, StreamingNorm2d, StreamingNorm3d, StreamingNormAct2d

BatchNorm = nn.modules.batchnorm._BatchNorm
InstanceNorm = nn.modules.instancenorm._InstanceNorm
Converter = Callable[..., nn.Module]

_FROZEN_BUFFERS = {"weight", "bias", "running_mean", "running_var"}
_OWN_FORWARDS = {BatchNorm.forward, nn.SyncBatchNorm.forward, InstanceNorm.forward, nn.GroupNorm.forward}
_WITH_ACTIVATION = ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d", "GroupNormAct", "GroupNorm1Act")


class Foreign(NamedTuple):
    """A kind of normalization layer, and the way from it to a streaming one."""

    matches: Callable[[nn.Module], bool]
    """Whether a layer is of this kind."""
    make: Converter
    """``make(module, **options)`` gives what takes its place: a streaming layer with fresh parameters and statistics,
    or for a kind that the user registered any module, as it is to be used."""
    becomes: type[Norm] | None
    """The type of that layer; None where the user says it."""


def find(module: nn.Module) -> Foreign | None:
    """The row of the table for a layer, if there is one."""
    return next((row for row in TABLE if row.matches(module)), None)


def is_frozen(module: nn.Module) -> bool:
    """Whether this is a Batch Normalization that never learns: statistics, gain and bias are buffers.

    torchvision, timm and several models of transformers each have their own.
    """
    name = type(module).__name__
    return re.search("FrozenBatchNorm(Act)?2d$", name) is not None and set(module._buffers) >= _FROZEN_BUFFERS


def batchnorm_with_activation(drop: nn.Module, act: nn.Module) -> Callable[..., nn.Module]:
    """timm's BatchNorm with this dropout and this activation, to be called as ``nn.BatchNorm2d`` is."""
    try:
        timm_layers: Any = import_module("timm.layers")
    except ModuleNotFoundError as error:
        raise ValueError(
            "StreamingNormAct2d becomes timm's BatchNormAct2d, and timm is not installed: pip install timm, or write "
            "streamnorm.fold(model)"
        ) from error

    def build(*args: Any, **kwargs: Any) -> nn.Module:
        plain = timm_layers.BatchNormAct2d(*args, **kwargs)
        plain.drop, plain.act = drop, act
        return plain

    return build


def _is_of(library: str, module: nn.Module) -> bool:
    return type(module).__module__.split(".")[0] == library


def _has_activation(module: nn.Module) -> bool:
    """Whether this is a normalization of timm's that is followed by its ``drop`` and its ``act``."""
    return _is_of("timm", module) and type(module).__name__ in _WITH_ACTIVATION


def _of_torch(*kinds: type[nn.Module]) -> Callable[[nn.Module], bool]:
    """A predicate for layers of torch.nn of some kinds, and for subclasses that compute the same.

    timm's own GroupNorm has a forward of its own that is the same.
    """

    def matches(module: nn.Module) -> bool:
        same = _is_of("timm", module) and type(module).__name__ in ("GroupNorm", "GroupNorm1")
        return isinstance(module, kinds) and (same or type(module).forward in _OWN_FORWARDS)

    return matches


def _with_activation(module: Any, **options: Any) -> nn.Module:
    drop, act = getattr(module, "drop", None), getattr(module, "act", None)
    return StreamingNormAct2d(num_features(module), drop=drop, act=act, **options)


def _streaming(cls: type[Norm]) -> Converter:
    return lambda module, **options: cls(num_features(module), **options)


def _any_rank(module: nn.Module, ref: RefName | NormRef = "channel", p: float = 1, **options: Any) -> nn.Module:
    """The streaming layer for a module that takes inputs of any rank."""

    def of(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: options.pop(name) for name in names if name in options}

    moment = LpMoment(p, **of(("center", "scale")))
    stream = Stream(**of(("window", "alpha", "beta", "kappa")))
    reference = ref if isinstance(ref, NormRef) else NormRef.batch(ref)
    return Norm(num_features(module), reference, moment, stream, **options)


def num_features(module: Any) -> int:
    """C, the number of channels."""
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    return module.num_features if hasattr(module, "num_features") else len(module.weight)


TABLE: list[Foreign] = [
    Foreign(_has_activation, _with_activation, StreamingNormAct2d),
    Foreign(is_frozen, _streaming(StreamingNorm2d), StreamingNorm2d),
    Foreign(_of_torch(nn.BatchNorm1d, nn.InstanceNorm1d), _streaming(StreamingNorm1d), StreamingNorm1d),
    Foreign(_of_torch(nn.BatchNorm2d, nn.InstanceNorm2d), _streaming(StreamingNorm2d), StreamingNorm2d),
    Foreign(_of_torch(nn.BatchNorm3d, nn.InstanceNorm3d), _streaming(StreamingNorm3d), StreamingNorm3d),
    Foreign(_of_torch(BatchNorm, nn.GroupNorm), _any_rank, Norm),
]
"""The known kinds, of which the first that matches counts. ``register_converter`` adds a row in front."""
