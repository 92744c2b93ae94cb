"""Streaming sigma against its recursion, one channel at a time; and where it is what the library streams anyway."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import streamnorm as sn
from streamnorm_lab.methods.streaming_sigma import StreamingSigma

EPS = 1e-5


class Plain:
    """One channel under the window rule: x is a vector of all values of a mini-batch."""

    def __init__(self, p, window):
        self.p, self.window = p, window
        self.long, self.short, self.count, self.samples = np.array([0.0, 1.0]), np.zeros(2), 0, 0
        self.long_g, self.short_g, self.grad_count, self.grad_samples = np.zeros(2), np.zeros(2), 0, 0
        self.seen = 0

    def mix(self, long, short, samples):
        worth = min(self.window, 16 + self.seen)
        return (worth * long + samples * short) / (worth + samples)

    def mix_gradients(self, long, short, samples):
        return (32 * long + samples * short) / (32 + samples)

    def forward(self, x, samples):
        n = len(x)
        self.samples += samples
        b_mu = x.mean()
        short_mu = (self.count * self.short[0] + n * b_mu) / (self.count + n)
        mu = self.mix(self.long[0], short_mu, self.samples)
        b_sigma = (np.abs(x - mu) ** self.p).mean() ** (1 / self.p)
        short_sigma = (self.count * self.short[1] + n * b_sigma) / (self.count + n)
        sigma = max(self.mix(self.long[1], short_sigma, self.samples), b_sigma / 4)
        self.short, self.count = np.array([short_mu, short_sigma]), self.count + n
        return (x - mu) / math.sqrt(sigma**2 + EPS), (x, mu, sigma, b_sigma, samples)

    def backward(self, dy, use):
        x, mu, sigma, b_sigma, samples = use
        n, s = len(x), math.sqrt(sigma**2 + EPS)
        self.grad_samples += samples
        # Per element: of sigma through s, then of mu through the numerator and through this call's sigma.
        g_sigma = -(dy * (x - mu)).mean() * sigma / s**3 * s  # in units of 1/s
        short_g_sigma = (self.grad_count * self.short_g[1] + n * g_sigma) / (self.grad_count + n)
        hat_sigma = self.mix_gradients(self.long_g[1], short_g_sigma, self.grad_samples) / s
        slope = b_sigma ** (1 - self.p) * np.abs(x - mu) ** (self.p - 1) * np.sign(x - mu)
        g_mu = (-(dy / s).mean() - hat_sigma * slope.mean()) * s
        short_g_mu = (self.grad_count * self.short_g[0] + n * g_mu) / (self.grad_count + n)
        hat_mu = self.mix_gradients(self.long_g[0], short_g_mu, self.grad_samples) / s
        self.short_g, self.grad_count = np.array([short_g_mu, short_g_sigma]), self.grad_count + n
        return dy / s + hat_mu + hat_sigma * slope

    def commit(self):
        self.long = self.mix(self.long, self.short, self.samples)
        self.long_g = self.mix_gradients(self.long_g, self.short_g, self.grad_samples)
        self.seen += self.samples
        self.short, self.count, self.samples = np.zeros(2), 0, 0
        self.short_g, self.grad_count, self.grad_samples = np.zeros(2), 0, 0


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize(("samples", "places"), [(1, ()), (4, ()), (2, (3, 2))])
def test_the_recursion(p, samples, places):
    torch.manual_seed(0)
    layer = StreamingSigma(3, p, window=20).double()
    plain = [Plain(p, 20) for _ in range(3)]
    for _ in range(4):
        for _ in range(3):
            x = (2 * torch.randn(samples, 3, *places, dtype=torch.float64) + 1).requires_grad_()
            y = layer(x)
            dy = torch.randn_like(y)
            y.backward(dy)
            assert x.grad is not None
            for c, channel in enumerate(plain):
                expected, use = channel.forward(x.detach()[:, c].numpy().ravel(), samples)
                dx = channel.backward(dy[:, c].numpy().ravel(), use)
                np.testing.assert_allclose(y.detach()[:, c].numpy().ravel(), expected, rtol=1e-9)
                np.testing.assert_allclose(x.grad[:, c].numpy().ravel(), dx, rtol=1e-7, atol=1e-9)
        sn.commit(layer)
        for channel in plain:
            channel.commit()
    layer.eval()
    x = torch.randn(1, 3, *places, dtype=torch.float64)
    for c, channel in enumerate(plain):
        expected = (x[:, c].numpy() - channel.long[0]) / math.sqrt(channel.long[1] ** 2 + EPS)
        np.testing.assert_allclose(layer(x).detach()[:, c].numpy(), expected, rtol=1e-9)


def run(layer, batches):
    """Outputs and input gradients of a few updates of two mini-batches."""
    torch.manual_seed(1)
    found = []
    for number, batch in enumerate(batches):
        x = batch.clone().requires_grad_()
        y = layer(x)
        y.backward(torch.randn_like(y))
        found += [y.detach(), x.grad]
        if number % 2:
            sn.commit(layer)
    return torch.stack(found)


def test_for_p_1_sigma_and_moment_are_the_same_and_for_p_2_they_are_not():
    batches = torch.randn(8, 3, 4, dtype=torch.float64) * torch.arange(1, 9).view(-1, 1, 1)
    for p, same in ((1, True), (2, False)):
        ours, library = (
            run(StreamingSigma(4, p).double(), batches),
            run(sn.StreamingNorm1d(4, p=p, scale="raw").double(), batches),
        )
        assert torch.allclose(ours, library) is same


def test_with_the_present_alone_it_is_batch_normalization():
    batches = torch.randn(4, 6, 4)
    ours = run(StreamingSigma(4, alpha=(0, 0, 1), beta=(0, 0, 1)), batches)
    torch.testing.assert_close(ours, run(torch.nn.BatchNorm1d(4), batches), rtol=1e-4, atol=1e-5)
