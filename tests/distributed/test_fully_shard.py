"""FSDP2: models whose parameters are sharded over the processes train, save and load."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from support.processes import Processes
from torch import Tensor, nn

import streamnorm as sn

State = dict[str, Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Sequential(nn.Linear(3, 8), sn.StreamingNorm1d(8), nn.ReLU()),
        nn.Sequential(nn.Linear(8, 8), sn.StreamingNorm1d(8), nn.ReLU()),
        nn.Linear(8, 2),
    ).double()


def batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(3, 3, generator=generator, dtype=torch.float64)


def train(model: nn.Module, rank: int, steps: range) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in steps:
        for part in range(2):
            model(batch(2 * step + part, rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole_state(model: nn.Module) -> State:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: tensor.clone() for name, tensor in state.items()}


def sharded(rank: int, groups: bool) -> tuple[State, list[str], State, State]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if groups:  # Process 0 trains a model of its own. PyTorch keeps meshes: [0, 1] would be that of another test.
        alone, pair = (DeviceMesh("cpu", ranks) for ranks in ([0], [1, 2]))
        mesh = pair if rank else alone
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def shard(model: nn.Sequential) -> nn.Sequential:
        for block in (model[0], model[1]):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    model = shard(network())
    train(model, rank, range(4 + (groups and rank == 0)))
    kinds = sorted({type(parameter).__name__ for parameter in model.parameters()})
    state = whole_state(model)
    if groups:
        return state, kinds, {}, {}

    # Saved after four weight updates, loaded into another model, two more: as six.
    other = shard(network())
    saved: Any = whole_state(model)
    set_model_state_dict(other, saved, options=StateDictOptions(full_state_dict=True))
    train(other, rank, range(4, 6))
    train(model, rank, range(4, 6))
    resumed, went_on = whole_state(other), whole_state(model)
    assert resumed.keys() == went_on.keys()
    assert all(tensor.equal(went_on[name]) for name, tensor in resumed.items())

    ddp = DistributedDataParallel(network())
    train(ddp, rank, range(4))
    return state, kinds, whole_state(ddp.module), went_on


def test_fully_shard_trains_and_saves(processes: Processes) -> None:
    """As DistributedDataParallel does, and what it saves is a model for one process."""
    results = processes(sharded, False)
    for state, kinds, ddp, _ in results:
        assert kinds == ["DTensor"]
        assert state.keys() == ddp.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, ddp[name], rtol=1e-10, atol=1e-12, msg=name)
    model = network()
    model.load_state_dict(results[0][0])
    assert model.eval()(batch(0, 0)).isfinite().all()
    assert bool(model.get_buffer("0.1.long_grad").any())


def test_the_mesh_is_the_group(processes: Processes) -> None:
    first, second, third = (state for state, *_ in processes(sharded, True, world=3))
    buffers = [name for name in first if "long" in name]
    assert buffers
    assert all(second[name].equal(third[name]) for name in buffers)
    assert not any(first[name].equal(second[name]) for name in buffers)
