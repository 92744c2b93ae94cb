"""ResNet-20 for images of 32×32 and ResNet-18 for larger ones (He et al., 2016), with any normalization."""

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
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), norm(16), nn.ReLU()]
    return _resnet(stem, (16, 32, 64), 3, norm, classes)


def resnet18(norm: Callable[[int], nn.Module], classes: int = 1000) -> nn.Sequential:
    """ResNet-18; ``norm`` makes a normalization of so many channels.

    Shape:
        Input (N, 3, 224, 224), output (N, classes).
    """
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), norm(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return _resnet(stem, (64, 128, 256, 512), 2, norm, classes)


def _resnet(
    stem: list[nn.Module], widths: tuple[int, ...], blocks: int, norm: Callable[[int], nn.Module], classes: int
) -> nn.Sequential:
    """Groups of blocks, each but the first of half the resolution of the one before."""
    layers, channels = list(stem), widths[0]
    for width in widths:
        for block in range(blocks):
            stride = 2 if block == 0 and width != widths[0] else 1
            layers.append(_Block(channels, width, stride, norm))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
