"""DistributedDataParallel: its buffers, its process groups, Join, and what all of it costs."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.processes import Processes
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile

import streamnorm as sn

State = dict[str, Tensor]


def network(norm: Callable[[int], nn.Module] = sn.StreamingNorm1d, depth: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(4, 4), norm(4), nn.Tanh())))


def snapshot(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(tensor.equal(second[name]) for name, tensor in first.items())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


# What it costs


def collectives(rank: int, kind: str) -> dict[str, int]:
    """The collectives of one weight update in its usual form."""
    norms: dict[str, Callable[[int], nn.Module]] = {
        "none": lambda c: nn.Identity(),
        "streaming": sn.StreamingNorm1d,
        "batch": nn.BatchNorm1d,
        "per batch": lambda c: sn.synchronize(sn.StreamingNorm1d(c), "batch"),
    }
    ddp = DistributedDataParallel(network(norms[kind], depth=10))
    optimizer = SGD(ddp.parameters(), lr=0.01)
    for _ in range(3):
        train(ddp, optimizer, torch.randn(3, 4))
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        train(ddp, optimizer, torch.randn(3, 4))
    return dict(Counter(event.name for event in measured.events() if event.name.startswith("gloo:")))


def test_one_collective_for_all_layers(processes: Processes) -> None:
    """SyncBatchNorm makes two for each layer: its statistics in the forward pass, their gradients in the backward."""
    counts = {kind: processes(collectives, kind)[0] for kind in ("none", "streaming", "batch", "per batch")}
    gradients = counts["none"]["gloo:all_reduce"]
    assert gradients >= 1
    assert counts["none"] == {"gloo:all_reduce": gradients}
    assert counts["streaming"] == {"gloo:all_reduce": gradients + 1}
    assert counts["batch"]["gloo:broadcast"] > 0  # DDP, for the running statistics
    assert counts["per batch"] == {"gloo:all_reduce": gradients + 30}


# Buffers


def broadcast(rank: int, how: str) -> tuple[list[str], bool]:
    """The buffers that DDP still broadcasts, and whether a second mini-batch leaves what the first brought."""
    model = nn.Sequential(*network(depth=1), nn.BatchNorm1d(4))
    if how == "used before":
        model(torch.randn(3, 4))
        sn.commit(model)
        sn.reset_stats(model)
    ddp = DistributedDataParallel(model)
    torch.manual_seed(rank)
    for _ in range(2):
        ddp(torch.randn(3, 4)).sum().backward()
    layer = model[1]
    assert isinstance(layer, sn.Norm)
    kept = layer.short.clone()
    model.eval()
    ddp(torch.randn(3, 4))
    others = [torch.empty_like(kept) for _ in range(2)]
    dist.all_gather(others, kept)
    return list(ddp.named_module_buffers), layer.short.equal(kept) and not others[0].equal(others[1])


@pytest.mark.parametrize("how", ["fresh", "used before"])
def test_ddp_does_not_broadcast_our_buffers(processes: Processes, how: str) -> None:
    for names, kept in processes(broadcast, how):
        assert names == ["3.running_mean", "3.running_var", "3.num_batches_tracked"]
        assert kept


def wrapped_again(rank: int) -> list[list[str]]:
    """As trainers do that are called twice."""
    model = network(depth=1)
    names = []
    for _ in range(2):
        ddp = DistributedDataParallel(model)
        train(ddp, SGD(model.parameters(), lr=0.01), torch.randn(3, 4))
        names.append(list(ddp.named_module_buffers))
        del ddp
    return names


def test_a_model_that_is_wrapped_again(processes: Processes) -> None:
    assert processes(wrapped_again) == [[[], []]] * 2


def two_models(rank: int) -> list[int]:
    """Layers without gains belong to the optimizer that trains something else of their model."""
    models = [network(lambda c: sn.StreamingNorm1d(c, affine=False), depth) for depth in (1, 2)]
    ddps = [DistributedDataParallel(model) for model in models]
    optimizers = [SGD(model.parameters(), lr=0.01) for model in models]
    for ddp in ddps:
        ddp(torch.randn(3, 4)).sum().backward()
    optimizers[1].step()
    return [int(model.get_buffer("1.samples")) for model in models]


def test_layers_without_gains(processes: Processes) -> None:
    assert processes(two_models) == [[3, 0], [3, 0]]


def general_batch_norm(rank: int) -> tuple[State, State]:
    results = []
    for norm in (nn.BatchNorm1d, sn.GeneralBatchNorm):
        torch.manual_seed(rank)
        data = torch.randn(3, 5, 4)
        model = network(norm)
        ddp = DistributedDataParallel(model)
        optimizer = SGD(ddp.parameters(), lr=0.01)
        for x in data:
            train(ddp, optimizer, x)
        results.append(snapshot(model))
    return results[0], results[1]


def test_general_batch_norm_keeps_running_statistics_as_batch_norm_does(processes: Processes) -> None:
    for theirs, ours in processes(general_batch_norm):
        assert theirs.keys() == ours.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)


# Process groups


def in_groups(rank: int, how: str) -> State:
    """Processes 0 and 1 train together, process 2 trains alone."""
    pair, alone = dist.new_group([0, 1]), dist.new_group([2])
    group = alone if rank == 2 else pair
    assert group is not None
    model = network()
    optimizer = SGD(model.parameters(), lr=0.0)
    torch.manual_seed(rank)
    if how == "DDP":
        trained: nn.Module = DistributedDataParallel(model, process_group=group)
    else:
        trained = sn.synchronize(model, process_group=group)
    for _ in range(2 + rank // 2):  # a number of updates of its own
        train(trained, optimizer, torch.randn(3, 4))
    return snapshot(model)


@pytest.mark.parametrize("how", ["DDP", "named"])
def test_process_groups(processes: Processes, how: str) -> None:
    first, second, third = processes(in_groups, how, world=3)
    assert same(first, second)
    assert not same(first, third)


def apart(rank: int) -> tuple[State, State]:
    torch.manual_seed(rank)
    data = torch.randn(2, 3, 4)
    results = []
    for every in ("never", "update"):
        model = sn.synchronize(network(), every)
        optimizer = SGD(model.parameters(), lr=0.0)
        for x in data:
            train(model, optimizer, x)
        results.append(snapshot(model))
    return results[0], results[1]


def test_processes_that_train_apart(processes: Processes) -> None:
    (alone, joined), (other_alone, other_joined) = processes(apart)
    assert same(joined, other_joined)
    assert not same(alone, other_alone)
    torch.manual_seed(0)
    data = torch.randn(2, 3, 4)
    model = network()
    optimizer = SGD(model.parameters(), lr=0.0)
    for x in data:
        train(model, optimizer, x)
    assert same(alone, snapshot(model))


def copied(rank: int) -> list[str]:
    group = dist.new_group([0, 1])
    layer = sn.synchronize(sn.StreamingNorm1d(3), "batch", group)
    DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), layer))(torch.randn(2, 3))
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    return [f"{c._ties.sync.every} {c._ties.sync.process_group is group} {c._ties.ddp}" for c in copies]


def test_copies_keep_the_group_and_pickles_leave_it(processes: Processes) -> None:
    assert processes(copied)[0] == ["batch True None", "batch False None"]


def foreign_group(rank: int) -> str:
    group = dist.new_group([0])
    try:
        sn.synchronize(sn.StreamingNorm1d(3), process_group=group)
    except ValueError as error:
        return str(error)
    return ""


def test_a_group_without_this_process_is_refused(processes: Processes) -> None:
    here, elsewhere = processes(foreign_group)
    assert here == ""
    assert "does not contain this process" in elsewhere


# Unequal numbers of mini-batches


def uneven(rank: int, how: str, numbers: list[int]) -> tuple[str, State, list[int]]:
    model = network(depth=2)
    ddp = DistributedDataParallel(model)
    optimizer = SGD(ddp.parameters(), lr=0.01)
    torch.manual_seed(rank)
    contexts: dict[str, Callable[[], Any]] = {
        "ours": lambda: Join([ddp, sn.joinable(ddp)]),
        "DDP alone": ddp.join,
        "wrong order": lambda: Join([sn.joinable(ddp), ddp]),
    }
    samples = []
    try:
        for _ in range(2):
            with contexts[how]():
                for _ in range(numbers[rank]):
                    if how == "ours":
                        with ddp.no_sync():
                            ddp(torch.randn(2, 4)).square().sum().backward()
                    train(ddp, optimizer, torch.randn(3, 4))
                    samples.append(int(model.get_buffer("1.samples")))
    except RuntimeError as error:
        return str(error), {}, []
    return "", snapshot(model), samples


@pytest.mark.parametrize("numbers", [[4, 2], [0, 3], [2, 4, 1]], ids=str)
def test_join(processes: Processes, numbers: list[int]) -> None:
    """A process that has run out of data goes on with the others' weight updates."""
    results = processes(uneven, "ours", numbers, world=len(numbers))
    for error, state, samples in results:
        assert error == ""
        assert same(state, results[0][1])
        assert not any(samples)
    assert bool(results[0][1]["1.long_grad"].any())


