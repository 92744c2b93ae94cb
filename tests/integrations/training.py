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

NEW_TASK: dict[str, Any] = {"window": 100}
"""Options of a conversion before a training in which all weights move. Statistics with the default memory of a trained
network lag behind these, and the networks here are not trained: their weights are random."""

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


def with_statistics(model: nn.Module, forward: Callable[[nn.Module], Any]) -> Any:
    """The model in evaluation mode, with running statistics as training leaves them: averages over mini-batches."""
    model.train()
    batch_norms: list[Any] = [module for module in model.modules() if hasattr(module, "running_mean")]
    momenta = [layer.momentum for layer in batch_norms]
    for layer in batch_norms:
        layer.momentum = None
    with torch.no_grad():
        for _ in range(3):
            forward(model)
    for layer, momentum in zip(batch_norms, momenta):
        layer.momentum = momentum
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


def from_the_prior(model: nn.Module, **options: Any) -> Any:
    """A converted copy that starts as new layers do: from a moment of 1, and not from a variance of 1."""
    model = converted(model, **options)
    sn.reset_stats(model)
    return model


def layers(model: nn.Module) -> list[sn.Norm]:
    return [module for module in model.modules() if isinstance(module, sn.Norm)]


def assert_evaluates_as_before(before: nn.Module, after: nn.Module, *inputs: Any) -> None:
    """Equal outputs in evaluation; in double precision, since a deep network multiplies the rounding of single."""
    doubles = [x.double() if x.is_floating_point() else x for x in inputs]
    pair = [copy.deepcopy(model).double().eval() for model in (before, after)]
    with torch.no_grad():
        expected, actual = (tensor_of(model(*doubles)) for model in pair)
    assert expected.std() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def tensor_of(output: Any) -> Tensor:
    """What a network gives: a tensor, or the main one of an output object or a dict."""
    if isinstance(output, Tensor):
        return output
    return tensor_of(next(iter(output.values() if hasattr(output, "values") else output)))


def assert_learns(model: nn.Module, loss: Loss, batches: Sequence[Any], epochs: int = 10, lr: float = 3e-4) -> None:
    """The loss on a few mini-batches, seen again and again, falls to less than half; every step is noticed.

    In one of the last three epochs: with one or two samples in a mini-batch the loss of an epoch leaps now and then.
    """
    model.train()
    starts = [layer.long.clone() for layer in layers(model)]
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    means = []
    for _ in range(epochs):
        total = 0.0
        for batch in batches:
            optimizer.zero_grad()
            value = loss(model, batch)
            value.backward()
            optimizer.step()
            total += float(value)
        means.append(total / len(batches))
    assert min(means[-3:]) < means[0] / 2, means
    for layer, start in zip(layers(model), starts):
        assert not layer.long.equal(start)
        assert not layer.samples


def assert_evaluates_better(model: nn.Module, before: nn.Module, loss: Loss, batch: Any) -> None:
    """In evaluation too, by the statistics that were streamed, the loss fell to less than half."""
    with torch.no_grad():
        after, at_first = float(loss(model.eval(), batch)), float(loss(before.eval(), batch))
    assert after < at_first / 2, (at_first, after)


def assert_fine_tunes(
    model: nn.Module, data: tuple[Tensor, ...], batch_size: int, epochs: int = 10, lr: float = 3e-4
) -> None:
    """A classifier learns a few images in training and in evaluation."""
    before = copy.deepcopy(model)
    assert_learns(model, classification, in_batches(batch_size, *data), epochs, lr)
    assert_evaluates_better(model, before, classification, data)


def assert_trains_alike(first: nn.Module, second: nn.Module) -> None:
    """The same outputs and the same state after a step of training, random numbers included."""
    batch = images(2)
    for model in (first, second):
        torch.manual_seed(4)
        classification(model.train(), batch).backward()
        torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert_same_state(first, second)


def images(samples: int, size: int = 32, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Noise, and the classes 0, 1, 2, 3, 0, …"""
    return torch.randn(samples, channels, size, size), torch.arange(samples) % 4


def in_batches(batch_size: int, *tensors: Tensor) -> list[Any]:
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
