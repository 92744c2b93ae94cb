"""Readings, held against the definitions written out for one channel of one layer at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamnorm as sn
from streamnorm.insight.readings import Reader, Reading
from streamnorm.layers import Norm, streaming_layers


def plain_reading(layer: Norm, before: Tensor, share: float) -> dict[str, float]:
    """What a reading says of a layer that is about to commit: ``before`` are the long-term statistics of the last
    reading after its commit, ``share`` is what was replaced since then."""
    state, formula = layer.state, layer.formula
    alike = layer.ref.num_stats(layer.num_features)
    _, beta, kappa = formula.weights(int(state.samples), int(state.grad_samples), int(state.seen))
    short_share = beta[1] + beta[2]

    def sigma(m: float) -> float:
        return float(formula.k * max(m, 0.0) ** (1 / formula.p))

    drifts, mus, sigmas, streamed, present = [], [], [], [], []
    for g in range(alike):
        mu, m = (float(kappa[0] * state.long[row, g] + kappa[1] * state.short[row, g]) for row in (0, 1))
        old_mu, old_m = float(before[0, g]), float(before[1, g])
        in_mu, in_m = old_mu + (mu - old_mu) / share, old_m + (m - old_m) / share
        s = math.sqrt(sigma(old_m) ** 2 + formula.eps)
        drifts.append(math.hypot(in_mu - old_mu, sigma(in_m) - sigma(old_m)) / s)
        mus.append(mu)
        sigmas.append(sigma(m))
        unit = math.sqrt(sigma(float(state.long[1, g])) ** 2 + formula.eps) if formula.window is not None else 1.0
        slope = formula.p * float(state.long[1, g]) ** ((formula.p - 1) / formula.p)
        now = [float(state.short_grad[row, g]) for row in (0, 1)]
        mixed = [float(beta[0] * state.long_grad[row, g] + short_share * state.short_grad[row, g]) for row in (0, 1)]
        streamed.append(math.hypot(mixed[0] / unit, slope * mixed[1] / unit**formula.p))
        present.append(math.hypot(now[0] / unit, slope * now[1] / unit**formula.p))

    def rms(values: Sequence[float]) -> float:
        return math.sqrt(sum(v * v for v in values) / len(values))

    def rank(values: Sequence[float], q: float) -> float:
        return sorted(values)[round(q * (len(values) - 1))]

    return {
        **{f"location{end}": rank(mus, q) for end, q in (("_low", 0.05), ("", 0.5), ("_high", 0.95))},
        **{f"scale{end}": rank(sigmas, q) for end, q in (("_low", 0.05), ("", 0.5), ("_high", 0.95))},
        "drift": rms(drifts),
        "drift_worst": max(drifts),
        "worst": drifts.index(max(drifts)),
        "replaced": 1 - kappa[0],
        "streamed": rms(streamed),
        "present": rms(present),
        "samples": int(state.samples),
    }


KINDS: dict[str, dict[str, Any]] = {
    "window": {"window": 20},
    "constants": {"alpha": (0.7, 0.3), "beta": (0.7, 0.1, 0.2), "kappa": 0.8},
    "p2": {"window": 20, "p": 2},
    "p3 gaussian": {"window": 20, "p": 3, "scale": "gaussian"},
    "groups": {"window": 20, "ref": ("group", 4)},
    "layer": {"window": 20, "ref": "layer"},
    "double": {"window": 20, "dtype": torch.float64},
}


@pytest.mark.parametrize("every", [1, 3])
def test_readings_are_what_their_definitions_say(every: int) -> None:
    """Seven kinds of layers at once, over eight readings, of every update or of every third."""
    layers = [sn.StreamingNorm1d(8, **options) for options in KINDS.values()]
    reader = Reader(layers)
    expected: list[list[dict[str, float]]] = []
    before = [layer.long.clone() for layer in layers]
    for layer in layers:
        layer.seen.fill_(100)
    for update in range(1, 8 * every + 1):
        for layer in layers:
            x = torch.randn(5, 8, dtype=layer.long.dtype) * torch.arange(1, 9) + update
            (layer(x.requires_grad_()) * torch.randn(5, 8, dtype=x.dtype)).sum().backward()
        if update % every == 0:
            # The first reading has none before it: its drift is that of this update's own statistics.
            times = 1 if update == every else every
            if update == every:
                before = [layer.long.clone() for layer in layers]
            shares = [1 - layer.formula.weights(5, 5, 100).kappa[0] ** times for layer in layers]
            expected.append([plain_reading(*each) for each in zip(layers, before, shares)])
            commits = [times - 1] * len(layers)
            reader.take(range(len(layers)), update, commits, commits_now=True)
        sn.commit(nn.ModuleList(layers))
        if update % every == 0:
            before = [layer.long.clone() for layer in layers]
    readings = reader.read()
    assert [update for update, _ in readings] == [every * n for n in range(1, 9)]
    for (_, found), wanted in zip(readings, expected):
        for i, name in enumerate(KINDS):
            told = {field: getattr(found[i], field) for field in wanted[i]}
            assert told == pytest.approx(wanted[i], rel=2e-3, abs=1e-6), name
            assert (found[i].dead, found[i].exploding, found[i].nonfinite, found[i].idle) == (0, 0, 0, 0)


def test_it_does_not_matter_when_snapshots_are_evaluated() -> None:
    layers = [sn.StreamingNorm1d(6), sn.StreamingNorm1d(6), sn.StreamingNorm1d(3)]
    late, soon = Reader(layers), Reader(layers)
    one_by_one = []
    for update in range(1, 6):
        for layer in layers:
            layer(torch.randn(2, layer.num_features, requires_grad=True)).square().sum().backward()
        for reader in (late, soon):
            reader.take(range(3), update, [0, 0, 0], commits_now=True)
        one_by_one += soon.read()
        sn.commit(nn.ModuleList(layers))
    for (update, readings), (same_update, others) in zip(late.read(), one_by_one, strict=True):
        assert update == same_update
        assert all(readings[i] == pytest.approx(others[i], rel=1e-12, nan_ok=True) for i in range(3))
    assert late.waiting == 0


def test_statistics_between_two_readings_are_pooled() -> None:
    """One sample says little of where samples come from. Drift compares with the mean of all since the last reading."""
    layer = sn.StreamingNorm1d(1, window=100, center="zero", p=2).double()
    layer.seen.fill_(100)
    reader = Reader([layer])
    x = 2 + 0.5 * torch.randn(50, dtype=torch.float64)
    for update, value in enumerate(x):
        layer(value.view(1, 1))
        if update in (0, 49):
            reader.take([0], update, [48], commits_now=True)
        sn.commit(layer)
        if update == 0:
            mu, m = layer.long.flatten().tolist()
    _, (_, found) = reader.read()
    weights = (100 / 101) ** torch.arange(48, -1, -1)
    came_in = ((weights * x[1:]).sum() / weights.sum()).item(), ((weights * x[1:] ** 2).sum() / weights.sum()).item()
    drift = math.hypot(came_in[0] - mu, math.sqrt(came_in[1]) - math.sqrt(m)) / math.sqrt(m + 1e-5)
    assert found[0].drift == pytest.approx(drift)


def test_a_layer_between_two_commits() -> None:
    layer = sn.StreamingNorm1d(2, window=10, scale="raw")
    reader = Reader([layer])
    layer(torch.full((4, 2), 3.0))
    reader.take([0], 7, [0], commits_now=False)
    sn.commit(layer)
    reader.take([0], 9, [1], commits_now=False)
    (_, first), (_, second) = reader.read()
    assert first[0].location == 0, "the long-term statistics are those of the prior yet"
    assert first[0].drift == pytest.approx(math.hypot(3, 3 - 12 / 14 - 1), rel=1e-4)
    assert (first[0].replaced, first[0].samples, first[0].idle) == (0, 4, 7)
    assert math.isnan(first[0].present)
    assert second[0].location > 0
    assert (second[0].samples, second[0].idle) == (0, 0)
    assert math.isnan(second[0].replaced)


def reading_after(layer: Norm, *inputs: Tensor) -> Reading:
    """The reading at the second of two updates."""
    reader = Reader([layer])
    for update, x in enumerate(inputs, 1):
        layer(x.requires_grad_()).sum().backward()
        reader.take([0], update, [0], commits_now=True)
        sn.commit(layer)
    return reader.read()[-1][1][0]


def test_dead_channels() -> None:
    x = torch.randn(2, 4, 5)
    x[:, :, 1] = 3
    x[:, :, 4] = 0
    layer = sn.StreamingNorm1d(5, window=0.01)
    assert reading_after(layer, *x).dead == 2


def test_exploding_channels() -> None:
    x = torch.randn(2, 4, 5)
    x[1, :, 2] *= 1000
    layer = sn.StreamingNorm1d(5, window=4)
    assert reading_after(layer, *x).exploding == 1
    assert reading_after(sn.StreamingNorm1d(5, window=4), 1000 * x[0], 1000 * x[0]).exploding == 0


def test_the_first_statistics_do_not_explode() -> None:
    """Images of 0 to 255 are far from the prior, and nothing is wrong with them."""
    assert reading_after(sn.StreamingNorm1d(5, window=4), 255 * torch.rand(4, 5)).exploding == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_channels_that_met_values_that_are_not_finite(value: float) -> None:
    x = torch.randn(2, 4, 5)
    x[1, 0, 3] = value
    found = reading_after(sn.StreamingNorm1d(5), *x)
    assert found.nonfinite == 1
    assert math.isfinite(found.drift)
    x[1] = value
    found = reading_after(sn.StreamingNorm1d(5), *x)
    assert found.nonfinite == 5
    assert math.isnan(found.drift)
    assert math.isnan(found.drift_worst)
    assert math.isnan(found.present)
    assert found.replaced == 0


def test_gradients_that_are_not_finite() -> None:
    layer = sn.StreamingNorm1d(3)
    reader = Reader([layer])
    weights = torch.ones(4, 3)
    weights[0, 1] = math.inf
    (layer(torch.randn(4, 3, requires_grad=True)) * weights).sum().backward()
    reader.take([0], 1, [0], commits_now=True)
    assert reader.read()[0][1][0].nonfinite == 1


def test_a_mask_is_nothing_that_is_not_finite() -> None:
    """Of a statistic for each place a mask may leave nothing: the counts do not tell whether values were finite."""
    layer = sn.Norm(2, sn.NormRef.of("n c t -> c t", t=3), sn.LpMoment(p=1), sn.Stream(window=9))
    layer(torch.randn(4, 2, 3), mask=torch.tensor([True, True, False]).expand(4, 3))
    reader = Reader([layer])
    reader.take([0], 1, [0], commits_now=True)
    assert math.isnan(reader.read()[0][1][0].nonfinite)
    layer = sn.StreamingNorm1d(2)
    layer(torch.randn(4, 2, 3), mask=torch.tensor([True, True, False]).expand(4, 3))
    reader = Reader([layer])
    reader.take([0], 1, [0], commits_now=True)
    assert reader.read()[0][1][0].nonfinite == 0


def test_layers_that_nothing_counts() -> None:
    """A layer that was not used has statistics, and nothing else to tell."""
    model = nn.ModuleList([sn.StreamingNorm1d(2, p=2), sn.StreamingNorm1d(2, p=2)])
    model[0](torch.randn(3, 2))
    reader = Reader(streaming_layers(model))
    reader.take([0, 1], 1, [0, 0], commits_now=True)
    used, unused = reader.read()[0][1].values()
    assert (used.idle, unused.idle) == (0, 1)
    assert (unused.location, unused.scale, unused.replaced, unused.nonfinite) == (0, 1, 0, 0)
    assert math.isnan(unused.drift)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_layers_on_a_gpu_and_on_both_devices() -> None:
    here = [sn.StreamingNorm1d(6), sn.StreamingNorm1d(6), sn.StreamingNorm1d(3)]
    for layer in here:
        layer(torch.randn(5, layer.num_features, requires_grad=True)).square().sum().backward()
    there = [copy.deepcopy(layer).cuda() for layer in here]
    found = []
    for layers in (here, there, [*here[:2], there[2]]):
        reader = Reader(layers)
        reader.take(range(3), 1, [0] * 3, commits_now=True)
        found.append(reader.read()[0][1])
    for each in found[1:]:
        for i, reading in each.items():
            assert reading == pytest.approx(found[0][i], rel=1e-5, nan_ok=True)
