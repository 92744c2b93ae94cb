"""SampleNorm: statistics from inside each sample."""

from __future__ import annotations

from typing import Any

import torch

from ..core import arguments
from ..core.moment import LpMoment
from ..core.reference import NormRef, RefName
from .construction import check_groups
from .norm import Norm


@arguments.explained
class SampleNorm(Norm):
    """Sample Normalization: statistics from inside each sample (the paper's SP).

    With the defaults it is Layer Normalization over channels and places with a gain and a bias per channel;
    ``"channel"`` is Instance Normalization, ``("group", g)`` Group Normalization, ``"position"`` normalizes across the
    channels at each place. Training and evaluation are the same.

    Args:
        num_features: C, the number of channels.
        ref: ``"layer"``, ``"channel"``, ``"position"``, ``("group", g)``, or a NormRef inside the sample.
        eps: added to sigma², ≥ 0.
        affine: whether to learn a gain and a bias per channel.
        p: order of the moment, ≥ 1.
        center: ``"mean"`` or ``"zero"``, see :class:`LpMoment`.
        scale: ``"raw"`` or ``"gaussian"``, see :class:`LpMoment`.
        bias: with ``affine``, whether to learn the bias too.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        - Input: ``(N, C)`` or ``(N, C, ...)``.
        - Output: the same.

    Example:
        >>> x = torch.randn(2, 6, 4, 4)
        >>> torch.allclose(SampleNorm(6, ("group", 3))(x), nn.GroupNorm(3, 6)(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        num_features: int,
        ref: RefName | NormRef = "layer",
        eps: float = 1e-5,
        affine: bool = True,
        *,
        p: float = 2,
        center: str = "mean",
        scale: str = "raw",
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        reference = ref if isinstance(ref, NormRef) else NormRef.sample(ref)
        check_groups(ref, num_features)
        super().__init__(
            num_features,
            reference,
            LpMoment(p, center, scale),
            None,
            eps,
            affine,
            bias=bias,
            device=device,
            dtype=dtype,
        )
