"""A streaming layer with its oracle beside it: every use, every gradient and every state value goes through both."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from oracle import Array, Oracle, Use, elements
from torch import Tensor, nn

import streamnorm as sn

STATE = ("long", "short", "long_grad", "short_grad")
ROWS = ("long_mu", "long_m", "short_mu", "short_m", "long_g_mu", "long_g_m", "short_g_mu", "short_g_m")


def assert_close(actual: Tensor | Array, expected: Array, relative: float, what: str, floor: float = 1e-13) -> None:
    """‖a − b‖ ≤ relative·‖b‖, both finite. The floor is for sums of zero, of which only rounding is left."""
    a = actual.detach().double().numpy() if isinstance(actual, Tensor) else np.asarray(actual)
    assert a.shape == expected.shape, f"{what}: shape {a.shape}, expected {expected.shape}"
    off = (a - expected).ravel()
    difference, size = math.sqrt(np.dot(off, off)), math.sqrt(np.dot(expected.ravel(), expected.ravel()))
    assert difference <= relative * size + floor, (
        f"{what}: {a} is not {expected}, off by {difference:.1e} of {size:.1e}"
    )


class Beside(nn.Module):
    """Runs a layer and checks each use of it, and in the order of their arrival each gradient, against the oracle.

    Args:
        layer: a StreamingNorm with a named batch reference.
        ref: the name of that reference.
        relative: how near is near enough.
        **constants: ``p``, ``center``, ``scale`` and the stream's constants, in the oracle's spelling.
    """

    def __init__(self, layer: sn.Norm, ref: str | tuple[str, int], relative: float = 1e-10, **constants: Any) -> None:
        super().__init__()
        self.layer, self.ref, self.relative = layer, ref, relative
        channels = layer.num_features
        groups = {"channel": channels, "layer": 1}.get(ref, 0) if isinstance(ref, str) else ref[1]
        # The oracle's gain and bias share the memory of the layer's, so that an optimizer changes both.
        gain = np.ones(channels) if layer.weight is None else layer.weight.detach().numpy()
        bias = np.zeros(channels) if layer.bias is None else layer.bias.detach().numpy()
        self.oracle = Oracle(groups, channels, gain=gain, bias=bias, **constants)
        self.uses = self.gradients = 0
        self.zero_expected_gradients()

    def zero_expected_gradients(self) -> None:
        """As ``optimizer.zero_grad``, for the oracle."""
        self.d_gain, self.d_bias = np.zeros(self.layer.num_features), np.zeros(self.layer.num_features)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The layer's output, checked."""
        own = x.view_as(x)  # so that its gradient is that of this use alone
        y: Tensor = self.layer(own, mask)
        array, ids = x.detach().numpy().copy(), elements(self.ref, tuple(x.shape))
        valid = None if mask is None else mask.numpy()
        if not self.training:
            expected, _ = self.oracle.evaluate(array, ids, valid)
            self._check(y, expected, "output in evaluation")
            return y
        expected, use = self.oracle.forward(array, ids, valid, advances=x.requires_grad)
        self._check(y, expected, "output")
        self.uses += 1
        if y.requires_grad:
            self._follow(use, own, y)
        return y

    def _follow(self, use: Use, x: Tensor, y: Tensor) -> None:
        expected: list[Array] = []

        def arrives(dy: Tensor) -> None:
            dx, d_gain, d_bias = self.oracle.backward(use, dy.numpy())
            expected.append(dx)
            self.d_gain += d_gain
            self.d_bias += d_bias
            self.gradients += 1

        def leaves(dx: Tensor) -> None:
            self._check(dx, expected[0], "gradient of the input")

        y.register_hook(arrives)
        if x.requires_grad:
            x.register_hook(leaves)

    def check_state(self) -> None:
        """Every value of the state."""
        actual = np.concatenate([getattr(self.layer.state, name).numpy() for name in STATE])
        expected = np.stack([getattr(self.oracle, row) for row in ROWS])
        off = np.sqrt(((actual - expected) ** 2).sum(1))
        near = off <= self.relative * np.sqrt((expected**2).sum(1)) + 1e-13
        assert near.all(), dict(zip(ROWS, zip(actual.tolist(), expected.tolist(), strict=True), strict=True))
        assert self.layer.state.count.tolist() == self.oracle.count.tolist()
        assert self.layer.state.grad_count.tolist() == self.oracle.grad_count.tolist()
        assert (int(self.layer.state.samples), int(self.layer.state.grad_samples)) == (
            self.oracle.samples,
            self.oracle.grad_samples,
        )

    def check_parameter_gradients(self) -> None:
        """What has accumulated in the gain's and the bias's ``grad``."""
        for parameter, expected in ((self.layer.weight, self.d_gain), (self.layer.bias, self.d_bias)):
            if parameter is not None:
                actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                self._check(actual, expected, "gradient of gain or bias")

    def _check(self, actual: Tensor | Array, expected: Array, what: str) -> None:
        assert np.isfinite(expected).all(), f"{what}: the oracle diverged, which tests nothing"
        assert_close(actual, expected, self.relative, what)
