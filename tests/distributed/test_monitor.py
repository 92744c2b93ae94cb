"""Of several processes the first one watches, and sees the statistics of all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.processes import Processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import streamnorm as sn
from streamnorm.insight import Record


def watched(rank: int, folder: str) -> list[float]:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[float] = []
    sink = [lambda sample: seen.append(sample.layers["1"].samples)]
    with sn.monitor(model, every=2, out=folder, sinks=sink) as watching:
        assert watching.running == (rank == 0)
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(2 + rank, 3)).square().mean().backward()
            optimizer.step()
        watching.note("epoch", "one")
    return seen


def diagnosed(rank: int, every: str) -> tuple[list[float], list[float]]:
    """One process looks in the middle of training, the other does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(4), nn.Linear(4, 4), sn.GeneralBatchNorm(4))
    sn.synchronize(model, every)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    drifts = []
    for update in range(4):
        optimizer.zero_grad()
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(2 * update + rank))
        parallel(x).square().mean().backward()
        if rank == 0 and update >= 2:
            drifts.append(sn.diagnose(parallel, x, lambda y: y.square().mean()).layers["1"].drift)
        optimizer.step()
    return model.get_buffer("1.long").flatten().tolist(), drifts


@pytest.mark.parametrize("every", ["update", "batch"])
def test_one_process_may_be_diagnosed_alone(processes: Processes, every: str) -> None:
    (first, drifts), (second, _) = processes(diagnosed, every)
    assert first == second
    assert len(drifts) == 2


def test_the_first_process_watches(processes: Processes, tmp_path: Path) -> None:
    first, second = processes(watched, str(tmp_path))
    assert first == [5, 5, 5, 5], "the samples of both"
    assert second == []
    record = Record.read(tmp_path / "monitor.jsonl")
    assert (record.updates, record.status) == (6, "finished")
