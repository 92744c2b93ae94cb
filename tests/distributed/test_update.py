"""One all-reduce per weight update joins the statistics of all layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.processes import Processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import streamnorm as sn

State = dict[str, Tensor]


def network(affine: bool = True, **options: Any) -> nn.Sequential:
    """The same in every process."""
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Linear(3, 4),
        sn.StreamingNorm1d(4, affine=affine, **options),
        nn.ReLU(),
        nn.Linear(4, 6),
        sn.StreamingNorm1d(6, ref=("group", 2), **options),
        nn.Linear(6, 2),
    )
    return model.double()


def batches(sizes: list[list[list[int]]]) -> list[list[list[Tensor]]]:
    """Data for each update, process and mini-batch, of these sizes."""
    generator = torch.Generator().manual_seed(3)
    return [
        [[torch.randn(n, 3, generator=generator, dtype=torch.float64) + 1 for n in process] for process in update]
        for update in sizes
    ]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A sum, so that an empty mini-batch has a loss too."""
    loss: Tensor = model(x).square().sum()
    return loss


def snapshot(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def in_one_process(sizes: list[list[list[int]]], **options: Any) -> list[State]:
    """What the processes do, written out: replicas in one process, gradients averaged, averages weighted by counts."""
    first = network(**options)
    replicas = [first, *(copy.deepcopy(first) for _ in sizes[0][1:])]
    optimizer = torch.optim.SGD(first.parameters(), lr=0.01, momentum=0.9)
    states = []
    for update in batches(sizes):
        for replica, own in zip(replicas, update):
            replica.zero_grad()
            for x in own:
                loss_of(replica, x).backward()
        for together in zip(*(replica.parameters() for replica in replicas)):
            grads = [p.grad for p in together if p.grad is not None]
            together[0].grad = sum(grads[1:], grads[0]) / len(replicas)
        for layers in zip(*(norms(replica) for replica in replicas)):
            for short, count in (("short", "count"), ("short_grad", "grad_count")):
                counts = torch.stack([getattr(layer, count) for layer in layers])
                shorts = torch.stack([getattr(layer, short) for layer in layers])
                weighted = (shorts * counts[:, None]).sum(0) / counts.sum(0).clamp(min=1)
                getattr(layers[0], short).copy_(weighted)
                getattr(layers[0], count).copy_(counts.sum(0))
            for samples in ("samples", "grad_samples"):
                getattr(layers[0], samples).copy_(torch.stack([getattr(layer, samples) for layer in layers]).sum())
        optimizer.step()
        for replica in replicas[1:]:
            replica.load_state_dict(first.state_dict())
        states.append(snapshot(first))
    return states


def norms(model: nn.Module) -> list[sn.Norm]:
    return [module for module in model.modules() if isinstance(module, sn.Norm)]


def with_ddp(rank: int, sizes: list[list[list[int]]], no_sync: bool, options: dict[str, Any]) -> list[State]:
    model = network(**options)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    states = []
    for update in batches(sizes):
        own = update[rank]
        optimizer.zero_grad()
        if no_sync:
            with ddp.no_sync():
                for x in own[:-1]:
                    loss_of(ddp, x).backward()
            loss_of(ddp, own[-1]).backward()
        else:
            for x in own:
                loss_of(ddp, x).backward()
        optimizer.step()
        states.append(snapshot(model))
    return states


def assert_close(ours: State, theirs: State, rtol: float = 1e-12) -> None:
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=rtol, atol=1e-14, msg=name)


def assert_same(results: list[list[State]]) -> None:
    """Every process has the same state after every update, bit for bit."""
    for others in results[1:]:
        for ours, theirs in zip(results[0], others, strict=True):
            assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


SIZES = {
    "one mini-batch": [[[4], [4]]] * 4,
    "unequal": [[[4], [7]], [[1], [5]], [[6], [2]]],
    "accumulated": [[[4, 2, 3], [1, 1, 6]], [[2, 2], [2, 5]]],
    "none for one of them": [[[4], [0]], [[0, 3], [0, 0]], [[0], [5]]],
    "three processes": [[[4], [1], [3]], [[2, 2], [3, 1], [0, 5]]],
}
STREAMS: list[dict[str, Any]] = [
    {"alpha": (0.7, 0.2, 0.1), "beta": (0.6, 0.1, 0.3), "p": 2},
    {"center": "zero"},
    {"affine": False},
]


@pytest.mark.parametrize("no_sync", [True, False], ids=["no_sync", "plain"])
@pytest.mark.parametrize("case", SIZES)
def test_ddp_is_an_exact_merge(processes: Processes, case: str, no_sync: bool) -> None:
    check(processes, SIZES[case], no_sync, {})


@pytest.mark.parametrize("options", STREAMS, ids=["constants", "zero", "no gain"])
def test_every_stream_is_merged(processes: Processes, options: dict[str, Any]) -> None:
    check(processes, SIZES["three processes"], True, options)


def check(processes: Processes, sizes: list[list[list[int]]], no_sync: bool, options: dict[str, Any]) -> None:
    results = processes(with_ddp, sizes, no_sync, options, world=len(sizes[0]))
    assert_same(results)
    for ours, theirs in zip(results[0], in_one_process(sizes, **options), strict=True):
        assert_close(ours, theirs)
