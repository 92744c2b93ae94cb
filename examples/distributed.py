"""The same training in one process or in several.

Two streaming layers in a small network that learns to tell three clouds of points apart, two samples a mini-batch.
Under torchrun each process sees its share of the data; at each weight update one all-reduce joins the statistics of
all layers, and nothing in the program says so.

    python examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
import torch.distributed.nn  # first imported by DDP, it would hold the process group until Python ends
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import streamnorm as sn

CENTRES = torch.tensor([[2.0, 0.0], [-1.0, 2.0], [-1.0, -2.0]])


def clouds(samples: int) -> TensorDataset:
    """Points about three centres, and which one each belongs to; the same in every process."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (samples,), generator=generator)
    return TensorDataset(CENTRES[labels] + torch.randn(samples, 2, generator=generator), labels)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, 16),
        sn.StreamingNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 16),
        sn.StreamingNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


def train(model: nn.Module, data: TensorDataset, several: bool) -> None:
    trained = DistributedDataParallel(model) if several else model
    loader = DataLoader(data, batch_size=2, sampler=DistributedSampler(data) if several else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for points, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(trained(points), labels).backward()
        optimizer.step()


def statistics(model: nn.Module) -> Tensor:
    """What the layers have learnt of their inputs, as one vector."""
    return torch.cat([layer.long.flatten() for layer in model.modules() if isinstance(layer, sn.Norm)])


def main() -> float:
    """The share of the points that are told apart at the end."""
    several = dist.is_torchelastic_launched()
    if several:
        dist.init_process_group("gloo")
    model, data = network(), clouds(1200)
    train(model, data, several)

    points, labels = data.tensors
    accuracy = (model.eval()(points).argmax(1) == labels).float().mean().item()
    if several:
        theirs = [torch.empty_like(statistics(model)) for _ in range(dist.get_world_size())]
        dist.all_gather(theirs, statistics(model))
        same = all(other.equal(theirs[0]) for other in theirs)
        print(f"process {dist.get_rank()}: accuracy {accuracy:.3f}, statistics {'equal' if same else 'not equal'}")
        gc.collect()  # the group's threads end with its last holder, here the model, and must not outlive Python
        dist.destroy_process_group()
    else:
        print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
