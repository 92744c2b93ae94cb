"""The loops written by hand that the frameworks' are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from integrations.training import layers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import streamnorm as sn

BATCH_SIZE = 2


def data(samples: int = 24) -> TensorDataset:
    """Noise and classes, the same each time."""
    random = torch.Generator().manual_seed(7)
    return TensorDataset(
        torch.randn(samples, 3, 8, 8, generator=random), torch.randint(0, 4, (samples,), generator=random)
    )


def loader(samples: int = 24) -> DataLoader[Any]:
    return DataLoader(data(samples), batch_size=BATCH_SIZE)


def network() -> nn.Sequential:
    """The same start each time: a layer of each kind, and a layer that no optimizer owns."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        sn.StreamingNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 8),
        sn.StreamingNorm1d(8, affine=False),
        nn.Linear(8, 4),
    )


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def loss(model: nn.Module, batch: Iterable[Tensor]) -> Tensor:
    x, target = batch
    return nn.functional.cross_entropy(model(x), target)


def by_hand(
    epochs: int = 1,
    accumulate: int = 1,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    after_step: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Plain PyTorch: sum the gradients of ``accumulate`` mini-batches, clip, step."""
    model = network().train()
    optimizer = make_optimizer(model)
    for _ in range(epochs):
        for index, batch in enumerate(loader()):
            with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                value = loss(model, batch)
            (value / accumulate).backward()
            if (index + 1) % accumulate:
                continue
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            assert not any(layer.samples for layer in layers(model)), "a step was not noticed"
            if after_step is not None:
                after_step(model)
    return model
