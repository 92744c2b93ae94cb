"""Processes that do not do the same find out, and say what is wrong."""

from __future__ import annotations

import datetime
import gc
import warnings
from typing import Any

import pytest
import torch
from support.processes import Processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import streamnorm as sn
from streamnorm.training import agreement


def network(width: int = 4, affine: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, width),
        sn.StreamingNorm1d(width, affine=affine),
        nn.Linear(width, width),
        sn.StreamingNorm1d(width, affine=affine),
    )


def backward(model: nn.Module, samples: int = 4) -> None:
    model(torch.randn(samples, 3)).square().sum().backward()


def state(model: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def failing(rank: int, what: str) -> tuple[str, list[str], bool]:
    """The error of a process, its warnings, and whether its statistics are as they were."""
    agreement.FIRST_WORD = datetime.timedelta(seconds=1)
    model = network()
    ddp = DistributedDataParallel(model)
    optimizer = SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        backward(ddp)
        optimizer.step()
    backward(ddp)
    before = state(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            if rank == 0:
                sn.calibrate(model, [torch.randn(5, 3)]) if what == "calibrates" else optimizer.step()
            else:
                backward(ddp)
            error = ""
        except RuntimeError as caught:
            error = str(caught)
    return error, [str(w.message) for w in seen], all(a.equal(b) for a, b in zip(before, model.buffers()))


@pytest.mark.parametrize("what", ["steps", "calibrates"])
def test_a_process_that_waits_alone_says_whom_for(processes: Processes, what: str) -> None:
    (error, said, unchanged), (other, *_) = processes(failing, what, patience=3)
    assert "waited for process 1 in vain" in error
    assert "skip an optimizer step" in error
    assert any("waits for process 1 (this is process 0 of 2)" in text for text in said)
    assert unchanged
    assert other  # gloo's own words, in the all-reduce of gradients


def different_layers(rank: int, how: str) -> tuple[str, bool]:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    if how == "later":
        backward(model)
        optimizer.step()
        if rank == 1:
            other = network(5)
            optimizer.add_param_group({"params": list(other.parameters())})
            backward(other)
        backward(model)
    else:
        backward(model if rank == 0 else model[:2])
    before = state(model)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error), all(a.equal(b) for a, b in zip(before, model.buffers()))
    return "", False


@pytest.mark.parametrize("how", ["later", "unused"])
def test_other_layers_in_one_process_are_refused_in_all(processes: Processes, how: str) -> None:
    for error, unchanged in processes(different_layers, how):
        assert "not of the same layers in all processes" in error
        assert "missing" in error
        assert "streamnorm.bind(model, optimizer)" in error
        assert unchanged


def bound(rank: int) -> list[torch.Tensor]:
    """As "unused" above, with the layers named."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.0)
    sn.bind(model, optimizer)
    backward(model if rank == 0 else model[:2])
    assert int(sum(layer.samples for layer in model if isinstance(layer, sn.Norm))) == (8 if rank == 0 else 4)
    optimizer.step()
    return state(model)


def test_named_layers_need_not_be_used(processes: Processes) -> None:
    first, second = processes(bound)
    assert all(a.equal(b) for a, b in zip(first, second))
    assert any(bool(a.any()) for a in first)


def another_start(rank: int) -> list[torch.Tensor]:
    """Only the first process loaded a checkpoint."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.0)
    if rank == 0:
        for layer in model:
            if isinstance(layer, sn.Norm):
                layer.long += 3
    backward(model)
    optimizer.step()
    return state(model)


def test_the_first_agreement_takes_the_first_process_for_true(processes: Processes) -> None:
    first, second = processes(another_start)
    assert all(a.equal(b) for a, b in zip(first, second))
    assert float(first[0].min()) > 1


def one_after_the_other(rank: int) -> list[list[torch.Tensor]]:
    """A training that ends and leaves cycles behind, which are cleared away at another time in each process."""
    gc.disable()
    results = []
    try:
        for _ in range(3):
            model = network()
            cycle: list[Any] = [model]
            cycle.append(cycle)
            optimizer = SGD(model.parameters(), lr=0.01)
            for _ in range(2):
                backward(model)
                optimizer.step()
            results.append(state(model))
            del optimizer
            if rank == 0:
                gc.collect()
    finally:
        gc.enable()
    return results


def test_what_a_finished_training_left_behind_does_not_matter(processes: Processes) -> None:
    first, second = processes(one_after_the_other)
    for ours, theirs in zip(first, second):
        assert all(a.equal(b) for a, b in zip(ours, theirs))


def two_optimizers(rank: int) -> list[torch.Tensor]:
    """As in a GAN: each optimizer's step commits its own layers, of different sizes."""
    generator, critic = network(4), network(7)
    optimizers = [SGD(generator.parameters(), lr=0.01), SGD(critic.parameters(), lr=0.01)]
    for model, optimizer in zip((generator, critic), optimizers):
        backward(model)
        optimizer.step()
    for step in range(4):
        for model in (generator, critic):
            backward(model)
        optimizers[step % 2].step()
        counts = [int(layer.samples) for model in (generator, critic) for layer in model if isinstance(layer, sn.Norm)]
        assert counts[2 * (step % 2)] == 0
        assert counts[2 * (1 - step % 2)] > 0
        optimizers[1 - step % 2].step()
    return state(generator) + state(critic)


def test_two_optimizers(processes: Processes) -> None:
    first, second = processes(two_optimizers)
    assert all(a.equal(b) for a, b in zip(first, second))


def sharded_optimizer(rank: int, affine: bool) -> list[torch.Tensor]:
    """Inside its step each process steps an optimizer over a part of the parameters, each over another part."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # whose import warns

    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(5, 5), sn.StreamingNorm1d(5, affine=affine), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(*blocks)
    trained = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(trained.parameters(), optimizer_class=SGD, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        trained(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        assert all(int(layer.samples) == 0 for layer in model.modules() if isinstance(layer, sn.Norm))
    return [buffer.clone() for buffer in model.buffers()]


@pytest.mark.parametrize("affine", [True, False])
def test_an_optimizer_that_is_sharded(processes: Processes, affine: bool) -> None:
    first, second = processes(sharded_optimizer, affine)
    assert all(a.equal(b) for a, b in zip(first, second))
