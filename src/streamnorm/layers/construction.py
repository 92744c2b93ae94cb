"""Construction: what the constructors of layers check, and what to write for what a BatchNorm has."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..core import arguments
from ..core.moment import LpMoment
from ..core.reference import NormRef, RefName
from ..core.spec import wide
from ..core.stream import Stream

_TO_BATCHNORM = "streamnorm.to_batchnorm(model) writes a BatchNorm that has it"
INSTEAD = {
    "running_mean": f"layer.eval_stats()[0] is the mean that evaluation uses, and {_TO_BATCHNORM}",
    "running_var": f"layer.eval_stats()[1] is the variance that evaluation uses, and {_TO_BATCHNORM}",
    "num_batches_tracked": "layer.samples is the number of samples since the last weight update",
    "momentum": "its memory in samples is layer.stream.window",
    "track_running_stats": "it always does; streamnorm.freeze(model) holds its statistics",
    "reset_running_stats": "write layer.reset_stats(), or streamnorm.reset_stats(model)",
}
"""Hints for attributes that a BatchNorm has and a streaming layer does not."""

_FEATURES = "num_features is the number of channels, an integer of at least 1"


def check_features(num_features: int) -> int:
    """A number of channels, or an error."""
    return arguments.whole(num_features, _FEATURES)


def check_eps(eps: float) -> float:
    """The number that is added to sigma², or an error."""
    meaning = "eps is added to sigma² and must be at least 0, such as 1e-5"
    eps = arguments.real(eps, meaning)
    if not 0 <= eps < math.inf:
        raise ValueError(f"{meaning}, got {eps}")
    return eps


def check_switches(affine: bool, bias: bool) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(affine, bool):
        raise TypeError(
            f"affine is True or False, got {affine!r}; where BatchNorm has its momentum, streaming layers take "
            "window=, a memory in samples"
        )
    arguments.flag("bias", bias)


def check_groups(ref: RefName | NormRef, num_features: int) -> None:
    """Refuse a number of groups that does not divide the channels."""
    if isinstance(ref, tuple) and check_features(num_features) % ref[1]:
        raise ValueError(
            f"{num_features} channels do not fall into {ref[1]} equal groups; choose a divisor of {num_features}"
        )


def check_kinds(ref: Any, moment: Any, stream: Any, dtype: Any) -> None:
    """Refuse what is no reference, moment, stream or dtype of a layer."""
    if not isinstance(ref, NormRef):
        raise TypeError(f"ref is a NormRef, such as NormRef.batch('channel'), got {ref!r}")
    if not isinstance(moment, LpMoment):
        raise TypeError(f"moment is an LpMoment, such as LpMoment(p=1), got {moment!r}")
    if stream is not None and not isinstance(stream, Stream):
        raise TypeError(f"stream is a Stream, such as Stream(window=200), or None, got {stream!r}")
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        raise TypeError(f"dtype is a floating point one, such as torch.float32, got {dtype}")


def state_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of statistics beside parameters of this dtype."""
    return wide(dtype or torch.get_default_dtype())
