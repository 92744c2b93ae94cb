"""A convolutional block with shared weights: the same streaming layers are used at every application."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.beside import Beside
from torch import Tensor, nn

import streamnorm as sn


class Block(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), applied several times."""

    def __init__(self, norm1: nn.Module, norm2: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64) for _ in range(2))
        self.norm1, self.norm2 = norm1, norm2

    def forward(self, x: Tensor, times: int) -> Tensor:
        for _ in range(times):
            x = x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return x


@pytest.mark.parametrize("p", [1, 2])
def test_every_application_agrees_with_the_oracle(p: int) -> None:
    """Outputs in order, gradients with the last application first, over updates that differ in length."""
    constants: dict[str, Any] = {"alpha": (0.5, 0.3, 0.2), "beta": (0.6, 0.1, 0.3), "kappa": (0.7, 0.3, 0.6, 0.4)}

    def norm() -> Beside:
        layer = sn.StreamingNorm2d(3, p=p, scale="raw", dtype=torch.float64, **constants)
        return Beside(layer, "channel", p=p, center="mean", scale="raw", **constants)

    block = Block(norm(), norm())
    optimizer = torch.optim.SGD(block.parameters(), lr=0.01)
    applied = 0
    for times in (1, 4, 2):
        for rows in (1, 2):
            output = block(torch.randn(rows, 3, 4, 4, dtype=torch.float64), times)
            (output * torch.randn_like(output)).sum().backward()
            applied += times
        for each in (block.norm1, block.norm2):
            assert isinstance(each, Beside)
            assert (each.uses, each.gradients) == (applied, applied)
            each.check_parameter_gradients()
            each.check_state()
            each.zero_expected_gradients()
            each.oracle.commit()
        optimizer.step()
        optimizer.zero_grad()
