"""A streaming layer with an activation behind it, as timm has its normalization layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core import arguments
from ..core.compiler import as_leaf, is_symbolic
from .streaming import StreamingNorm2d


@arguments.explained
class StreamingNormAct2d(StreamingNorm2d):
    """StreamingNorm2d, then a dropout, then an activation: what :func:`convert` makes of timm's ``BatchNormAct2d``.

    Args:
        num_features: C, the number of channels.
        eps: added to sigma², ≥ 0.
        affine: whether to learn a gain and a bias per channel.
        drop: what comes after the normalization; None for nothing.
        act: what comes after that; None for nothing.
        device: of parameters and state.
        dtype: of parameters; the state is float64 for float64 and float32 for all others.
        options: the other arguments of StreamingNorm2d, such as ``p=2`` or ``window=500``.

    Shape:
        - Input: ``(N, C, H, W)``.
        - mask: ``(N,)`` or ``(N, H, W)``, bool; True where an element counts.
        - Output: as the input; where the mask is False, what the activation makes of zero.

    Raises:
        TypeError: if ``drop`` or ``act`` cannot be called on a tensor; and as StreamingNorm2d.

    Example:
        >>> import torch
        >>> layer = StreamingNormAct2d(8, act=nn.SiLU())
        >>> layer(torch.randn(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        drop: nn.Module | None = None,
        act: nn.Module | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        for name, part, example in (("drop", drop, "nn.Dropout(0.1)"), ("act", act, "nn.ReLU()")):
            if part is not None and (isinstance(part, type) or not callable(part)):
                raise TypeError(f"{name} is a module, such as {example}, or None, got {part!r}")
        super().__init__(num_features, eps, affine, device=device, dtype=dtype, **options)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize x, drop, and activate."""
        if is_symbolic(x):
            return as_leaf(self, StreamingNormAct2d.forward, x, mask)
        y: Tensor = self.act(self.drop(super().forward(x, mask)))
        return y
