"""Adapting in evaluation: statistics follow the data, and nothing else moves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import streamnorm as sn

FORWARD = {"long", "short", "count", "samples"}


def trained() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(4), nn.ReLU(), nn.Linear(4, 4), sn.StreamingNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
    return model.eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not value.equal(before[name])}


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("window", [None, 20])
def test_one_forward_is_a_use_and_a_commit(engine: str, samples: int, window: float | None) -> None:
    layer = sn.StreamingNorm1d(4, scale="raw").double().eval()
    torch.nn.init.uniform_(layer.long, 1, 2)
    long, x, w = layer.long.clone(), torch.randn(samples, 4, dtype=torch.float64), window or 200
    with sn.adapt(layer) if window is None else sn.adapt(layer, window):
        y = layer(x)
    mu = torch.lerp(long[0], x.mean(0), samples / (w + samples))
    b_m = (x - mu).abs().mean(0)
    m = torch.lerp(long[1], b_m, samples / (w + samples))
    torch.testing.assert_close(y, (x - mu) / (m**2 + layer.eps).sqrt())
    torch.testing.assert_close(layer.long, torch.lerp(long, torch.stack((x.mean(0), b_m)), samples / (w + samples)))
    assert int(layer.samples) == 0


def test_only_forward_statistics_move(engine: str) -> None:
    model = trained()
    before = state(model)
    with sn.adapt(model):
        model(torch.randn(6, 3) + 2).sum().backward()
    assert changed(model, before) == {"1.long", "4.long"}
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_after_the_block_evaluation_is_fixed_again(engine: str) -> None:
    model = trained()
    with sn.adapt(model) as adaptation:
        model(torch.randn(6, 3) + 2)
    before = state(model)
    model(torch.randn(6, 3))
    assert not changed(model, before)
    adaptation.stop()


def test_without_a_block_it_goes_on_until_it_is_stopped(engine: str) -> None:
    model = trained()
    adaptation = sn.adapt(model)
    assert "adapting" in repr(model)
    model.train()
    model.eval()
    before = state(model)
    model(torch.randn(1, 3))
    assert changed(model, before)
    adaptation.stop()
    before = state(model)
    model(torch.randn(1, 3))
    assert not changed(model, before)


def test_it_follows_a_drift_and_reaches_what_calibration_finds(engine: str) -> None:
    model = trained()
    data = torch.randn(600, 3) * 3 + 4
    target = copy.deepcopy(model)
    sn.calibrate(target, data.split(100))
    off = [(model(data) - target(data)).abs().mean().item()]
    with sn.adapt(model, window=60):
        for x in data.split(1):
            model(x)
    off.append((model(data) - target(data)).abs().mean().item())
    assert off[1] < 0.5 * off[0]  # 60 samples of memory are no average over all


def test_frozen_layers_and_training_are_left_alone(engine: str) -> None:
    model = trained()
    sn.freeze(model[1])
    before = state(model)
    with sn.adapt(model):
        model(torch.randn(6, 3) + 2)
        assert changed(model, before) == {"4.long"}
        model.train()
        model(torch.randn(6, 3))
        assert int(model.get_buffer("4.samples")) == 6


def test_padding_is_kept_out(engine: str) -> None:
    layer, twin = sn.StreamingNorm1d(4).eval(), sn.StreamingNorm1d(4).eval()
    x = torch.randn(5, 4)
    with sn.adapt(layer), sn.adapt(twin):
        y = layer(torch.cat((x, torch.full((2, 4), math.inf))), torch.arange(7) < 5)
        torch.testing.assert_close(y[:5], twin(x))
    torch.testing.assert_close(layer.long, twin.long)


def test_a_recurrent_layer_adapts_step_by_step(engine: str) -> None:
    layer = sn.GRU(3, 4).eval()
    before = state(layer)
    with sn.adapt(layer):
        layer(torch.randn(5, 1, 3) + 2)
    assert changed(layer, before) == {"norm_ih_l0.long", "norm_hh_l0.long"}


@pytest.mark.parametrize("window", [0, -1.0, math.nan])
def test_a_window_that_is_none_is_refused(window: float) -> None:
    model = trained()
    with pytest.raises(ValueError, match="window is a memory in samples"):
        sn.adapt(model, window)
    assert "adapting" not in repr(model)


def test_a_model_without_a_stream_is_refused() -> None:
    with pytest.raises(ValueError, match=r"BatchNorm1d holds no streaming layer to adapt.*convert"):
        sn.adapt(nn.BatchNorm1d(3))


def test_a_compiled_model_is_refused() -> None:
    model = trained()
    with sn.adapt(model), pytest.raises(Exception, match="call the model itself"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(2, 3))


def test_drift_is_the_distance_in_deviations_of_the_start(engine: str) -> None:
    layer = sn.StreamingNorm1d(2, p=2, eps=0.0).eval()
    layer.long.copy_(torch.tensor([[1.0, -1.0], [4.0, 0.25]]))
    with sn.adapt(layer) as adaptation:
        assert adaptation.drift == 0
        layer.long.copy_(torch.tensor([[3.0, -1.0], [4.0, 1.0]]))  # one deviation each: of the mean, of the scale
        assert adaptation.drift == pytest.approx(1)
        adaptation.restore()
        assert adaptation.drift == 0
        layer(torch.full((1, 2), 100.0))
        assert adaptation.drift > 0


def feed(model: nn.Module, inputs: Tensor) -> None:
    for x in inputs:
        model(x)


def test_drift_of_a_model_is_that_of_its_farthest_layer() -> None:
    model = trained()
    last = model[4]
    assert isinstance(last, sn.StreamingNorm1d)
    with sn.adapt(model) as adaptation:
        last.long[0] += 7 * (last.eval_stats()[1] + last.eps).sqrt()
        assert adaptation.drift == pytest.approx(7, rel=1e-5)


@pytest.mark.parametrize("copied", [False, True])
def test_an_adaptation_that_goes_too_far_undoes_itself(engine: str, copied: bool) -> None:
    model = trained()
    before, adaptation = state(model), sn.adapt(model, window=10, max_drift=3)
    if copied:
        model = copy.deepcopy(model)  # which has a safeguard of its own
    feed(model, torch.randn(64, 1, 3))
    assert "adapting" in repr(model)
    words = r"adapt has ended: the statistics of 1 \(StreamingNorm1d\) moved .* is 3\."
    with pytest.warns(RuntimeWarning, match=words):
        feed(model, 1000 * torch.randn(16, 1, 3))
    assert not changed(model, before)
    assert "adapting" not in repr(model)
    assert adaptation.drift == 0 or copied


def test_a_safeguard_without_a_name() -> None:
    layer = sn.StreamingNorm1d(2).eval()
    sn.adapt(layer, max_drift=1)
    with pytest.warns(RuntimeWarning, match="the statistics of StreamingNorm1d moved"):
        feed(layer, torch.full((16, 1, 2), 1e6))


@pytest.mark.parametrize("wrong", [0, -1.0, math.nan])
def test_a_safeguard_that_could_never_hold(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"max_drift is a number of deviations above 0, or None .*, got"):
        sn.adapt(sn.StreamingNorm1d(2), max_drift=wrong)
