"""Normalizations inside one sample: Group, Instance and RMS normalization, as torch.nn has them.

Group Normalization (Wu and He 2018, arXiv:1803.08494) and Instance Normalization (Ulyanov et al. 2016,
arXiv:1607.08022) subtract the mean and divide by the deviation of a group of channels, or of one. RMS normalization
(Zhang and Sennrich 2019, arXiv:1910.07467) divides by the root mean square of the whole sample, without a mean and
without a bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(num_features: int, groups: int = 8) -> nn.GroupNorm:
    """Group Normalization with at most so many groups, as many as leave at least two equal channels in each.

    Example:
        >>> group_norm(64).num_groups, group_norm(6).num_groups, group_norm(8).num_groups
        (8, 3, 4)
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    most = min(groups, max(1, num_features // 2))
    return nn.GroupNorm(max(g for g in range(1, most + 1) if num_features % g == 0), num_features)


class InstanceNorm(nn.Module):
    """Instance Normalization with gain and bias, with any number of axes; it refuses an input that has no places."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each channel of each image."""
        if x.dim() == 2:
            raise ValueError(
                "Instance Normalization averages over the places of an image, and a fully connected layer has one "
                f"value per channel and sample; a value less its own mean is 0. Got an input of shape {tuple(x.shape)}"
            )
        return F.instance_norm(x, weight=self.weight, bias=self.bias)


class RMSNorm(nn.Module):
    """RMS normalization of (N, C) or (N, C, ...), with a gain per channel.

    Args:
        num_features: C.
        eps: added to the mean square.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root mean square, then the gain."""
        return F.rms_norm(x, x.shape[1:], eps=self.eps) * self.weight.view(-1, *[1] * (x.dim() - 2))
