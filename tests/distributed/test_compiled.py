"""Compiled models in several processes: what is joined in eager mode is joined there too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.processes import Processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import streamnorm as sn

State = dict[str, Tensor]


class Network(nn.Module):
    """No bare nn.Sequential, which torch.compile takes apart."""

    def __init__(self, width: int = 4, norm: Callable[[int], nn.Module] = sn.StreamingNorm1d) -> None:
        super().__init__()
        torch.manual_seed(1)
        parts = (part for _ in range(2) for part in (nn.Linear(width, width), norm(width), nn.Tanh()))
        self.body = nn.Sequential(*parts).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    result: Any = torch.compile(model, backend="aot_eager", **options)
    return result


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


Compile = Callable[[nn.Module], nn.Module]
WRAPPED: dict[str, Callable[[nn.Module, Compile], nn.Module]] = {
    "DDP(compile)": lambda model, compile: DistributedDataParallel(compile(model)),
    "compile(DDP)": lambda model, compile: compile(DistributedDataParallel(model)),
    # torch.compile makes a graph of its own for each bucket of gradients, of a megabyte or more.
    "compile(DDP), buckets": lambda model, compile: compile(DistributedDataParallel(model, bucket_cap_mb=1.0)),
    "compile(fully_shard)": lambda model, compile: compile(sharded(model)),
    "compile": lambda model, compile: compile(model),
}


def train(trained: nn.Module, model: nn.Module, rank: int, sizes: list[list[int]], rate: float = 0.05) -> State:
    """Two weight updates of two mini-batches; between these the statistics of the processes differ."""
    optimizer = SGD(model.parameters(), lr=rate)
    data = torch.Generator().manual_seed(rank)
    width = next(model.parameters()).shape[-1]
    for _ in range(2):
        for parts in sizes:
            x = torch.randn(parts[rank], width, generator=data, dtype=torch.float64)
            trained(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {name: getattr(tensor, "full_tensor", tensor.clone)() for name, tensor in model.state_dict().items()}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def both(rank: int, how: str, sizes: list[list[int]], width: int) -> tuple[State, State]:
    torch.compiler.reset()
    rate = 0.0 if how == "compile" else 0.05  # there nobody averages the gradients
    results = []
    for compile in (compiled, lambda model: model):
        model = Network(width)
        results.append(train(WRAPPED[how](model, compile), model, rank, sizes, rate))
    return results[0], results[1]


def assert_joined(results: list[tuple[State, State]]) -> None:
    """Compiled as eager, and the same in all processes."""
    first = results[0][0]
    assert bool(first["body.1.long_grad"].any())
    for ours, eager in results:
        for name, tensor in eager.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-11, msg=name)
            assert ours[name].equal(first[name]), name


@pytest.mark.parametrize(
    ("how", "sizes", "width"),
    [
        ("DDP(compile)", [[3, 5], [3, 4]], 4),
        ("compile(DDP)", [[3, 5], [3, 0]], 4),
        ("compile(DDP), buckets", [[3, 3], [3, 3]], 600),
        ("compile(fully_shard)", [[3, 3], [3, 3]], 4),
        ("compile", [[3, 5], [3, 5]], 4),
    ],
    ids=str,
)
def test_statistics_are_joined(processes: Processes, how: str, sizes: list[list[int]], width: int) -> None:
    assert_joined(processes(both, how, sizes, width, patience=300))


def per_batch(rank: int) -> tuple[State, State]:
    """``every="batch"``, said to one of the models when its graph is there already."""
    torch.compiler.reset()
    eager = Network()
    model = Network()
    trained = compiled(model)
    with torch.no_grad():
        trained(torch.ones(5, 4, dtype=torch.float64))
    sn.reset_stats(model)
    results = []
    for run, each in ((trained, model), (eager, eager)):
        sn.synchronize(each, "batch")
        results.append(train(run, each, rank, [[3, 5], [3, 4]], 0.0))
    return results[0], results[1]


def test_joined_mini_batches_stay_outside_of_the_graph(processes: Processes) -> None:
    assert_joined(processes(per_batch, patience=300))


@pytest.mark.parametrize(
    "layer", [sn.StreamingNorm1d(4), sn.GeneralBatchNorm(4)], ids=lambda layer: type(layer).__name__
)
def test_joined_mini_batches_are_no_part_of_a_full_graph(layer: sn.Norm) -> None:
    """Also alone, so that it is found out before the training on many machines."""
    model = compiled(nn.Sequential(sn.synchronize(layer, "batch")), fullgraph=True)
    with pytest.raises(Exception, match=r"waits for other processes inside the layer.*leave fullgraph=True out"):
        model(torch.randn(3, 4))
    model.eval()(torch.randn(3, 4))
