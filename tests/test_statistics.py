"""Statistics: calibrated, frozen, started over."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamnorm as sn


def network(**options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4),
        sn.StreamingNorm1d(4, **options),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Linear(4, 4),
        sn.StreamingNorm1d(4, **options),
    )


def used(model: nn.Module) -> nn.Module:
    """The model after two updates and a half, so that no buffer is what it was at the start."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(5, 3) * 2 + 1).square().mean().backward()
        optimizer.step()
    model(torch.randn(4, 3)).square().mean().backward()
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name]), name


# Calibrate


@pytest.mark.parametrize("sizes", [(24,), (1,) * 24, (5, 1, 10, 8), (23, 1)], ids=str)
@pytest.mark.parametrize("p", [1, 2, 3])
def test_statistics_are_the_average_over_all_data(engine: str, sizes: tuple[int, ...], p: float) -> None:
    """However it is divided. About the mean, the moment is that of the deviations from what had been seen."""
    layer = sn.StreamingNorm2d(4, p=p, center="zero").double()
    layer(torch.randn(3, 4, 2, 2, dtype=torch.float64))
    x = torch.randn(24, 4, 2, 2, dtype=torch.float64) * 2 + 3
    sn.calibrate(layer, x.split(sizes))
    flat = x.movedim(1, 0).reshape(4, -1)
    torch.testing.assert_close(layer.long[0], flat.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.long[1], flat.abs().pow(p).mean(1), rtol=1e-12, atol=1e-12)
    assert not any(buffer.any() for buffer in layer.state[1:-1])
    assert layer.seen == 24


@pytest.mark.parametrize("sizes", [(24,), (1,) * 24, (5, 1, 10, 8)], ids=str)
def test_about_the_mean_the_location_is_exact_too(engine: str, sizes: tuple[int, ...]) -> None:
    layer = sn.StreamingNorm1d(4).double()
    x = torch.randn(24, 4, dtype=torch.float64) * 2 + 3
    sn.calibrate(layer, x.split(sizes))
    torch.testing.assert_close(layer.long[0], x.mean(0), rtol=1e-12, atol=1e-12)
    if len(sizes) == 1:
        torch.testing.assert_close(layer.long[1], (x - x.mean(0)).abs().mean(0), rtol=1e-12, atol=1e-12)


def test_the_average_of_a_second_layer_is_over_what_reaches_it(engine: str) -> None:
    model = network(center="zero").double()
    x = torch.randn(24, 3, dtype=torch.float64)
    inputs = []
    handle = model[5].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    sn.calibrate(model, x.split([4, 1, 19]))
    handle.remove()
    layer: Any = model[5]
    torch.testing.assert_close(layer.long[0], torch.cat(inputs).mean(0), rtol=1e-12, atol=1e-12)


