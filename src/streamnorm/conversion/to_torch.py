"""Conversion of our layers to plain ones of torch.nn that evaluate the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core import arguments
from ..core.reference import NormRef
from ..core.spec import View
from ..layers import GeneralBatchNorm, Norm, StreamingNorm1d, StreamingNorm2d, StreamingNorm3d, StreamingNormAct2d
from ..recurrent.base import Normalized
from . import comparison, foreign
from .replace import move_hooks, move_parameters, replace

_PLAIN: dict[type[Norm], type[nn.Module]] = {
    StreamingNorm1d: nn.BatchNorm1d,
    StreamingNorm2d: nn.BatchNorm2d,
    StreamingNorm3d: nn.BatchNorm3d,
}

RECURRENT = 1e-3
"""Tolerance for recurrent networks, in which rounding errors grow from step to step."""


def to_batchnorm(model: nn.Module, dims: int | None = None) -> nn.Module:
    """Replace our layers by plain ``torch.nn`` ones that evaluate the same, in place: for deployment.

    Streaming and General Batch Normalization become ``nn.BatchNorm1d/2d/3d``; Sample Normalization with p = 2 becomes
    ``nn.GroupNorm``. StreamingNormAct2d becomes timm's ``BatchNormAct2d`` again. Recurrent layers and
    cells become those of torch.nn, with the statistics in weights of their own (``to_torch``); these take no
    ``lengths``, ``mask`` or ``step``.

    Args:
        model: any module. If it is itself such a layer, the new one is only returned.
        dims: 1, 2 or 3: which BatchNorm stands for a layer that takes any rank (GeneralBatchNorm, Norm).

    Returns:
        ``model``.

    Raises:
        ValueError: if a layer has no plain equivalent, its equivalent gives other results on a few random numbers, or
            it takes any rank and ``dims`` is not given; nothing is changed.

    Example:
        >>> to_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), StreamingNorm2d(8)))[1]
        BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, ...)
    """
    arguments.check_model(model)
    if dims not in (None, 1, 2, 3):
        raise ValueError(f"dims is 1, 2 or 3, for nn.BatchNorm1d, 2d or 3d, got {dims!r}")
    remarks: list[str] = []

    def plain(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, (Norm, Normalized)):
            return None
        name = name or "the model"
        try:
            new = _to_plain(name, module, dims) if isinstance(module, Norm) else _to_recurrent(name, module)
            found = _difference(module, new)
        except comparison.NotComparedError as error:
            found = None
            remarks.append(f"{name} could not be compared with the layer of torch.nn in its place: {error}")
        if found is not None:
            raise ValueError(f"{name} has no equivalent in torch.nn: {found}")
        return new

    result = replace(model, plain)
    for remark in remarks:
        warnings.warn(remark, stacklevel=2)
    return result


def _difference(old: nn.Module, new: Any) -> str | None:
    if not comparison.is_comparable(old, new):
        return None
    if isinstance(old, Normalized):
        return comparison.difference(old, new, comparison.inputs_of_recurrent(old), 1.0, RECURRENT)
    assert isinstance(old, Norm)
    dims = {nn.BatchNorm1d: 1, nn.BatchNorm3d: 3}.get(type(new), 2)
    tensor = next((t for t in (new.weight, getattr(new, "running_mean", None)) if t is not None), torch.empty(0))
    x, size = comparison.inputs_of(old, dims, tensor.dtype)
    return comparison.difference(old, new, (x,), size)


def _to_recurrent(name: str, module: Normalized) -> nn.Module:
    try:
        plain: nn.Module = module.to_torch()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    move_hooks(module, plain)
    return plain


def _to_plain(name: str, layer: Norm, dims: int | None) -> nn.Module:
    plain: Any
    if layer.stream is None and not isinstance(layer, GeneralBatchNorm):
        plain = _to_groupnorm(name, layer)
    else:
        mu, variance = (per_channel(name, layer, value) for value in layer.eval_stats())
        plain = _plain_class(name, layer, dims)(
            layer.num_features, layer.eps, affine=layer.weight is not None, device=mu.device
        )
        dtype = mu.dtype if layer.weight is None else layer.weight.dtype
        plain.running_mean, plain.running_var = mu.to(dtype), variance.to(dtype)
    move_parameters(layer, plain)
    move_hooks(layer, plain)
    return plain


def _plain_class(name: str, layer: Norm, dims: int | None) -> Callable[..., nn.Module]:
    """The BatchNorm to write for a layer, to be called as torch.nn's are."""
    if isinstance(layer, StreamingNormAct2d):
        return foreign.batchnorm_with_activation(layer.drop, layer.act)
    for ours, plain in _PLAIN.items():
        if isinstance(layer, ours):
            return plain
    if dims is None:
        raise ValueError(f"{name} takes any rank: say with dims=1, 2 or 3 which BatchNorm to write for it")
    return (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]


def _to_groupnorm(name: str, layer: Norm) -> nn.GroupNorm:
    groups = {NormRef.sample("layer"): 1, NormRef.sample("channel"): layer.num_features}
    if layer.ref.pattern == NormRef.sample(("group", 1)).pattern:
        groups[layer.ref] = dict(layer.ref.sizes)["g"]
    if (
        layer.ref not in groups
        or layer.moment.p != 2
        or layer.moment.center != "mean"
        or (layer.weight is None) != (layer.bias is None)
    ):
        raise ValueError(
            f"{name} has no equivalent in torch.nn: {layer}. Convert the parts of the model that do have one"
        )
    return nn.GroupNorm(groups[layer.ref], layer.num_features, layer.eps, affine=layer.weight is not None)


def per_channel(name: str, layer: Norm, value: Tensor) -> Tensor:
    """One value per channel from one per statistic."""
    view = least_channel_view(layer)
    if view is None:
        raise ValueError(f"{name} keeps a statistic per place ({layer.ref.pattern!r}), which BatchNorm cannot")
    return view.per_channel(value)


def least_channel_view(layer: Norm) -> View | None:
    """The least view of a reference whose statistics are the same all over a channel."""
    view = layer.ref.least_view(layer.num_features)
    return view if all(view.axes[i] == 1 for i in view.kept) else None
