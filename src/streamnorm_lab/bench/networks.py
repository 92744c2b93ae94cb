"""ResNet-20 for images of 32×32 (He et al., 2016), with any normalization."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class _Block(nn.Module):
    """Two convolutions and a way around them; where the shape changes, the way around is a convolution too."""

    def __init__(self, channels: int, width: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            norm(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            norm(width),
        )
        same = stride == 1 and channels == width
        self.around = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), norm(width))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.around(x) + self.body(x))


def resnet20(norm: Callable[[int], nn.Module], classes: int = 10) -> nn.Sequential:
    """ResNet-20; ``norm`` makes a normalization of so many channels.

    Shape:
        Input (N, 3, 32, 32), output (N, classes).
    """
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), norm(16), nn.ReLU()]
    channels = 16
    for width, first_stride in ((16, 1), (32, 2), (64, 2)):
        for stride in (first_stride, 1, 1):
            layers.append(_Block(channels, width, stride, norm))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
