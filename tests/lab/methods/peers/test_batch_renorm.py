"""Batch Renormalization against algorithm 1 of Ioffe (2017)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamnorm_lab.methods.peers.batch_renorm import BatchRenorm

EPS, ALPHA = 1e-5, 0.01


def plain_step(x, state, r_max, d_max, share):
    """Algorithm 1 for x of (values, C): x̂ and the new moving averages."""
    mu, sigma = state
    mu_b = x.mean(0)
    sigma_b = np.sqrt(EPS + ((x - mu_b) ** 2).mean(0))
    r = np.clip(sigma_b / sigma, 1 / r_max, r_max)
    d = np.clip((mu_b - mu) / sigma, -d_max, d_max)
    return (x - mu_b) / sigma_b * r + d, (mu + share * (mu_b - mu), sigma + share * (sigma_b - sigma)), (r, d)


def rows(x):
    """(N, C, …) as (values, C)."""
    return np.moveaxis(x.detach().numpy().reshape(*x.shape[:2], -1), 1, 2).reshape(-1, x.shape[1])


def settled(channels, places=()):
    """A layer far into its run, with averages of other data than will come."""
    layer = BatchRenorm(channels).double()
    layer.uses.fill_(100_000)
    layer.running_mean.normal_()
    layer.running_std.uniform_(0.2, 4)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    return layer


@pytest.mark.parametrize("shape", [(4, 3), (2, 3), (1, 3, 2, 2), (4, 3, 2, 2)])
def test_the_papers_algorithm(shape):
    torch.manual_seed(0)
    layer = settled(3)
    state = (layer.running_mean.numpy().copy(), layer.running_std.numpy().copy())
    gain, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64) * 2 + 1
        expected, state, _ = plain_step(rows(x), state, 3, 5, ALPHA)
        np.testing.assert_allclose(rows(layer(x)), expected * gain + bias, rtol=1e-9)
        np.testing.assert_allclose(layer.running_mean, state[0], rtol=1e-9)
        np.testing.assert_allclose(layer.running_std, state[1], rtol=1e-9)


def test_no_gradient_passes_through_the_corrections():
    torch.manual_seed(1)
    layer = settled(3)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    state = (layer.running_mean.numpy().copy(), layer.running_std.numpy().copy())
    _, _, (r, d) = plain_step(x.detach().numpy(), state, 3, 5, ALPHA)
    weights = torch.randn(4, 3, dtype=torch.float64)
    (layer(x) * weights).sum().backward()

    def loss(values):
        centred = values - values.mean(0)
        hat = centred / np.sqrt(EPS + (centred**2).mean(0)) * r + d
        return float(((hat * layer.weight.detach().numpy() + layer.bias.detach().numpy()) * weights.numpy()).sum())

    base, step = x.detach().numpy(), 1e-6
    for place in np.ndindex(4, 3):
        move = np.zeros((4, 3))
        move[place] = step
        slope = (loss(base + move) - loss(base - move)) / (2 * step)
        assert x.grad is not None
        assert x.grad[place].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_the_limits_follow_the_papers_schedule():
    layer = BatchRenorm(2)
    found = []
    for step in (0, 5_000, 15_000, 22_500, 25_000, 40_000, 130_000):
        layer.uses.fill_(step)
        found.append(layer.limits())
    expected = [(1, 0), (1, 0), (1 + 2 * 10 / 35, 2.5), (2, 4.375), (1 + 2 * 20 / 35, 5), (3, 5), (3, 5)]
    np.testing.assert_allclose(found, expected)
    layer.plan(1300)
    layer.uses.fill_(225)
    np.testing.assert_allclose(layer.limits(), (2, 4.375))


def test_at_first_it_is_batch_normalization_and_the_averages_are_plain():
    torch.manual_seed(2)
    layer, plain = BatchRenorm(3), torch.nn.BatchNorm1d(3)
    batches = torch.randn(6, 5, 3) * 3 + 2
    for batch in batches:
        torch.testing.assert_close(layer(batch), plain(batch))
    torch.testing.assert_close(layer.running_mean, batches.mean((0, 1)))
    torch.testing.assert_close(layer.running_std, batches.var(1, correction=0).sqrt().mean(0))


@pytest.mark.parametrize("samples", [1, 4])
def test_evaluation_uses_the_moving_averages(samples):
    torch.manual_seed(3)
    layer = settled(3).eval()
    x = torch.randn(samples, 3, 2, 2, dtype=torch.float64)
    hat = (rows(x) - layer.running_mean.numpy()) / layer.running_std.numpy()
    expected = hat * layer.weight.detach().numpy() + layer.bias.detach().numpy()
    np.testing.assert_allclose(rows(layer(x)), expected, rtol=1e-9)


def test_one_value_per_channel_is_refused_and_changes_nothing():
    layer = BatchRenorm(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 3))
    assert int(layer.uses) == 0
