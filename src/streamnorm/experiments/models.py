"""The networks of the experiments (the paper's figure 2)."""

from __future__ import annotations

from torch import nn

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
