"""The networks of the experiments (the paper's figure 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from streamnorm.experiments.methods import NormFactory


def fully_connected(inputs: int, classes: int, norm: NormFactory, width: int, depth: int) -> nn.Sequential:
    """Architecture A: ``depth`` × (Linear, normalization, ReLU), then Linear.

    Shape:
        Input (N, *) with ``inputs`` values per sample, output (N, classes).
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), norm(width, 0), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def recurrent_convolutional(
    channels: int, classes: int, norm: NormFactory, width: int, applications: tuple[int, int]
) -> nn.Sequential:
    """Architecture C: convolutions, with weight-shared blocks between them.

    A convolution, a block applied k1 times, a convolution of stride 2, a block applied k2 times, a convolution of
    stride 2; then the mean over all places, and Linear.

    Args:
        channels: of the images.
        classes: how many logits.
        norm: makes the normalization layers.
        width: channels of the first convolution; the second has twice and the third four times as many.
        applications: how often the two blocks are applied, k1 and k2.

    Shape:
        Input (N, channels, H, W), output (N, classes).
    """
    first, second = applications
    return nn.Sequential(
        *_convolution(channels, width, 1, norm),
        SharedBlock(width, norm, first),
        *_convolution(width, 2 * width, 2, norm),
        SharedBlock(2 * width, norm, second),
        *_convolution(2 * width, 4 * width, 2, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


def feedforward_convolutional(channels: int, classes: int, norm: NormFactory, width: int) -> nn.Sequential:
    """Architecture B: architecture C with each block applied once.

    Shape:
        Input (N, channels, H, W), output (N, classes).
    """
    return recurrent_convolutional(channels, classes, norm, width, (1, 1))


def _convolution(inputs: int, outputs: int, stride: int, norm: NormFactory) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, padding=1), norm(outputs, 2), nn.ReLU()]


class SharedBlock(nn.Module):
    """A residual block applied several times: the same weights and the same normalization layers at every application.

    Args:
        channels: of its input, and of its output.
        norm: makes the two normalization layers.
        applications: how often it is applied.

    Shape:
        (N, channels, H, W), input and output.
    """

    def __init__(self, channels: int, norm: NormFactory, applications: int) -> None:
        super().__init__()
        self.applications = applications
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = norm(channels, 2)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = norm(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x ← x + norm(conv(relu(norm(conv(x))))), so many times."""
        for _ in range(self.applications):
            x = x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return x
