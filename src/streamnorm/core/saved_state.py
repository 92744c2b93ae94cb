"""Checks of a state before it is loaded: the moment is the layer's own, statistics are finite, counts at least 0."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .moment import LpMoment
from .spec import FIELDS, GRADIENTS
from .stream import ESTABLISHED

VERSION = 2
"""Version of the state. Version 1 held neither the moment nor the number of samples seen."""

MOMENT = "lp_moment"
"""Name of the buffer with p, centre and scale. It is saved and compared; nothing is computed with it."""

_STATISTICS = (*(name for name, field in FIELDS.items() if not field.is_count), "running_mean", "running_var")
_COUNTS = (*(name for name, field in FIELDS.items() if field.is_count), "num_batches_tracked")
_WITH_MOMENT = tuple(name for name, field in FIELDS.items() if field.half == "statistics" and field.rows == 2)
_SAYS_NO_SCALE = (
    "this state is of streamnorm 0.1, and does not say the scale that its statistics were collected with; the layer "
    "has scale='gaussian'. In 0.1 that was the default of streamnorm.convert alone: for a network that was built of "
    "streaming layers with p={p:g} and no scale of its own, make them with scale='raw'"
)
_SAME = 0.004
"""Relative difference up to which two p are the same: a state may have been saved in bfloat16, of 8 bits."""


def as_tensor(moment: LpMoment, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """The moment as ``(p, 1 if the centre is the mean else 0, 1 if the scale is gaussian else 0)``.

    Example:
        >>> as_tensor(LpMoment(p=1, center="zero", scale="gaussian")).tolist()
        [1.0, 0.0, 1.0]
    """
    values = (float(moment.p), float(moment.center == "mean"), float(moment.scale == "gaussian"))
    return torch.tensor(values, device=device, dtype=dtype)


def prepare(
    layer: Any, moment: LpMoment | None, state_dict: dict[str, Any], prefix: str, version: int | None
) -> list[str]:
    """Check a state that ``load_state_dict`` is about to load into a layer.

    Args:
        layer: the layer.
        moment: of its stream; None if it has no stream.
        state_dict: may be changed: a state of version 1 is given the layer's own moment, and its statistics count as
            those of a long training.
        prefix: of the layer's names in ``state_dict``.
        version: of the state, None where it is not known.

    Returns:
        Reasons to refuse it, each a sentence; none if it may be loaded.
    """
    names = [name for name in (*layer._parameters, *layer._buffers) if prefix + name in state_dict]
    own = {name: state_dict[prefix + name] for name in names}
    readable = {name: t for name, t in own.items() if type(t) in (Tensor, nn.Parameter) and not t.is_meta}
    faults = _size_faults(layer, readable, prefix)
    if faults or moment is None:
        if "num_batches_tracked" in layer._buffers and (version is None or version < 2):  # a BatchNorm's of old
            tracked: Any = layer._buffers["num_batches_tracked"]
            known = torch.zeros_like(tracked, device="cpu") if tracked.is_meta else tracked
            state_dict.setdefault(prefix + "num_batches_tracked", known)
        return faults or _value_faults(readable, prefix)
    if prefix + "running_var" in state_dict:
        return [
            f"{prefix}running_var: this is the state of a BatchNorm. Load it into the BatchNorm model, then "
            "write streamnorm.convert(model)"
        ]
    if version is not None and version > VERSION:
        return [
            f"{prefix}long: this state is of version {version}, and this release of streamnorm reads versions up to "
            f"{VERSION}: install a later one"
        ]
    faults = _value_faults(readable, prefix)
    if MOMENT in readable:
        faults += _moment_faults(moment, readable[MOMENT], prefix)
    is_old = version is None or version < 2
    like: Any = own.get("long", layer._buffers["long"])
    if MOMENT in readable or (MOMENT not in own and is_old):
        state_dict[prefix + MOMENT] = as_tensor(moment, like.device, torch.promote_types(like.dtype, torch.float32))
    if MOMENT not in own and is_old and "long" in own and moment.scale != "raw" and moment.p != 2:
        warnings.warn(_SAYS_NO_SCALE.format(p=moment.p), stacklevel=2)
    if "long" in own and "seen" not in own and is_old:
        seen: Any = layer._buffers["seen"]
        state_dict[prefix + "seen"] = torch.full_like(seen, ESTABLISHED, device=like.device)
        if layer.formula.window is not None:  # gradients were in other units, and are soon collected again
            state_dict.update({prefix + name: torch.zeros_like(own[name]) for name in GRADIENTS if name in own})
    return faults


def _size_faults(layer: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> list[str]:
    """Find sizes that do not fit. PyTorch would find them too, with half of the layer loaded by then."""
    wanted = {name: t.shape for name, t in (layer._parameters | layer._buffers).items() if t is not None}
    return [
        f"size mismatch for {prefix}{name}: of shape {tuple(t.shape)} in the checkpoint, {tuple(wanted[name])} in the "
        "model"
        for name, t in tensors.items()
        if name in wanted and t.shape not in (wanted[name], wanted[name] or (1,))  # a scalar may be of shape (1,)
    ]


def _value_faults(tensors: Mapping[str, Tensor], prefix: str) -> list[str]:
    """Find statistics that are not finite, and negative moments and counts."""
    good = dict(_good_values(tensors))
    if not good or all(torch.stack([t.all() for t in good.values()]).tolist()):  # wait for the device once
        return []
    return [
        f"{prefix}{name}: it holds {_first(tensors[name], ~each)}; statistics are finite, moments and counts at least "
        "0. Take an earlier checkpoint, or leave the statistics of this layer out with strict=False and write "
        "streamnorm.calibrate(model, batches)"
        for name, each in good.items()
        if not each.all()
    ]


def _first(t: Tensor, where: Tensor) -> str:
    place = where.nonzero()[0].tolist()
    return f"{t[tuple(place)].item()} at {place}" if place else f"{t.item()}"


def _good_values(tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """Mark the values of each tensor that may be loaded."""
    for name, t in tensors.items():
        if name in _COUNTS:
            yield name, t >= 0
        elif name in _STATISTICS:
            good = t.isfinite()
            if name == "running_var":
                good = good & (t >= 0)
            elif name in _WITH_MOMENT:
                good[1] &= t[1] >= 0
            yield name, good


def _moment_faults(own: LpMoment, saved: Tensor, prefix: str) -> list[str]:
    p, center, scale = saved.tolist()
    try:
        other = LpMoment(p, "mean" if center else "zero", "gaussian" if scale else "raw")
    except ValueError:
        return [f"{prefix}{MOMENT}: it is {saved.tolist()}, and p is a finite number of at least 1"]
    same = math.isclose(own.p, other.p, rel_tol=_SAME) and math.isclose(own.k, other.k, rel_tol=_SAME)
    if same and own.center == other.center:
        return []
    theirs, ours = (f"p={m.p:g}, center={m.center!r}, scale={m.scale!r}" for m in (other, own))
    return [
        f"{prefix}{MOMENT}: these statistics were collected with {theirs}, and this layer has {ours}. Make the layer "
        f"with {theirs}; streamnorm.convert takes the same options, and scale='gaussian' is its default"
    ]
