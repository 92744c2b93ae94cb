"""Image corruptions: noise, blur, low contrast, fog."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Corruption = Callable[[Tensor, torch.Generator], Tensor]
"""Changes pixels from 0 to 255, float32 of shape (N, C, H, W), by chance where it needs chance."""


def _noise(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise with a deviation of a sixth of the range."""
    return pixels + 255 / 6 * torch.randn(pixels.shape, generator=generator)


def _blur(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A Gaussian blur whose deviation is a 24th of the image's height."""
    channels, height = pixels.shape[1:3]
    deviation = height / 24
    reach = min(round(3 * deviation) or 1, height - 1)
    places = torch.arange(-reach, reach + 1.0)
    bell = (-0.5 * (places / deviation).square()).exp()
    kernel = (bell / bell.sum()).expand(channels, 1, 1, -1)
    padded = F.pad(pixels, [reach] * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=channels), kernel.mT, groups=channels)


def _contrast(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Every image drawn together to 30% of its contrast, about its own mean."""
    mean = pixels.mean((1, 2, 3), keepdim=True)
    return mean + 0.3 * (pixels - mean)


def _fog(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """White that covers between a quarter and three quarters, in clouds of about a third of the image."""
    count, _, *size = pixels.shape
    clouds = torch.rand((count, 1, 4, 4), generator=generator)
    thickness = 0.25 + 0.5 * F.interpolate(clouds, size, mode="bilinear", align_corners=True)
    return pixels + thickness * (255 - pixels)


CORRUPTIONS: dict[str, Corruption] = {"noise": _noise, "blur": _blur, "contrast": _contrast, "fog": _fog}


def corrupt(pixels: Tensor, kind: str, seed: int) -> Tensor:
    """Corrupted copies, in whole numbers from 0 to 255 again.

    Args:
        pixels: uint8 of shape (N, C, H, W).
        kind: one of ``CORRUPTIONS``.
        seed: of what is drawn by chance.
    """
    generator = torch.Generator().manual_seed(seed)
    changed = CORRUPTIONS[kind](pixels.float(), generator)
    return changed.round().clamp(0, 255).to(torch.uint8)
