"""Averages of weights over training (torch.optim.swa_utils): what becomes of the statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import streamnorm as sn

DECAY = 0.75


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def trained(model: nn.Module, after_step: Callable[[], None], mini_batches: int = 1) -> list[Tensor]:
    """Four updates of a hand-written loop; the inputs."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = []
    for _ in range(4):
        for _ in range(mini_batches):
            inputs.append(torch.randn(5, 3))
            model(inputs[-1]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step()
    return inputs


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def exponential(snapshots: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    average = dict(snapshots[0])
    for state in snapshots[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * state[name] for name in state}
    return average


def uniform(snapshots: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(state[name] for state in snapshots) / len(snapshots) for name in snapshots[0]}  # type: ignore[misc]


AVERAGES: list[tuple[dict[str, Any], Any]] = [
    ({}, uniform),
    ({"avg_fn": swa_utils.get_swa_avg_fn()}, uniform),
    ({"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(DECAY)}, exponential),
    ({"avg_fn": swa_utils.get_ema_avg_fn(DECAY)}, exponential),
]
AVERAGE_IDS = ["default", "swa", "ema foreach", "ema"]


@pytest.mark.parametrize(("how", "expected"), AVERAGES, ids=AVERAGE_IDS)
@pytest.mark.parametrize("mini_batches", [1, 3])
def test_with_buffers_weights_and_statistics_are_averaged_alike(
    how: dict[str, Any], expected: Callable[..., dict[str, Tensor]], mini_batches: int
) -> None:
    """The whole state is the average of the states after each step; counts, whole numbers, are zero in all of them."""
    model = network()
    average = swa_utils.AveragedModel(model, use_buffers=True, **how)
    snapshots: list[dict[str, Tensor]] = []

    def after_step() -> None:
        average.update_parameters(model)
        snapshots.append(snapshot(model))

    trained(model, after_step, mini_batches)
    state = average.module.state_dict()
    averages = expected(snapshots)
    assert 0 < state["1.seen"] <= snapshots[-1]["1.seen"]  # PyTorch averages whole numbers, and cuts them off
    del averages["1.seen"]
    for name, tensor in averages.items():
        torch.testing.assert_close(state[name], tensor.to(state[name].dtype), msg=name)
    assert not state["1.short"].any()
    assert int(state["1.samples"]) == int(state["1.count"].sum()) == 0
    assert not state["1.long"].equal(model.state_dict()["1.long"])


def test_without_buffers_the_statistics_are_those_of_the_model() -> None:
    model = network()
    average = swa_utils.AveragedModel(model)
    trained(model, lambda: average.update_parameters(model))
    for ours, theirs in zip(average.module.buffers(), model.buffers()):
        assert ours.equal(theirs)
    assert not average.module.get_parameter("0.weight").equal(model.get_parameter("0.weight"))


def test_the_average_evaluates_by_its_own_statistics() -> None:
    model = network()
    average = swa_utils.AveragedModel(model, use_buffers=True)
    trained(model, lambda: average.update_parameters(model))
    x = torch.randn(6, 3)
    plain = network().eval()
    plain.load_state_dict(average.module.state_dict())
    assert average.eval()(x).equal(plain(x))
    assert not average(x).equal(model.eval()(x))


def test_training_does_not_reach_the_average() -> None:
    """It is no model of any optimizer: steps between two updates of the average leave it as it is."""
    model = network()
    average = swa_utils.AveragedModel(model, use_buffers=True)
    trained(model, lambda: average.update_parameters(model))
    before = snapshot(average)
    trained(model, lambda: None)
    for name, tensor in average.state_dict().items():
        assert tensor.equal(before[name]), name


def test_calibrate_does_for_an_average_what_update_bn_does() -> None:
    """``update_bn`` knows Batch Normalization alone. The statistics afterwards are those of the averaged weights."""
    model = network()
    average = swa_utils.AveragedModel(model)
    inputs = trained(model, lambda: average.update_parameters(model))
    before = snapshot(average)
    swa_utils.update_bn(inputs, average)
    for name, tensor in average.state_dict().items():
        assert tensor.equal(before[name]), name

    by_hand = network()
    by_hand.load_state_dict({name.removeprefix("module."): t for name, t in before.items() if name != "n_averaged"})
    sn.calibrate(by_hand, inputs)
    sn.calibrate(average, inputs)
    for name, tensor in by_hand.state_dict().items():
        assert tensor.equal(average.module.state_dict()[name]), name
    everything = average.module.get_submodule("0")(torch.cat(inputs))
    torch.testing.assert_close(average.module.get_buffer("1.long")[0], everything.mean(0), rtol=1e-5, atol=1e-6)


def test_batch_normalization_beside_it_is_served_by_update_bn() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), sn.StreamingNorm1d(4))
    inputs = [torch.randn(5, 3) for _ in range(3)]
    swa_utils.update_bn(inputs, model)
    sn.calibrate(model, inputs)
    torch.testing.assert_close(model.get_buffer("1.running_mean"), model[0](torch.cat(inputs)).mean(0))
    assert int(model.get_buffer("1.num_batches_tracked")) == 3


def test_swa_lr_and_a_whole_stochastic_weight_average() -> None:
    """The loop of PyTorch's documentation, with ``calibrate`` in the place of ``update_bn``."""
    runs = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        model = network()
        inputs = [torch.randn(5, 3) for _ in range(6)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        average = swa_utils.AveragedModel(model)
        rates, states = [], []
        for x in inputs:
            rates.append(optimizer.param_groups[0]["lr"])
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            states.append(snapshot(model))
            if not by_hand:
                average.update_parameters(model)
        if by_hand:
            result = network()
            mean = uniform(states)
            result.load_state_dict({name: t.to(states[0][name].dtype) for name, t in mean.items()})
        else:
            result = average.module  # type: ignore[assignment]
        sn.calibrate(result, inputs)
        runs.append(result.state_dict())
    for name, tensor in runs[0].items():
        torch.testing.assert_close(tensor, runs[1][name], msg=name)
