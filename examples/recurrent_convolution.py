"""A convolutional block with shared weights, applied several times: one streaming layer, used at each of them.

This is the third architecture of the paper. The block x + norm(conv(relu(norm(conv(x))))) is applied k times in a row
with the same weights, so its activations change from time to time but its two norms are the same two layers, with one
set of statistics. Nothing has to be said about that: each use counts its samples, and the gradients are taken in as
they come back, the last use first. Trained one image at a time, on stripes of four directions.

    python examples/recurrent_convolution.py
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import streamnorm as sn


class SharedBlock(nn.Module):
    """A residual block that is applied ``times`` times with the same weights."""

    def __init__(self, channels: int, times: int) -> None:
        super().__init__()
        self.times = times
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        # Each use counts its samples: the default memory of 100 would be one of 100/times images.
        self.norm1, self.norm2 = (sn.StreamingNorm2d(channels, window=100 * times) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x + self.norm2(self.second(torch.relu(self.norm1(self.first(x)))))
        return x


def network(times: int) -> nn.Sequential:
    """One block, entered by a convolution and left by a mean over all places."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        sn.StreamingNorm2d(8),
        nn.ReLU(),
        SharedBlock(8, times),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def stripes(count: int, size: int = 12) -> tuple[Tensor, Tensor]:
    """Noisy images of stripes, and which of four directions each has."""
    label = torch.randint(4, (count,))
    angle = (math.pi / 4 * label).view(-1, 1, 1)
    phase = 2 * math.pi * torch.rand(count, 1, 1)
    down, across = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    wave = torch.sin(1.5 * (across * angle.cos() + down * angle.sin()) + phase)
    return (wave + 0.5 * torch.randn(count, size, size)).unsqueeze(1), label


def main(images: int = 600) -> float:
    """Train on one image at a time; the accuracy on others."""
    torch.manual_seed(0)
    model = network(times=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for image, label in zip(*stripes(images)):
        loss = nn.functional.cross_entropy(model(image[None]), label[None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    test_images, test_labels = stripes(500)
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    print(f"{accuracy:.1%} of 500 images of stripes right (chance: 25%) after {images}, seen one at a time")
    return accuracy


if __name__ == "__main__":
    torch.set_num_threads(1)  # one small image at a time is too little to share out
    main()