def test_general_batch_norm_averages_over_batches(engine: str) -> None:
    layer = sn.GeneralBatchNorm(4, momentum=0.3).double()
    layer(torch.randn(6, 4, dtype=torch.float64) + 9)
    batches = torch.randn(24, 4, dtype=torch.float64).split(8)
    sn.calibrate(layer, batches)
    torch.testing.assert_close(layer.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert layer.momentum == 0.3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_modes_and_constants_come_back(engine: str, training: bool, fails: bool) -> None:
    model = used(network(window=7)).train(training)
    first, second = model[1], model[5]  # type: ignore[index]
    sn.freeze(second)
    second.train(not training)
    streams, formulas = (first.stream, second.stream), (first.formula, second.formula)

    def batches() -> Iterator[Tensor]:
        yield torch.randn(4, 3)
        if fails:
            raise KeyboardInterrupt
        yield torch.randn(2, 3)

    before = snapshot(model)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            sn.calibrate(model, batches())
        assert_unchanged(model, before)
    else:
        sn.calibrate(model, batches())
        assert not first.long.equal(before["1.long"])
        assert not second.long.equal(before["5.long"])  # a frozen layer is calibrated as well
    assert [module.training for module in model.children()] == [*[training] * 5, not training]
    assert model.training == training
    assert (first.stream, second.stream) == streams
    assert (first.formula, second.formula) == formulas
    assert (first.frozen, second.frozen) == (False, True)


def test_the_rest_of_the_model_evaluates_and_parameters_stay(engine: str) -> None:
    """Dropout and a Batch Normalization beside ours, which collects nothing."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), sn.StreamingNorm1d(4), nn.Dropout(0.9))
    modes = []
    model[3].register_forward_hook(lambda module, args, y: modes.append(module.training))
    before = snapshot(model)
    sn.calibrate(model, [torch.randn(5, 3)])
    assert modes == [False]
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {"2.long", "2.seen"}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_a_mini_batch_may_be() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = sn.StreamingNorm1d(3)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            y: Tensor = self.norm(x * scale)
            return y

    x = torch.randn(6, 3)
    forms: list[tuple[Any, Any]] = [
        (x, None),
        ((x, "target"), None),
        ([x, "target"], None),
        ({"x": x, "scale": 1.0}, None),
        ({"image": x}, lambda model: lambda batch: model(batch["image"])),
    ]
    for batch, forward in forms:
        model = Named()
        sn.calibrate(model, [batch], forward and forward(model))
        torch.testing.assert_close(model.norm.long[0], x.mean(0))


def test_a_layer_that_saw_nothing_keeps_its_statistics(engine: str) -> None:
    """A branch that these mini-batches do not take, or whose elements are all masked."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.taken, self.other = sn.StreamingNorm1d(3), sn.StreamingNorm1d(3)
            self.masked, self.running = sn.StreamingNorm1d(3), sn.GeneralBatchNorm(3)

        def forward(self, x: Tensor, everything: bool = False) -> Tensor:
            x = self.taken(x) + self.masked(x, None if everything else torch.zeros(len(x), dtype=torch.bool))
            return self.running(self.other(x)) if everything else x

    model = Branches()
    model(torch.randn(4, 3) + 2, everything=True)
    before = snapshot(model)
    sn.calibrate(model, [torch.randn(5, 3)])
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {
        "taken.long",
        "taken.short",
        "taken.count",
        "taken.samples",
        "taken.seen",
    }  # committed, and so cleared


def test_a_dropout_inside_a_layer_evaluates_too() -> None:
    """What follows in the model sees what it sees in evaluation."""
    layer = sn.StreamingNormAct2d(4, drop=nn.Dropout(0.5))
    model = nn.Sequential(layer, sn.StreamingNorm2d(4)).double()
    x = torch.randn(20, 4, 3, 2, dtype=torch.float64)
    sn.calibrate(model, [x])
    assert layer.drop.training
    seen = layer.eval()(x)
    torch.testing.assert_close(model[1].get_buffer("long")[0], seen.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [sn.RNN, sn.GRU, sn.LSTM])
def test_time_steps_with_statistics_of_their_own(make: Any) -> None:
    """Those that no sequence reaches keep what they had."""
    layer = make(3, 4, norm="batch-per-step", max_steps=5)
    layer(torch.randn(5, 6, 3))
    norm = layer.norm_ih_l0
    before = snapshot(norm)
    batches = [torch.randn(3, 6, 3) * 2 + 1 for _ in range(4)]
    sn.calibrate(layer, batches)
    assert norm.num_batches_tracked.tolist() == [4, 4, 4, 1, 1]
    for name in ("running_mean", "running_var"):
        assert norm.get_buffer(name)[3:].equal(before[name][3:])
    products = torch.stack([batch @ layer.weight_ih_l0.T for batch in batches])  # (batches, T, N, features)
    torch.testing.assert_close(norm.running_mean[:3], products.mean((0, 2)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batches", [[], iter(())], ids=["list", "iterator"])
def test_no_mini_batch_is_refused(batches: Any) -> None:
    model = used(network())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"no mini-batches.*used up"):
        sn.calibrate(model, batches)
    assert_unchanged(model, before)


def test_a_model_without_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Sequential holds no layer with statistics.*streamnorm\.convert"):
        sn.calibrate(nn.Sequential(nn.BatchNorm1d(3), sn.SampleNorm(3)), [torch.randn(2, 3)])


# Freeze


def test_frozen_training_is_evaluation(engine: str) -> None:
    model = used(network())
    model[2].p = 0.0  # type: ignore[index]
    x = torch.randn(6, 3)
    expected = copy.deepcopy(model).eval()(x)
    assert sn.freeze(model) is model
    before = snapshot(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert_unchanged(model, before)


def test_freezing_survives_train(engine: str) -> None:
    model = sn.freeze(used(network()))
    before = snapshot(model)
    model.eval()
    model.train()
    model(torch.randn(6, 3)).sum().backward()
    assert_unchanged(model, before)
    assert model.training


def test_gain_and_bias_go_on_learning(engine: str) -> None:
    model = sn.freeze(used(network()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    model(torch.randn(6, 3)).square().mean().backward()
    gain = model.get_parameter("1.weight").clone()
    optimizer.step()
    assert not model.get_parameter("1.weight").equal(gain)


def test_unfreeze_lets_them_collect_again(engine: str) -> None:
    model = sn.unfreeze(sn.freeze(network()))
    model(torch.randn(6, 3))
    assert [int(layer.samples) for layer in (model[1], model[5])] == [6, 6]  # type: ignore[index]


def test_frozen_for_a_while(engine: str) -> None:
    model = network()
    first, second = model[1], model[5]
    assert isinstance(first, sn.Norm)
    assert isinstance(second, sn.Norm)
    sn.freeze(second)
    with sn.frozen(model) as same:
        assert same is model
        assert (first.frozen, second.frozen) == (True, True)
        with sn.frozen(model):
            model(torch.randn(6, 3))
        assert (first.frozen, second.frozen) == (True, True)  # the inner block ends no freeze but its own
        model(torch.randn(6, 3))
    assert (first.frozen, second.frozen) == (False, True)
    assert int(first.samples) == 0


def test_an_exception_ends_a_frozen_block() -> None:
    model = network()
    with pytest.raises(KeyError), sn.frozen(model):
        raise KeyError
    assert not any(layer.frozen for layer in model if isinstance(layer, sn.Norm))


def test_a_frozen_layer_has_second_derivatives(engine: str) -> None:
    """The error that refuses them elsewhere says so."""
    layer = sn.freeze(sn.StreamingNorm1d(3)).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


def test_a_frozen_general_batch_norm(engine: str) -> None:
    layer = sn.GeneralBatchNorm(4, ghosts=2)
    layer(torch.randn(6, 4) + 1)
    x = torch.randn(3, 4)
    expected = copy.deepcopy(layer).eval()(x)
    before = snapshot(layer)
    torch.testing.assert_close(sn.freeze(layer)(x), expected, rtol=0, atol=0)
    assert_unchanged(layer, before)


def test_freezing_goes_along_with_a_copy() -> None:
    assert copy.deepcopy(sn.freeze(sn.StreamingNorm1d(3))).frozen
    assert "frozen" in repr(sn.freeze(sn.StreamingNorm1d(3)))
    assert "frozen" not in repr(sn.StreamingNorm1d(3))


# Reset


def test_reset_brings_the_start_back(engine: str) -> None:
    model, fresh = used(network()), network()
    parameters = [parameter.clone() for parameter in model.parameters()]
    sn.reset_stats(model)
    for ours, theirs in zip(model.buffers(), fresh.buffers()):
        assert ours.equal(theirs)
    for parameter, before in zip(model.parameters(), parameters):
        assert parameter.equal(before)


def test_reset_parameters_resets_everything() -> None:
    layer, fresh = sn.GeneralBatchNorm(4), sn.GeneralBatchNorm(4)
    layer(torch.randn(6, 4) + 1).sum().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(3)
    layer.reset_parameters()
    assert_unchanged(layer, snapshot(fresh))


def test_reset_takes_models_without_statistics() -> None:
    model = nn.Sequential(sn.SampleNorm(3), nn.BatchNorm1d(3))
    sn.reset_stats(model)
    assert torch.isfinite(model(torch.randn(4, 3))).all()


@pytest.mark.parametrize("hidden", [math.nan, math.inf])
def test_a_calibration_that_meets_no_finite_values_changes_nothing(hidden: float) -> None:
    model = nn.Sequential(nn.Identity(), sn.StreamingNorm1d(3))
    sn.calibrate(model, [torch.randn(20, 3) + 5])
    before = copy.deepcopy(model.state_dict())
    batches = [torch.randn(4, 3) for _ in range(3)]
    for batch in batches:
        batch[0, 1] = hidden
    with pytest.raises(
        ValueError, match=r"^1 \(StreamingNorm1d\) met no finite values in 1 of its 3 statistics: look for"
    ):
        sn.calibrate(model, batches)
    for name, value in model.state_dict().items():
        assert value.equal(before[name]), name


def test_a_calibration_passes_over_a_mini_batch_that_is_not_finite() -> None:
    layer, batches = sn.StreamingNorm1d(3), [torch.randn(4, 3) for _ in range(3)]
    sn.calibrate(layer, batches[1:])
    expected = copy.deepcopy(layer.state_dict())
    sn.calibrate(layer, [torch.full((4, 3), math.nan), *batches[1:]])
    assert layer.seen == expected.pop("seen") + 4
    for name, value in expected.items():
        torch.testing.assert_close(layer.state_dict()[name], value, msg=name)


def test_a_place_that_a_mask_hides_in_every_mini_batch_is_no_error() -> None:
    layer = sn.StreamingNorm1d(2, ref=sn.NormRef.of("n c l -> c l", l=3))
    mask = torch.tensor([True, True, False]).expand(4, 3)
    sn.calibrate(layer, [torch.randn(4, 2, 3) + 5], lambda x: layer(x, mask))
    assert (layer.long[0].view(2, 3)[:, :2] > 3).all()
