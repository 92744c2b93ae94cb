"""Streaming Normalization whose memory counts pixels instead of samples: the question of one experiment.

Where each of S samples brings B places, S·B against a memory of P pixels is S against P/B samples, in the weights α as
in the forgetting κ. So the layer is ``sn.StreamingNorm`` with a window that goes by the size of its maps: short where
they are large, long where they are small.
"""

from __future__ import annotations

import math

from torch import Tensor

import streamnorm as sn


class StreamingPixels(sn.Norm):
    """Streaming Normalization of (N, C) or (N, C, ...) per channel with a memory in pixels.

    Args:
        num_features: C.
        p: order of the moment.
        pixels: the memory P, above 0. Where a sample has no places it counts as one pixel.
    """

    def __init__(self, num_features: int, p: float = 1, pixels: float = 12800) -> None:
        super().__init__(num_features, sn.NormRef.batch("channel"), sn.LpMoment(p), sn.Stream(window=pixels))
        self.pixels = pixels

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize x."""
        window = self.pixels / math.prod(x.shape[2:])
        assert self.stream is not None
        if self.stream.window != window:
            self.set_stream(sn.Stream(window=window))
        return super().forward(x, mask)
