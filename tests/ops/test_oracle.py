"""The oracle itself: against finite differences, against Batch Normalization, and against a case worked by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.oracle import Oracle, elements, gaussian_factor

PRESENT: dict[str, Any] = {"alpha": (0, 0, 1), "beta": (0, 0, 1), "kappa": (0.7, 0.3, 0.7, 0.3)}
REFERENCES = [
    "channel",
    "layer",
    ("group", 2),
    "sample_layer",
    "sample_channel",
    ("sample_group", 2),
    "sample_position",
]


@pytest.mark.parametrize("scale", ["raw", "gaussian"])
@pytest.mark.parametrize("center", ["mean", "zero"])
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 7])
@pytest.mark.parametrize("ref", REFERENCES, ids=str)
def test_gradients_match_finite_differences_where_nothing_is_streamed(ref, p, center, scale):
    rng = np.random.default_rng(3)
    shape = (3, 4, 5)
    x = rng.normal(0.3, 1.2, shape)
    mask = rng.random((3, 5)) < 0.8
    mask[:, 0] = True  # at least one place of each sample
    gain, bias, dy = rng.normal(1, 0.3, 4), rng.normal(0, 0.3, 4), rng.normal(0, 1, shape)
    ids = elements(ref, shape)

    def loss(x, gain, bias):
        fresh = Oracle(ids.shape[1], 4, p=p, center=center, scale=scale, gain=gain, bias=bias, **PRESENT)
        return (fresh.forward(x, ids, mask)[0] * dy).sum()

    oracle = Oracle(ids.shape[1], 4, p=p, center=center, scale=scale, gain=gain, bias=bias, **PRESENT)
    _, use = oracle.forward(x, ids, mask)
    for argument, gradient in enumerate(oracle.backward(use, dy)):
        direction = rng.normal(0, 1, gradient.shape)
        h = 1e-6
        ends = []
        for sign in (1, -1):
            arguments = [x, gain, bias]
            arguments[argument] = arguments[argument] + sign * h * direction
            ends.append(loss(*arguments))
        numeric = (ends[0] - ends[1]) / (2 * h)
        assert (gradient * direction).sum() == pytest.approx(numeric, rel=2e-6, abs=2e-8)


def test_the_special_case_is_batch_normalization():
    rng = np.random.default_rng(0)
    x, dy = rng.normal(2, 3, (6, 3, 4)), rng.normal(0, 1, (6, 3, 4))
    oracle = Oracle(3, 3, p=2, **PRESENT)
    y, use = oracle.forward(x, elements("channel", x.shape))
    dx, _, _ = oracle.backward(use, dy)
    tensor = torch.tensor(x, requires_grad=True)
    expected = torch.nn.BatchNorm1d(3, dtype=torch.float64)(tensor)
    expected.backward(torch.tensor(dy))
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-12, atol=1e-13)
    assert tensor.grad is not None
    np.testing.assert_allclose(dx, tensor.grad.numpy(), rtol=1e-12, atol=1e-13)


def test_three_uses_and_two_commits_worked_by_hand():
    """One channel, p = 1, centre "mean", eps = 0, (α1, α2, α3) = (0.5, 0.25, 0.25), β = (0.5, 0.5, 0), κ = 0.5."""
    constants: dict[str, Any] = {"alpha": (0.5, 0.25, 0.25), "beta": (0.5, 0.5, 0.0), "kappa": (0.5, 0.5, 0.5, 0.5)}
    oracle = Oracle(1, 1, p=1, eps=0.0, **constants)
    # First use: b_mu = 4, short_mu = 4, mu = 0 + 1 + 1 = 2; d = (0, 4), b_m = 2, m = 0.5 + 0.5 + 0.5 = 1.5.
    x1 = np.array([[2.0], [6.0]])
    y1, use1 = oracle.forward(x1, elements("channel", x1.shape))
    np.testing.assert_allclose(y1, [[0.0], [4 / 1.5]])
    # Second use, one element: b_mu = 1, short_mu = (2·4 + 1)/3 = 3, mu = 0.75 + 0.25 = 1; d = 0,
    # b_m = 0, short_m = (2·2 + 0)/3 = 4/3, m = 0.5 + 1/3 = 5/6.
    x2 = np.array([[1.0]])
    y2, use2 = oracle.forward(x2, elements("channel", x2.shape))
    np.testing.assert_allclose(y2, [[0]])
    assert (oracle.short_mu[0], oracle.count[0], oracle.samples) == (3, 3, 3)
    assert oracle.short_m[0] == pytest.approx(4 / 3)
    # Last use first: x − mu = 0, so g_m = 0; s = 5/6, dŷ = 5/6: g_mu = −1, ĝ_mu = −1/2, dx = 1 − 1/2.
    dx2, d_gain, d_bias = oracle.backward(use2, np.array([[5 / 6]]))
    np.testing.assert_allclose([dx2[0, 0], d_gain[0], d_bias[0]], [0.5, 0, 5 / 6])
    # Then the first: dŷ = (0, 1.5), x − mu = (0, 4), sigma²/(p·m·s³) = 1/m² = 4/9, so g_m = −½·6·4/9 = −4/3;
    # short_g_m = (1·0 + 2·(−4/3))/3 = −8/9, ĝ_m = −4/9. u = (0, 1), q = ½, g_mu = −½·1 + 4/9·½ = −5/18;
    # short_g_mu = (−1 − 5/9)/3 = −14/27, ĝ_mu = −7/27. dx = (−7/27, 1 − 7/27 − 4/9).
    dx1, _, _ = oracle.backward(use1, np.array([[0.0], [1.5]]))
    np.testing.assert_allclose(dx1[:, 0], [-7 / 27, 1 - 7 / 27 - 12 / 27])
    oracle.commit()
    # long = ½·(0, 1) + ½·(3, 4/3); long_g = ½·(−14/27, −8/9).
    np.testing.assert_allclose([oracle.long_mu[0], oracle.long_m[0]], [1.5, 0.5 + 2 / 3])
    np.testing.assert_allclose([oracle.long_g_mu[0], oracle.long_g_m[0]], [-7 / 27, -4 / 9])
    assert oracle.short_mu[0] == oracle.short_m[0] == oracle.count[0] == oracle.grad_count[0] == oracle.samples == 0
    oracle.commit()
    np.testing.assert_allclose([oracle.long_mu[0], oracle.long_g_mu[0]], [1.5, -7 / 27])
    # Nothing short: evaluation uses long alone; then with a short of mu 3 and weights (2, 1)/3.
    np.testing.assert_allclose(oracle.evaluate(x2, elements("channel", x2.shape))[1].mu, [1.5])
    oracle.forward(np.array([[3.0]]), elements("channel", (1, 1)))
    np.testing.assert_allclose(oracle.evaluate(x2, elements("channel", x2.shape))[1].mu, [2.0])


def test_window_rule_worked_by_hand():
    oracle = Oracle(1, 1, p=1, eps=0.0, window=2.0, grad_window=2.0)
    # S = 2: α = (½, ½, 0); b_mu = 4, mu = 2, d = (0, 4), b_m = 2, m = ½ + 1.
    x = np.array([[2.0], [6.0]])
    ids = elements("channel", x.shape)
    y, use = oracle.forward(x, ids)
    np.testing.assert_allclose(y, [[0.0], [4 / 1.5]])
    # A second use: S = 4, α = (1/3, 2/3, 0), mu = 2/3·4.
    _, second = oracle.forward(x, ids)
    np.testing.assert_allclose(second.mu, [8 / 3])
    # One gradient only: S' = 2, β = (½, ½, 0). dŷ = (0, 1.5): g_m = −4/3, ĝ_m = −2/3, g_mu = −½ + 1/3.
    dx, _, _ = oracle.backward(use, np.array([[0.0], [1.5]]))
    np.testing.assert_allclose(dx[:, 0], [-1 / 12, 1 - 1 / 12 - 2 / 3])
    oracle.commit()
    np.testing.assert_allclose(oracle.long_mu, [8 / 3])  # what the second use saw
    long_g_mu, long_g_m = 1 / 2 * -1 / 6 * 1.5, 1 / 2 * -4 / 3 * 1.5  # in units of 1/s
    np.testing.assert_allclose([oracle.long_g_mu[0], oracle.long_g_m[0]], [long_g_mu, long_g_m])
    # Two uses and one gradient again, now of zeros: S = 4, S' = 2, every short-term gradient is
    # −ĝ_m·p·q alone (mu) and zero (m); ĝ_m = ½·long_g_m.
    _, use = oracle.forward(x, ids)
    _, use = oracle.forward(x, ids)
    q = np.sign(x - use.mu).mean()
    oracle.backward(use, np.zeros((2, 1)))
    oracle.commit()
    kept = 1 / 2
    np.testing.assert_allclose(oracle.long_g_m, [kept * long_g_m])
    np.testing.assert_allclose(oracle.long_g_mu, [kept * long_g_mu + (1 - kept) * -0.5 * long_g_m * q])


def test_the_first_statistics_are_averages_of_what_was_seen():
    """And of the prior, as if it were 16 samples; a memory is full after as many samples as it holds."""
    oracle, values = Oracle(1, 1, p=1, window=50.0, grad_window=2.0), np.arange(100.0)
    for value in values[:34]:
        oracle.forward(np.array([[value]]), elements("channel", (1, 1)))
        oracle.commit()
    np.testing.assert_allclose(oracle.long_mu, [values[:34].sum() / 50])
    oracle.forward(np.array([[7.0]]), elements("channel", (1, 1)))
    oracle.commit()
    np.testing.assert_allclose(oracle.long_mu, [(values[:34].sum() + 7) / 51])
    oracle.forward(np.array([[7.0]]), elements("channel", (1, 1)))
    oracle.commit()
    np.testing.assert_allclose(oracle.long_mu, [((values[:34].sum() + 7) / 51 * 50 + 7) / 51])
    assert oracle.seen == 36


def test_a_bound_worked_by_hand():
    """An input far out: the moment in use is a quarter of its own, which the stream does not see."""
    oracle = Oracle(1, 1, p=1, eps=0.0, window=15.0, grad_window=2.0, limit=4.0)
    x = np.array([[160.0]])
    y, use = oracle.forward(x, elements("channel", x.shape))  # α = (15, 1, 0)/16: mu = 10, d = 150, m = (15 + 150)/16
    np.testing.assert_allclose([use.mu[0], use.m[0], y[0, 0]], [10.0, 150 / 4, 4.0])
    oracle.commit()
    np.testing.assert_allclose([oracle.long_mu[0], oracle.long_m[0]], [10.0, 165 / 16])


@pytest.mark.parametrize(("p", "expected"), [(1, 0.0), (1.5, 0.0), (2, 0.25), (3, 0.0)])
def test_a_moment_of_zero_takes_the_limit(p, expected):
    oracle = Oracle(1, 1, p=p, center="zero", eps=1.0, alpha=(0.5, 0.5, 0), beta=(0, 0, 1), kappa=(0.5,) * 4)
    oracle.long_mu[0], oracle.long_m[0] = 1.0, 0.0
    _, use = oracle.forward(np.zeros((1, 1)), elements("channel", (1, 1)))  # mu = ½, m = 0, s = 1
    oracle.backward(use, np.ones((1, 1)))
    np.testing.assert_allclose(oracle.short_g_m, [expected])


@pytest.mark.parametrize(("p", "k"), [(1, math.sqrt(math.pi / 2)), (2, 1.0), (4, 3**-0.25)])
def test_gaussian_factor(p, k):
    assert gaussian_factor(p) == pytest.approx(k, rel=1e-14)