@pytest.mark.parametrize("how", ["DDP alone", "wrong order"])
def test_join_without_us_is_an_error(processes: Processes, how: str) -> None:
    errors = [error for error, *_ in processes(uneven, how, [3, 1], patience=5)]
    assert "Join([ddp_model, streamnorm.joinable(ddp_model)])" in errors[0]


def test_joinable_takes_a_ddp_model() -> None:
    with pytest.raises(TypeError, match="got a Linear"):
        sn.joinable(nn.Linear(2, 2))  # type: ignore[arg-type]


# Other ways to a weight update


def by_hand(rank: int) -> bool:
    """``commit`` and ``calibrate`` join, too."""
    torch.manual_seed(rank)
    data = torch.randn(3, 4 + rank, 4, dtype=torch.float64)
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, data)
    whole = torch.cat([part.flatten(0, 1) for part in gathered])
    layer = sn.StreamingNorm1d(4, center="zero", p=2, alpha=(0, 1), kappa=0, dtype=torch.float64)
    for x in data:
        layer(x)
    sn.commit(layer)
    committed = torch.stack((whole.mean(0), whole.square().mean(0)))
    torch.testing.assert_close(layer.long, committed, rtol=1e-12, atol=1e-14)
    layer.long += rank
    sn.calibrate(layer, data)
    torch.testing.assert_close(layer.long, committed, rtol=1e-12, atol=1e-14)
    return True


