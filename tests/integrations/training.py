"""What the tests of other people's models and loops do again and again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import streamnorm as sn

Loss = Callable[[nn.Module, Any], Tensor]
"""The loss of a model on one mini-batch."""

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


def with_statistics(model: nn.Module, forward: Callable[[nn.Module], Any]) -> Any:
    """The model in evaluation mode, after three mini-batches moved its running statistics away from 0 and 1."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            forward(model)
    return model.eval()


def converted(model: nn.Module, **options: Any) -> Any:
    """A converted copy: without a warning, and without a layer left as it was."""
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = sn.convert(model, **options)
    assert layers(model), "nothing was converted"
    assert not [name for name, module in model.named_modules() if isinstance(module, NORMS)]
    return model


def layers(model: nn.Module) -> list[sn.Norm]:
    return [module for module in model.modules() if isinstance(module, sn.Norm)]


def assert_same_outputs(first: Any, second: Any) -> None:
    """Equal to the rounding of a deep network, relative to the largest value."""
    assert first.shape == second.shape
    scale = float(first.abs().max())
    assert scale > 0
    torch.testing.assert_close(second / scale, first / scale, rtol=0, atol=2e-5)


def assert_learns(model: nn.Module, loss: Loss, batches: Sequence[Any], epochs: int, lr: float = 0.01) -> None:
    """The mean loss over a few mini-batches, seen again and again, falls to less than half."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    means = []
    for _ in range(epochs):
        losses = []
        for batch in batches:
            optimizer.zero_grad()
            value = loss(model, batch)
            value.backward()
            optimizer.step()
            losses.append(float(value))
        means.append(sum(losses) / len(losses))
    assert means[-1] < means[0] / 2, means
    moved = [not layer.long.equal(sn.StreamingNorm1d(layer.num_features).long) for layer in layers(model)]
    assert all(moved)
    assert all(not layer.samples for layer in layers(model)), "a step was not noticed"


def images(samples: int, size: int = 32, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Noise, and the classes 0, 1, 2, 3, 0, …"""
    return torch.randn(samples, channels, size, size), torch.arange(samples) % 4


def in_batches(batch_size: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.split(batch_size) for tensor in tensors)))


def classification(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, target = batch
    return nn.functional.cross_entropy(model(x), target)


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    """Every parameter and every buffer, bit for bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    different = [name for name in ours if not ours[name].equal(theirs[name])]
    assert not different
