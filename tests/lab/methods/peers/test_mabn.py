"""Moving Average Batch Normalization against the algorithm of Yan et al. (2020)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from streamnorm_lab.methods.layers import METHODS
from streamnorm_lab.methods.peers.mabn import MABN, centre_weights
from streamnorm_lab.networks.images import fully_connected

EPS, LAMBDA, ALPHA = 1e-5, 1.05, 0.98


def rows(x):
    return np.moveaxis(x.detach().numpy().reshape(*x.shape[:2], -1), 1, 2).reshape(-1, x.shape[1])


@pytest.mark.parametrize(("samples", "width"), [(1, 32), (2, 16), (3, 10), (32, 1), (50, 1)])
@pytest.mark.parametrize("places", [(), (2, 2)])
def test_the_papers_algorithm(samples, width, places):
    torch.manual_seed(0)
    layer = MABN(3).double()
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    gain, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    chis: list[np.ndarray] = []
    psis: list[np.ndarray] = []
    ema = np.zeros(3)
    for step in range(1, 61):
        growth = 1.1**step  # fast enough that r is cut off
        x = (growth * torch.randn(samples, 3, *places, dtype=torch.float64)).requires_grad_()
        y = layer(x)
        dy = torch.randn_like(y)
        y.backward(dy)
        chis.append((rows(x) ** 2).mean(0))
        chi = np.mean(chis[-width:], 0)
        ema = chi if step == 1 else ema
        r = np.clip(np.sqrt((chi + EPS) / (ema + EPS)), 1 / LAMBDA, LAMBDA)
        share = max(1 - ALPHA, 1 / step)
        ema = (1 - share) * ema + share * chi
        z = rows(x) / np.sqrt(chi + EPS)
        np.testing.assert_allclose(rows(y), z * r * gain + bias, rtol=1e-9)
        g = rows(dy) * gain * r
        psis.append((g * z).mean(0))
        expected = (g - z * np.mean(psis[-width:], 0)) / np.sqrt(chi + EPS)
        np.testing.assert_allclose(rows(x.grad), expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(layer.running_moment, ema, rtol=1e-9)
    assert (r == LAMBDA).any()
    layer.eval()
    for count in (1, 4):
        x = torch.randn(count, 3, *places, dtype=torch.float64)
        np.testing.assert_allclose(rows(layer(x)), rows(x) / np.sqrt(ema + EPS) * gain + bias, rtol=1e-9)


@pytest.mark.parametrize("axes", [0, 2])
def test_weights_before_a_normalization_are_kept_centred(axes):
    model: Any
    if axes:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), MABN(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
        x, first = torch.randn(6, 3, 5, 5), 0
    else:
        model, first = fully_connected(75, 2, METHODS["mabn"].make, 7, 1), 1
        x = torch.randn(6, 75)
    last = model[-1].weight.detach().clone()
    METHODS["mabn"].finish(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
    means = model[first].weight.detach().flatten(1).mean(1)
    torch.testing.assert_close(means, torch.zeros_like(means), rtol=0, atol=1e-6)
    assert not torch.equal(model[-1].weight, last)
    assert not torch.nn.utils.parametrize.is_parametrized(model[-1])
    assert centre_weights(nn.Linear(2, 2)).weight is not None
