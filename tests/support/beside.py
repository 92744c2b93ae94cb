"""A streaming layer with its oracle beside it: every use, every gradient and every state value goes through both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from support.oracle import Array, Oracle, Use, elements
from torch import Tensor, nn

import streamnorm as sn

Backward = Callable[[Use, Array], tuple[Array, Array, Array]]
STATE = ("long", "short", "long_grad", "short_grad")
ROWS = ("long_mu", "long_m", "short_mu", "short_m", "long_g_mu", "long_g_m", "short_g_mu", "short_g_m")


# How near to the oracle: relative to ‖b‖, and absolutely for sums near zero, of which only rounding is left.
NEAR = {
    torch.float64: (1e-10, 1e-13),
    torch.float32: (1e-4, 3e-6),
    torch.float16: (4e-3, 2e-3),
    torch.bfloat16: (3e-2, 2e-2),
}


class Diverged(AssertionError):
    """The recursion left the numbers that can be compared: what was asked for tests nothing."""


def assert_close(actual: Tensor, expected: Array, what: str, dtype: torch.dtype | None = None) -> None:
    """‖a − b‖ ≤ relative·‖b‖ + floor, for the tensor's own dtype or for a coarser one that it was computed from."""
    a = actual.detach().double().numpy()
    assert a.shape == expected.shape, f"{what}: shape {a.shape}, expected {expected.shape}"
    relative, floor = NEAR[dtype or actual.dtype]
    off = (a - expected).ravel()
    difference, size = math.sqrt(np.dot(off, off)), math.sqrt(np.dot(expected.ravel(), expected.ravel()))
    near = difference <= relative * size + floor
    assert near, f"{what}: {a} is not {expected}, off by {difference:.1e} of {size:.1e}"


class Beside(nn.Module):
    """Runs a layer and checks each use of it, and in the order of their arrival each gradient, against the oracle.

    Args:
        layer: a streaming layer.
        ref: its reference, as the oracle names it.
        **constants: ``p``, ``center``, ``scale`` and the stream's constants, in the oracle's spelling.
    """

    def __init__(self, layer: sn.Norm, ref: str | tuple[str, int], **constants: Any) -> None:
        super().__init__()
        self.layer, self.ref, self.constants = layer, ref, constants
        self.coarsest = layer.state.long.dtype
        self.reset_oracle()
        self.uses = self.gradients = 0
        self.zero_expected_gradients()

    def reset_oracle(self) -> None:
        """As ``sn.reset_stats``, for the oracle."""
        self.oracle = Oracle(self.layer.state.count.numel(), self.layer.num_features, **self.constants)

    def zero_expected_gradients(self) -> None:
        """As ``optimizer.zero_grad``, for the oracle."""
        self.d_gain, self.d_bias = np.zeros(self.layer.num_features), np.zeros(self.layer.num_features)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The layer's output, checked."""
        self.coarsest = max(self.coarsest, x.dtype, key=lambda dtype: NEAR[dtype])
        own = x.view_as(x)  # so that its gradient is that of this use alone
        y: Tensor = self.layer(own, mask)
        array, ids = x.detach().double().numpy(), elements(self.ref, tuple(x.shape))
        valid = None if mask is None else mask.numpy()
        for parameter, name in ((self.layer.weight, "gain"), (self.layer.bias, "bias")):
            if parameter is not None:  # an optimizer may have changed it
                setattr(self.oracle, name, parameter.detach().double().numpy().copy())
        if self.training and not self.layer.frozen:
            self.uses += 1
            expected, use = self.oracle.forward(array, ids, valid, advances=x.requires_grad)
            follow = self.oracle.backward
        else:
            expected, use = self.oracle.evaluate(array, ids, valid)
            follow = self.oracle.evaluation_backward
        self._check(y, expected, "output")
        if y.requires_grad:
            self._follow(follow, use, own, y)
        return y

    def _follow(self, oracle_backward: Backward, use: Use, x: Tensor, y: Tensor) -> None:
        expected: list[Array] = []

        def arrives(dy: Tensor) -> None:
            dx, d_gain, d_bias = oracle_backward(use, dy.double().numpy())
            expected.append(dx)
            self.d_gain += d_gain
            self.d_bias += d_bias
            self.gradients += 1

        def leaves(dx: Tensor) -> None:
            self._check(dx, expected.pop(), "gradient of the input")

        y.register_hook(arrives)
        if x.requires_grad:
            x.register_hook(leaves)

    def check_state(self) -> None:
        """Every value of the state."""
        actual = np.concatenate([getattr(self.layer.state, name).numpy() for name in STATE])
        expected = np.stack([getattr(self.oracle, row) for row in ROWS])
        _assert_converged(expected, "state")
        relative, floor = NEAR[self.layer.state.long.dtype]
        off = np.sqrt(((actual - expected) ** 2).sum(1))
        near = off <= relative * np.sqrt((expected**2).sum(1)) + floor
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
                self.coarsest = max(self.coarsest, parameter.dtype, key=lambda dtype: NEAR[dtype])
                actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                self._check(actual, expected, "gradient of gain or bias", self.coarsest)

    def _check(self, actual: Tensor, expected: Array, what: str, dtype: torch.dtype | None = None) -> None:
        _assert_converged(expected, what)
        assert_close(actual, expected, what, dtype)


def _assert_converged(expected: Array, what: str) -> None:
    if not (np.abs(expected) < 1e100).all():  # also for a NaN; above it a norm may have none
        raise Diverged(f"{what}: the oracle diverged, which tests nothing")
