"""The streaming recursion in NumPy float64, slow and obvious: what every layer and engine is held against.

Written from the formulas of ``docs/mathematics.md`` alone, one statistic at a time, and independent of the package:
nothing of it is imported here. The tests of this file against finite differences are in ``test_oracle.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


def elements(ref: str | tuple[str, int], shape: Sequence[int], *, ghosts: int = 1) -> Array:
    """Which elements share a statistic: flat positions in a tensor of ``shape``, laid out as ``(A, G, B)``.

    Args:
        ref: a row of the table of views. For a batch: "channel", "layer" or ("group", g); for one sample:
            "sample_channel", "sample_layer", "sample_position" or ("sample_group", g). Of one's own: ("strides", g)
            for every g-th channel together, and "rows" and "columns" of images.
        shape: ``(N, C, S...)``.
        ghosts: the number P of partitions of the batch, sample i in partition i mod P; only with "channel".
    """
    n, c, *rest = shape
    s = math.prod(rest)
    flat = np.arange(n * c * s).reshape(n, c, s)
    name, groups = ref if isinstance(ref, tuple) else (ref, 1)
    if name == "channel" and ghosts > 1:
        return flat.reshape(n // ghosts, ghosts * c, s)
    if name == "channel":
        return flat.reshape(n, c, s)
    if name == "layer":
        return flat.reshape(n, 1, c * s)
    if name == "group":
        return flat.reshape(n, groups, c // groups * s)
    if name == "strides":
        return flat.reshape(n, c // groups, groups, s).transpose(0, 2, 1, 3).reshape(n, groups, c // groups * s)
    if name == "rows":
        return flat.reshape(n, c * rest[0], rest[1])
    if name == "columns":
        return flat.reshape(n, c * rest[0], rest[1]).transpose(0, 2, 1)
    if name == "sample_layer":
        return flat.reshape(1, n, c * s)
    if name == "sample_channel":
        return flat.reshape(1, n * c, s)
    if name == "sample_group":
        return flat.reshape(1, n * groups, c // groups * s)
    if name == "sample_position":
        return flat.transpose(0, 2, 1).reshape(1, n * s, c)
    raise ValueError(f"no such reference: {ref!r}")


def gaussian_factor(p: float) -> float:
    """k_p = 1 / E|N(0, 1)|^p^(1/p), with E|N(0, 1)|^p = 2^(p/2) Γ((p+1)/2) / √π."""
    moment = 2 ** (p / 2) * math.gamma((p + 1) / 2) / math.sqrt(math.pi)
    return moment ** (-1 / p)


def mix(weights: Sequence[float], long: float, short: float, present: float) -> float:
    """A weighted sum in which a weight of zero means "not at all", even of a value that is not finite."""
    return sum(w * value for w, value in zip(weights, (long, short, present), strict=True) if w != 0)


@dataclass
class Use:
    """What one forward leaves for its backward: the call's input and the statistics that it used."""

    x: Array
    ids: Array
    valid: Array
    rows: int
    mu: Array
    m: Array
    s: Array
    finite: Array
    advances: bool
    went_back: bool = False
    """Whether its gradient arrived already, in an earlier backward pass through the same graph."""