def test_commit_and_calibrate(processes: Processes) -> None:
    assert processes(by_hand) == [True, True]


def calibrated_in_part(rank: int) -> list[Tensor]:
    """Only the first process reaches the second layer."""
    model = network(depth=2)
    sn.synchronize(model)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, sn.Norm):
                layer.long += 5
    torch.manual_seed(rank)
    sn.calibrate(model, [torch.randn(6, 4)], forward=model if rank == 0 else model[:2])
    return [buffer.clone() for buffer in model.buffers()]


def test_calibrate_takes_what_any_process_has_seen(processes: Processes) -> None:
    first, second = processes(calibrated_in_part)
    assert all(a.equal(b) for a, b in zip(first, second))
    assert float(first[10].max()) < 3  # long of the second layer


def resumed(rank: int) -> bool:
    """Stopped after an update, saved by the first process, loaded by all: it goes on bit for bit."""
    torch.manual_seed(rank)
    data = torch.randn(6, 3, 4)
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    ddp = DistributedDataParallel(model)
    saved: list[Any] = [None]
    for i, x in enumerate(data):
        train(ddp, optimizer, x)
        if i == 2 and rank == 0:
            saved = [copy.deepcopy((model.state_dict(), optimizer.state_dict()))]
    dist.broadcast_object_list(saved)
    other = network()
    other.load_state_dict(saved[0][0])
    again = SGD(other.parameters(), lr=0.01, momentum=0.9)
    again.load_state_dict(saved[0][1])
    ddp = DistributedDataParallel(other)
    for x in data[3:]:
        train(ddp, again, x)
    return same(snapshot(model), snapshot(other))


def test_resume(processes: Processes) -> None:
    assert processes(resumed) == [True, True]


def recurrent(rank: int) -> State:
    torch.manual_seed(2)
    model = nn.ModuleDict({"gru": sn.GRU(3, 4, norm="streaming"), "out": nn.Linear(4, 1)})

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.parts["out"](self.parts["gru"](x)[0])
            return y

    ddp = DistributedDataParallel(Whole())
    optimizer = SGD(ddp.parameters(), lr=0.01)
    torch.manual_seed(rank)
    for length in (5 + rank, 7):
        train(ddp, optimizer, torch.randn(length, 2, 3))
    assert not list(ddp.named_module_buffers)
    return snapshot(model)


def test_recurrent_layers(processes: Processes) -> None:
    first, second = processes(recurrent)
    assert same(first, second)


def skipped(rank: int) -> list[tuple[bool, bool]]:
    """A GradScaler skips a step in all processes when the gradient of one overflows."""
    model = network()
    ddp = DistributedDataParallel(model)
    optimizer = SGD(ddp.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    sn.bind(ddp, optimizer, scaler=scaler)
    seen = []
    for step in range(3):
        optimizer.zero_grad()
        loss = ddp(torch.randn(3, 4)).square().sum()
        scaler.scale(loss * (torch.inf if step == 1 and rank == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        layer = model[1]
        assert isinstance(layer, sn.Norm)
        seen.append((int(layer.samples) == 0, bool(layer.long.isfinite().all() and layer.long_grad.isfinite().all())))
    return seen


def test_a_step_that_is_skipped(processes: Processes) -> None:
    assert processes(skipped) == [[(True, True), (False, True), (True, True)]] * 2
