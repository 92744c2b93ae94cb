"""Normalization layers of other libraries, known by their names so that none of these libraries is imported."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

_BUFFERS = {"weight", "bias", "running_mean", "running_var"}
_OWN_FORWARDS = {
    nn.modules.batchnorm._BatchNorm.forward,
    nn.SyncBatchNorm.forward,
    nn.modules.instancenorm._InstanceNorm.forward,
    nn.GroupNorm.forward,
}


def has_activation(module: nn.Module) -> bool:
    """Whether this is a normalization of timm's that is followed by its ``drop`` and its ``act``."""
    return _is_of("timm", module) and type(module).__name__ in (
        "BatchNormAct2d",
        "SyncBatchNormAct",
        "FrozenBatchNormAct2d",
        "GroupNormAct",
        "GroupNorm1Act",
    )


def is_frozen(module: nn.Module) -> bool:
    """Whether this is a Batch Normalization that never learns: statistics, gain and bias are buffers.

    torchvision, timm and several models of transformers each have their own.
    """
    return re.search("FrozenBatchNorm(Act)?2d$", type(module).__name__) is not None and set(module._buffers) >= _BUFFERS


def normalizes_as_torch(module: nn.Module) -> bool:
    """Whether a BatchNorm, InstanceNorm or GroupNorm, or a subclass of one, computes what ``torch.nn``'s does.

    timm's own GroupNorm has a forward of its own that is the same.
    """
    same = _is_of("timm", module) and type(module).__name__ in ("GroupNorm", "GroupNorm1")
    return same or type(module).forward in _OWN_FORWARDS


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