class Oracle:
    """One layer's streams, gain and bias.

    Args:
        num_stats: G.
        channels: C, the number of gains and biases.
        alpha, beta: three weights each; None under the window rule.
        kappa: four numbers; None under the window rule.
        window: W; None with explicit constants.
        grad_window: the same of gradients.
        limit: c of the bound on the moment.
        own: P of the mini-batch's own share of the gradients under the window rule.
    """

    def __init__(
        self,
        num_stats: int,
        channels: int,
        *,
        p: float,
        center: str = "mean",
        scale: str = "raw",
        eps: float = 1e-5,
        alpha: Sequence[float] | None = None,
        beta: Sequence[float] | None = None,
        kappa: Sequence[float] | None = None,
        window: float | None = None,
        grad_window: float | None = None,
        limit: float = math.inf,
        own: float = math.inf,
        gain: Array | None = None,
        bias: Array | None = None,
    ) -> None:
        self.p, self.center, self.eps = p, center, eps
        self.k = {"raw": 1.0, "gaussian": gaussian_factor(p)}[scale]
        self.alpha, self.beta, self.kappa = alpha, beta, kappa
        self.window, self.grad_window, self.limit, self.own = window, grad_window, limit, own
        self.gain = np.ones(channels) if gain is None else gain
        self.bias = np.zeros(channels) if bias is None else bias
        g = num_stats
        self.long_mu, self.short_mu = np.zeros(g), np.zeros(g)
        self.long_m, self.short_m = np.ones(g), np.zeros(g)
        self.long_g_mu, self.short_g_mu = np.zeros(g), np.zeros(g)
        self.long_g_m, self.short_g_m = np.zeros(g), np.zeros(g)
        self.count, self.grad_count = np.zeros(g, int), np.zeros(g, int)
        self.samples = self.grad_samples = self.seen = 0

    def forward(self, x: Array, ids: Array, mask: Array | None = None, *, advances: bool = True) -> tuple[Array, Use]:
        """One use in training.

        Args:
            x: ``(N, C, S...)``.
            ids: :func:`elements` of the reference.
            mask: True where an element counts, over ``(N,)`` or ``(N, S...)``.
            advances: whether this use's backward will advance the streams (the input needs a gradient).
        """
        valid = spread_mask(mask, x.shape)
        rows = int(valid.reshape(len(x), -1).any(axis=1).sum()) if x.size else 0
        self.samples += rows
        g_total = ids.shape[1]
        mu, m, s = np.zeros(g_total), np.zeros(g_total), np.ones(g_total)
        finite = np.ones(g_total, bool)
        flat, ok = x.reshape(-1), valid.reshape(-1)
        a = self._forward_weights()
        for g in range(g_total):
            own = ids[:, g, :].reshape(-1)
            own = own[ok[own]]
            n = len(own)
            if n == 0:
                continue
            values = flat[own]
            b_mu = values.sum() / n
            new_short_mu = running(self.short_mu[g], self.count[g], b_mu, n)
            mu[g] = mix(a, self.long_mu[g], new_short_mu, b_mu)
            d = values - (mu[g] if self.center == "mean" else 0.0)
            b_m = (np.abs(d) ** self.p).sum() / n
            new_short_m = running(self.short_m[g], self.count[g], b_m, n)
            m[g] = mix(a, self.long_m[g], new_short_m, b_m)
            if b_m / self.limit**self.p > m[g]:
                m[g] = b_m / self.limit**self.p
            sigma = self.k * m[g] ** (1 / self.p)
            s[g] = np.sqrt(sigma**2 + self.eps)
            finite[g] = np.isfinite(b_mu) and np.isfinite(b_m)
            if finite[g]:
                self.short_mu[g], self.short_m[g] = new_short_mu, new_short_m
                self.count[g] += n
        use = Use(x, ids, valid, rows, mu, m, s, finite, advances)
        return self._affine(use), use

    def backward(self, use: Use, dy: Array) -> tuple[Array, Array, Array]:
        """The gradients of x, gain and bias for one use; advances the gradient streams if the use asks for it."""
        gain = self._per_element(self.gain, use.x.shape)
        dy = np.where(use.valid, dy, 0.0)
        d_gain, d_bias = self._affine_gradients(use, dy)
        dx_hat = (dy * gain).reshape(-1)
        flat, ok = use.x.reshape(-1), use.valid.reshape(-1)
        dx = np.zeros(flat.shape)
        if not use.advances:
            return dx.reshape(use.x.shape), d_gain, d_bias
        again, use.went_back = use.went_back, True
        if not again or self.grad_samples < use.rows:
            self.grad_samples += use.rows
        b = self._backward_weights(use.rows)
        p = self.p
        for g in range(use.ids.shape[1]):
            own = use.ids[:, g, :].reshape(-1)
            own = own[ok[own]]
            n = len(own)
            if n == 0:
                continue
            mu, m, s = use.mu[g], use.m[g], use.s[g]
            x, incoming = flat[own], dx_hat[own]
            d = x - (mu if self.center == "mean" else 0.0)
            u = np.abs(d) ** (p - 1) * np.sign(d)
            q = u.sum() / n
            sigma2 = (self.k * m ** (1 / p)) ** 2
            limit = self.k**2 / 2 if p == 2 else 0.0
            slope = (sigma2 / (p * m) if m != 0 else limit) / s**3
            # Another pass with no update since: only what this gradient adds, and no element counts twice.
            past, count = (0, self.grad_count[g] - n) if again and self.grad_count[g] >= n else (1, self.grad_count[g])
            # Under the window rule the streams of gradients are in units of 1/s and 1/s^p.
            unit_mu, unit_m = (1.0, 1.0) if self.window is None else (1 / s, 1 / s**p)
            g_m = -(incoming * (x - mu)).sum() / n * slope * (1 / unit_m if unit_m > 0 else 0.0)
            new_short_g_m = running(past * self.short_g_m[g], count, g_m, n)
            hat_g_m = mix(b, past * self.long_g_m[g], new_short_g_m, g_m) * unit_m
            if not use.finite[g]:  # a statistic that overflowed passes nothing through its moment
                hat_g_m, u, q = 0.0, np.zeros(n), 0.0
            g_mu = -(incoming / s).sum() / n
            if self.center == "mean":
                g_mu = g_mu - hat_g_m * p * q
            g_mu *= 1 / unit_mu if unit_mu > 0 else 0.0
            new_short_g_mu = running(past * self.short_g_mu[g], count, g_mu, n)
            hat_g_mu = mix(b, past * self.long_g_mu[g], new_short_g_mu, g_mu) * unit_mu
            dx[own] = incoming / s + hat_g_mu + hat_g_m * p * u
            if use.finite[g] and np.isfinite(g_m) and np.isfinite(g_mu):
                self.short_g_m[g] = (1 - past) * self.short_g_m[g] + new_short_g_m
                self.short_g_mu[g] = (1 - past) * self.short_g_mu[g] + new_short_g_mu
                self.grad_count[g] = count + n
        return dx.reshape(use.x.shape), d_gain, d_bias

    def commit(self) -> None:
        """The weights changed."""
        k1, k2, k3, k4 = self._commit_weights()
        for g in range(len(self.count)):
            if self.count[g] > 0:
                self.long_mu[g] = k1 * self.long_mu[g] + k2 * self.short_mu[g]
                self.long_m[g] = k1 * self.long_m[g] + k2 * self.short_m[g]
                self.short_mu[g] = self.short_m[g] = self.count[g] = 0
            if self.grad_count[g] > 0:
                self.long_g_mu[g] = k3 * self.long_g_mu[g] + k4 * self.short_g_mu[g]
                self.long_g_m[g] = k3 * self.long_g_m[g] + k4 * self.short_g_m[g]
                self.short_g_mu[g] = self.short_g_m[g] = self.grad_count[g] = 0
        self.seen += self.samples
        self.samples = self.grad_samples = 0

    def evaluate(self, x: Array, ids: Array, mask: Array | None = None) -> tuple[Array, Use]:
        """The fixed affine map of evaluation."""
        a1, a2, _ = self._forward_weights()
        g_total = ids.shape[1]
        mu, m = np.zeros(g_total), np.zeros(g_total)
        for g in range(g_total):
            if a1 + a2 == 0 or self.count[g] == 0:
                mu[g], m[g] = self.long_mu[g], self.long_m[g]
            else:
                mu[g] = (a1 * self.long_mu[g] + a2 * self.short_mu[g]) / (a1 + a2)
                m[g] = (a1 * self.long_m[g] + a2 * self.short_m[g]) / (a1 + a2)
        s = np.sqrt((self.k * m ** (1 / self.p)) ** 2 + self.eps)
        use = Use(x, ids, spread_mask(mask, x.shape), 0, mu, m, s, np.isfinite(mu + m), False)
        return self._affine(use), use

    def evaluation_backward(self, use: Use, dy: Array) -> tuple[Array, Array, Array]:
        """The gradients of x, gain and bias through the fixed affine map."""
        dy = np.where(use.valid, dy, 0.0)
        d_gain, d_bias = self._affine_gradients(use, dy)
        return dy * self._per_element(self.gain, use.x.shape) / per_statistic(use.s, use), d_gain, d_bias

    def _forward_weights(self) -> tuple[float, ...]:
        if self.window is None:
            assert self.alpha is not None
            return tuple(self.alpha)
        worth = min(self.window, 16 + self.seen)
        return (worth / (worth + self.samples), self.samples / (worth + self.samples), 0.0)

    def _backward_weights(self, rows: int = 0) -> tuple[float, ...]:
        if self.window is None:
            assert self.beta is not None
            return tuple(self.beta)
        assert self.grad_window is not None
        total = self.grad_window + self.grad_samples
        own = rows / (rows + self.own)
        return ((1 - own) * self.grad_window / total, (1 - own) * self.grad_samples / total, own)

    def _commit_weights(self) -> tuple[float, ...]:
        if self.window is None:
            assert self.kappa is not None
            return tuple(self.kappa)
        return (*self._forward_weights()[:2], *self._backward_weights()[:2])

    def _affine(self, use: Use) -> Array:
        """x̂·gain + bias; what the mask keeps out is zero."""
        shape = use.x.shape
        y = x_hat(use) * self._per_element(self.gain, shape) + self._per_element(self.bias, shape)
        return np.where(use.valid, y, 0.0)

    def _affine_gradients(self, use: Use, dy: Array) -> tuple[Array, Array]:
        product = np.where(use.valid, dy * x_hat(use), 0.0)
        d_gain, d_bias = np.zeros(len(self.gain)), np.zeros(len(self.bias))
        for c in range(len(self.gain)):
            d_gain[c] = product[:, c].sum()
            d_bias[c] = dy[:, c].sum()
        return d_gain, d_bias

    @staticmethod
    def _per_element(values: Array, shape: Sequence[int]) -> Array:
        return np.broadcast_to(values.reshape(1, -1, *(1 for _ in shape[2:])), shape)


def running(short: float, count: int, value: float, n: int) -> float:
    """The exact running average after n more elements whose mean is ``value``."""
    return (count * short + n * value) / (count + n)


def spread_mask(mask: Array | None, shape: Sequence[int]) -> Array:
    """A mask over (N,) or (N, S...) as one over (N, C, S...)."""
    if mask is None:
        return np.ones(shape, bool)
    n, _, *rest = shape
    if mask.ndim == 1:
        mask = mask.reshape(n, *(1 for _ in rest))
    return np.broadcast_to(mask[:, None], shape)


def per_statistic(values: Array, use: Use) -> Array:
    """Each element's own statistic."""
    out = np.zeros(use.x.size)
    for g in range(use.ids.shape[1]):
        out[use.ids[:, g, :].reshape(-1)] = values[g]
    return out.reshape(use.x.shape)


def x_hat(use: Use) -> Array:
    """(x − mu)/s."""
    return (use.x - per_statistic(use.mu, use)) / per_statistic(use.s, use)
