"""Mini-batches joined over the processes: as one process with all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.processes import Processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import streamnorm as sn

Results = tuple[list[Tensor], dict[str, Tensor]]

LAYERS: dict[str, Callable[[], sn.Norm]] = {
    "streaming": lambda: sn.StreamingNorm2d(4),
    "constants": lambda: sn.StreamingNorm2d(4, p=2, alpha=(0.6, 0.3, 0.1), beta=(0.5, 0.2, 0.3)),
    "zero": lambda: sn.StreamingNorm2d(4, p=3, center="zero", ref="layer"),
    "present only": lambda: sn.StreamingNorm2d(4, p=2, alpha=(0, 0, 1), beta=(0, 0, 1), ref=("group", 2)),
    "batch": lambda: sn.GeneralBatchNorm(4),
    "batch, L1": lambda: sn.GeneralBatchNorm(4, p=1, ref="layer", momentum=None),
    "framework": lambda: sn.Norm(4, sn.NormRef.batch("channel"), sn.LpMoment(1), None),
}
SIZES = {"equal": [[3, 3], [2, 2]], "unequal": [[1, 4], [5, 2]], "empty": [[3, 0], [0, 2]], "three": [[2, 1, 3]]}


def network(kind: str) -> nn.Sequential:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), LAYERS[kind](), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), LAYERS[kind]())
    for parameter in model[1].parameters():
        nn.init.normal_(parameter)
    return model.double()


def data(sizes: list[list[int]], channels: int = 2) -> list[list[Tensor]]:
    """For each mini-batch, what each process gets of it."""
    generator = torch.Generator().manual_seed(1)
    dtype = torch.float64
    return [[torch.randn(n, channels, 5, 5, generator=generator, dtype=dtype) for n in parts] for parts in sizes]


def masks(sizes: list[list[int]]) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [[torch.rand(n, 5, 5, generator=generator) > 0.3 for n in parts] for parts in sizes]


def joined(rank: int, kind: str, sizes: list[list[int]]) -> Results:
    """Gradients are averaged by DDP; two weight updates of which the first has two mini-batches."""
    model = sn.synchronize(network(kind), "batch")
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    return train(ddp, [parts[rank] for parts in data(sizes)], len(sizes[0]))


def alone(kind: str, sizes: list[list[int]]) -> Results:
    return train(network(kind), [torch.cat(parts) for parts in data(sizes)], 1)


def train(model: nn.Module, batches: list[Tensor], scale: int) -> Results:
    """The gradients of the inputs, and the state. DDP divides gradients by the number of processes: ``scale``."""
    optimizer = SGD(model.parameters(), lr=0.02 * scale)
    gradients = []
    for number, batch in enumerate([*batches, batches[0] * 2]):
        x = batch.clone().requires_grad_()
        model(x).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
        if number > 0:
            optimizer.step()
            optimizer.zero_grad()
    state = getattr(model, "module", model).state_dict()
    return gradients, {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("case", SIZES)
def test_as_one_process(processes: Processes, kind: str, case: str) -> None:
    sizes = SIZES[case]
    results = processes(joined, kind, sizes, world=len(sizes[0]))
    gradients, state = alone(kind, sizes)
    for number, expected in enumerate(gradients):
        parts = torch.cat([own[number] for own, _ in results])
        torch.testing.assert_close(parts, expected, rtol=1e-9, atol=1e-10)
    for _, own in results:
        for name, tensor in state.items():
            torch.testing.assert_close(own[name], tensor, rtol=1e-10, atol=1e-12, msg=name)
        assert all(tensor.equal(results[0][1][name]) for name, tensor in own.items())


def masked(rank: int, sizes: list[list[int]]) -> list[Tensor]:
    layer = sn.synchronize(sn.StreamingNorm2d(2).double(), "batch")
    for parts, keep in zip(data(sizes), masks(sizes)):
        layer(parts[rank].requires_grad_(), keep[rank]).square().sum().backward()
    return [buffer.clone() for buffer in layer.buffers()]


def test_masks(processes: Processes) -> None:
    sizes = SIZES["unequal"]
    layer = sn.StreamingNorm2d(2).double()
    for parts, keep in zip(data(sizes), masks(sizes)):
        layer(torch.cat(parts).requires_grad_(), torch.cat(keep)).square().sum().backward()
    for buffers in processes(masked, sizes):
        for ours, theirs in zip(buffers, layer.buffers()):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def overflowing(rank: int) -> tuple[list[Tensor], bool]:
    """An element that is not finite in one process keeps its index out of the stream in both."""
    layer = sn.synchronize(sn.StreamingNorm1d(3), "batch")
    x = torch.ones(2, 3)
    x[rank, rank] = torch.inf if rank else 1.0
    y = layer(x.requires_grad_())
    y[:, 0].sum().backward()
    return [buffer.clone() for buffer in layer.buffers()], bool(y[:, 1].isfinite().all())


def test_what_is_not_finite(processes: Processes) -> None:
    (first, finite), (second, other_finite) = processes(overflowing)
    assert all(a.equal(b) for a, b in zip(first, second))
    count = first[4]
    assert count.tolist() == [4, 0, 4]
    assert not finite
    assert not other_finite


def evaluated(rank: int) -> tuple[int, bool]:
    """Evaluation and frozen layers ask no other process; so one may do them alone."""
    layer = sn.synchronize(sn.StreamingNorm1d(3), "batch")
    x = torch.randn(4, 3)
    if rank == 0:
        layer.eval()(x)
        layer.train()
        with sn.frozen(layer):
            layer(x)
        return int(layer.samples), True
    return int(layer.samples), True


def test_evaluation_is_local(processes: Processes) -> None:
    assert processes(evaluated, patience=5) == [(0, True), (0, True)]


def one_sample_each(rank: int) -> Tensor:
    torch.manual_seed(rank)
    layer = sn.synchronize(sn.GeneralBatchNorm(3, affine=False), "batch")
    y: Tensor = layer(torch.randn(1, 3))
    return y


def test_one_sample_in_each_process(processes: Processes) -> None:
    """What nn.BatchNorm1d refuses: together they are a mini-batch of two."""
    first, second = processes(one_sample_each)
    torch.testing.assert_close(first, -second)
    torch.testing.assert_close(first.abs(), torch.ones(1, 3), rtol=1e-3, atol=1e-3)


# Without other processes


def test_alone_it_changes_nothing() -> None:
    first, second = sn.StreamingNorm1d(3), sn.synchronize(sn.StreamingNorm1d(3), "batch")
    x = torch.randn(4, 3)
    assert first(x).equal(second(x))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (sn.StreamingNorm1d(3), {"every": "step"}, "'update', 'batch' or 'never', got 'step'"),
        (nn.Linear(2, 2), {}, "Linear holds no layer"),
        (sn.SampleNorm(3), {}, "SampleNorm holds no layer"),
        (sn.GeneralBatchNorm(3, ghosts=2), {"every": "batch"}, "ghosts=2"),
        (nn.Sequential(sn.GRU(3, 4)), {"every": "batch"}, "0 is a GRU"),
    ],
)
def test_what_is_refused(model: nn.Module, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sn.synchronize(model, **arguments)
    assert all(layer._ties.sync.every == "update" for layer in model.modules() if isinstance(layer, sn.Norm))


def two_passes(rank: int, joint: bool) -> list[Tensor]:
    torch.manual_seed(rank)
    layer = sn.synchronize(sn.StreamingNorm2d(4).double(), "batch")
    for _ in range(2):
        x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
        dys = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64)
        y = layer(x)
        if joint:
            y.backward(dys.sum(0))
        else:
            y.backward(dys[0], retain_graph=True)
            y.backward(dys[1])
        sn.commit(layer)
    assert x.grad is not None
    return [x.grad, *(tensor.clone() for tensor in layer.state)]


def test_two_backward_passes_are_one_through_the_sum(processes: Processes) -> None:
    for ours, theirs in zip(processes(two_passes, False), processes(two_passes, True)):
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b)
