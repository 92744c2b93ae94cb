"""The usual augmentation of small images: random shifts and mirror images, drawn before the pass that uses them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Shifts:
    """One shift for each image of a pass, and whether it is mirrored.

    ``down`` and ``right`` say how far to move the frame, from 0 to 2·padding; padding leaves it where it is.
    """

    padding: int
    down: Tensor
    right: Tensor
    mirrored: Tensor

    @classmethod
    def draw(cls, count: int, padding: int, mirror: bool, seed: int, device: str) -> Shifts:
        """Draw one shift per image; the same seed gives the same shifts on every device."""
        generator = torch.Generator().manual_seed(seed)
        down, right = torch.randint(2 * padding + 1, (2, count), generator=generator)
        mirrored = (torch.rand(count, generator=generator) < 0.5) & mirror
        return cls(padding, down.to(device), right.to(device), mirrored.to(device))

    def apply(self, images: Tensor, start: int) -> Tensor:
        """Shift images, the first of which is number ``start`` of the pass; beyond their edges they are 0.

        Shape:
            (n, C, H, W), the result in the memory format channels last.
        """
        here = slice(start, start + len(images))
        height, width = (torch.arange(size, device=images.device) for size in images.shape[2:])
        rows, columns = self.down[here, None] + height, self.right[here, None] + width
        columns = torch.where(self.mirrored[here, None], columns.flip(1), columns)
        numbers = torch.arange(len(images), device=images.device)
        padded = F.pad(images, [self.padding] * 4)
        picked = padded[numbers[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return picked.movedim(-1, 1)
