"""Inputs: what a layer accepts, and what it says to the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from ..training.streaming import Streaming

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check(layer: Streaming, x: Tensor, num_features: int) -> None:
    """Refuse an input that does not fit a layer, before anything changes: halfway, its state would be half updated.

    Raises:
        ValueError: for another number of channels.
        TypeError: for another dtype.
        RuntimeError: for another device.
    """
    if x.shape[1] != num_features:
        raise ValueError(
            f"expected {num_features} channels in axis 1, got an input of shape {tuple(x.shape)}; "
            f"write {type(layer).__name__}({x.shape[1]}) for it, or move the channels to axis 1"
        )
    if x.dtype not in _DTYPES:
        raise TypeError(f"expected a floating point input, got {x.dtype}; write x.float()")
    kept = layer._buffers.get("long", layer._buffers.get("running_mean"))
    if kept is not None and (x.dtype == torch.float64) != (kept.dtype == torch.float64):
        raise TypeError(
            f"the input is {x.dtype} and the layer's state {kept.dtype}: convert one of them with .double() or .float()"
        )
    if kept is not None and x.device != kept.device:
        raise RuntimeError(
            f"the input is on {x.device} and the layer's state on {kept.device}: move one of them, such as with "
            f"model.to({str(x.device)!r})"
        )


def check_rank(x: Tensor) -> None:
    """Refuse an input without a channel axis.

    Raises:
        ValueError: for it.
    """
    if x.dim() < 2:
        raise ValueError(
            f"expected an input of shape (N, C, ...), got {x.dim()}D of shape {tuple(x.shape)}; "
            "a batch of one is x[None]"
        )


def full_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The mask as ``(N, ...)``, one value per sample and place.

    Raises:
        TypeError: if it is no tensor.
        RuntimeError: for another device.
        ValueError: for another shape or dtype.
    """
    places = (x.shape[0], *x.shape[2:])
    shapes = f"{places[:1]} or {places}" if len(places) > 1 else f"{places}"
    if not isinstance(mask, Tensor):
        raise TypeError(f"a mask is a bool tensor of shape {shapes}, got a {type(mask).__name__}")
    if mask.device != x.device:
        raise RuntimeError(f"the input is on {x.device} and the mask on {mask.device}: write mask.to(x.device)")
    if mask.dtype != torch.bool or tuple(mask.shape) not in (places, places[:1]):
        raise ValueError(
            f"a mask is a bool tensor of shape {shapes} for an input of shape {tuple(x.shape)}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}; write mask.bool() for zeros and ones"
        )
    return mask.view(mask.shape + (1,) * (len(places) - mask.dim())).expand(places).contiguous()


def empty(layer: Streaming, x: Tensor) -> Tensor:
    """An empty output that still leads back to gain and bias, so that their gradients are zero and not missing."""
    for parameter in layer.parameters(recurse=False):
        x = x * parameter.sum().to(x.dtype)
    return x * 1
