"""The networks of the experiments (the paper's figure 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamnorm_lab.methods.layers import NormFactory


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


class PerApplication(nn.Module):
    """Marks a normalization layer of which a weight-shared block has one for each application (time-specific).

    Anywhere else it is the layer that it holds.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        y: Tensor = self.layer(x)
        return y


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


def resnet(channels: int, classes: int, norm: NormFactory, width: int, depth: int) -> nn.Sequential:
    """The residual network of He et al. (2016) for CIFAR-10, with parameter-free shortcuts.

    Three stages of ``depth`` blocks of two convolutions each, the second and third stage at half the resolution and
    twice the channels of the one before. Width 16 and depth 3 make ResNet-20.

    Reference:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.

    Shape:
        Input (N, channels, H, W), output (N, classes).
    """
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False), norm(width, 2), nn.ReLU()]
    inputs = width
    for outputs in (width, 2 * width, 4 * width):
        for _ in range(depth):
            layers.append(ResidualBlock(inputs, outputs, norm))
            inputs = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


class ResidualBlock(nn.Module):
    """A block of ``resnet``: relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))).

    Where the number of channels grows, the first convolution has stride 2, and the shortcut takes every second place
    and fills the new channels with zeros.

    Shape:
        Input (N, inputs, H, W), output (N, outputs, H, W), or (N, outputs, H/2, W/2) rounded up where channels grow.
    """

    def __init__(self, inputs: int, outputs: int, norm: NormFactory) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.new_channels = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False)
        self.norm1 = norm(outputs, 2)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs, 2)

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        change = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels)) if self.new_channels else shortcut
        return torch.relu(shortcut + change)


def _convolution(inputs: int, outputs: int, stride: int, norm: NormFactory) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, padding=1), norm(outputs, 2), nn.ReLU()]


class SharedBlock(nn.Module):
    """A residual block applied several times: the same weights and the same normalization layers at every application.

    Args:
        channels: of its input, and of its output.
        norm: makes the two normalization layers; if they are ``PerApplication``, two for each application.
        applications: how often it is applied.

    Shape:
        (N, channels, H, W), input and output.
    """

    def __init__(self, channels: int, norm: NormFactory, applications: int) -> None:
        super().__init__()
        self.applications = applications
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = _normalization(channels, norm, applications)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = _normalization(channels, norm, applications)

    def forward(self, x: Tensor) -> Tensor:
        """x ← x + norm(conv(relu(norm(conv(x))))), so many times."""
        for application in range(self.applications):
            norm1, norm2 = _layer(self.norm1, application), _layer(self.norm2, application)
            x = x + norm2(self.conv2(torch.relu(norm1(self.conv1(x)))))
        return x


def _normalization(channels: int, norm: NormFactory, applications: int) -> nn.Module:
    first = norm(channels, 2)
    if isinstance(first, PerApplication):
        return nn.ModuleList([first, *(norm(channels, 2) for _ in range(applications - 1))])
    return first


def _layer(norm: nn.Module, application: int) -> nn.Module:
    return norm[application] if isinstance(norm, nn.ModuleList) else norm
