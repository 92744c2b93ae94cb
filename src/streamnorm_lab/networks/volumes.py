"""The network that segments volumes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamnorm_lab.methods.layers import NormFactory


class UNet(nn.Module):
    """A small 3D U-Net: two steps down to a quarter of the resolution and two up, with skip connections.

    Every convolution but the last is followed by normalization and ReLU. Down, convolutions of stride 2; up, the values
    are repeated.

    Args:
        channels: of the volumes.
        classes: how many logits each place gets.
        norm: makes the normalization layers.
        width: channels at full resolution; each step down doubles them.

    Shape:
        Input (N, channels, D, H, W), output (N·D·H·W, classes).

    Reference:
        Çiçek, Abdulkadir, Lienkamp, Brox, Ronneberger: 3D U-Net, MICCAI 2016, section 2, with fewer layers.
    """

    def __init__(self, channels: int, classes: int, norm: NormFactory, width: int) -> None:
        super().__init__()
        self.top = _convolution(channels, width, norm)
        self.down = nn.Sequential(_convolution(width, 2 * width, norm, 2), _convolution(2 * width, 2 * width, norm))
        self.bottom = nn.Sequential(
            _convolution(2 * width, 4 * width, norm, 2), _convolution(4 * width, 4 * width, norm)
        )
        self.up = _convolution(6 * width, 2 * width, norm)
        self.out = _convolution(3 * width, width, norm)
        self.head = nn.Conv3d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of all places, those of each volume after the other."""
        full = self.top(x)
        half = self.down(full)
        half = self.up(_beside(self.bottom(half), half))
        logits: Tensor = self.head(self.out(_beside(half, full)))
        return logits.movedim(1, -1).reshape(-1, logits.shape[1])


def _convolution(inputs: int, outputs: int, norm: NormFactory, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(inputs, outputs, 3, stride, padding=1), norm(outputs, 3), nn.ReLU())


def _beside(coarse: Tensor, fine: Tensor) -> Tensor:
    """The channels of a coarse map, repeated to the size of a fine one, and those of the fine one."""
    return torch.cat([F.interpolate(coarse, fine.shape[2:]), fine], 1)
