"""The streaming recursion inside networks that train: outputs, gradients and state against the oracle.

Each case trains a small network in float64 for 200 weight updates, with batch sizes, mini-batches per update and
uses per forward that change from one to the next. Between them come what real loops do: evaluation, a training
forward under ``no_grad``, a forward whose loss is thrown away, and padded batches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.beside import Beside
from torch import Tensor, nn

import streamnorm as sn
from streamnorm import ops

UPDATES = 200
ENGINES = [engine.name for engine in ops.ENGINES]

# As the layer takes them, and as the oracle does: the recursion may rely on no default.
WINDOW: list[tuple[sn.Stream, dict[str, Any]]] = [
    (sn.Stream(window=200), {"window": 200.0, "grad_window": 32.0, "limit": 4.0}),
    (sn.Stream(window=9.0, grad_window=20, limit=1.1), {"window": 9.0, "grad_window": 20.0, "limit": 1.1}),
    (sn.Stream(window=30, limit=math.inf), {"window": 30, "grad_window": 32.0, "limit": math.inf}),
    (sn.Stream(window=100, own=3), {"window": 100.0, "grad_window": 32.0, "limit": 4.0, "own": 3.0}),
]
EXPLICIT: list[tuple[sn.Stream, dict[str, Any]]] = [
    (sn.Stream(alpha=(0.7, 0.3)), {"alpha": (0.7, 0.3, 0), "beta": (0.7, 0.3, 0), "kappa": (0.7, 0.3, 0.7, 0.3)}),
    (
        sn.Stream(alpha=(0.5, 0.3, 0.2), beta=(0.7, 0, 0.3), kappa=0.9),
        {"alpha": (0.5, 0.3, 0.2), "beta": (0.7, 0, 0.3), "kappa": (0.9, 0.1, 0.9, 0.1)},
    ),
    (
        sn.Stream(alpha=(0.2, 0.2, 0.6), beta=(0.3, 0.2, 0.1), kappa=(0.6, 0.35, 0.8, 0.15)),
        {"alpha": (0.2, 0.2, 0.6), "beta": (0.3, 0.2, 0.1), "kappa": (0.6, 0.35, 0.8, 0.15)},
    ),
    (
        sn.Stream(alpha=(1, 0), limit=1.3),
        {"alpha": (1, 0, 0), "beta": (0.7, 0.3, 0), "kappa": (0.7, 0.3, 0.7, 0.3), "limit": 1.3},
    ),
    (sn.Stream(beta=(0, 0, 0)), {"alpha": (0.7, 0.3, 0), "beta": (0, 0, 0), "kappa": (0.7, 0.3, 0.7, 0.3)}),
]
CASES = list(itertools.product([1, 1.5, 2, 3, 7], ["mean", "zero"], ["raw", "gaussian"], ["window", "explicit"]))


class Vector(nn.Module):
    """Linear layers over (N, 5); the first norm sees the data, which need no gradient, and the last is shared."""

    shape: tuple[int, ...] = (5,)

    def __init__(self, norm: Callable[..., Beside]) -> None:
        super().__init__()
        self.data, self.shared = norm(1, 5, "channel"), norm(1, 4, ("group", 2))
        self.enter, self.again, self.leave = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, uses: int, mask: Tensor | None) -> Tensor:
        h = torch.tanh(self.enter(self.data(x, mask)))
        for _ in range(uses):
            h = h + 0.3 * self.shared(torch.relu(self.again(h)), mask)
        return self.leave(h)


class Sequence(nn.Module):
    """Convolutions over (N, 3, L)."""

    shape: tuple[int, ...] = (3, 4)

    def __init__(self, norm: Callable[..., Beside]) -> None:
        super().__init__()
        self.first, self.shared = norm(1, 4, "channel"), norm(1, 4, ("group", 2), affine=False)
        self.enter, self.again, self.leave = nn.Conv1d(3, 4, 3, padding=1), nn.Conv1d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor, uses: int, mask: Tensor | None) -> Tensor:
        h = torch.relu(self.first(self.enter(x), mask))
        for _ in range(uses):
            h = h + 0.3 * self.shared(self.again(h), mask)
        return self.leave(h.mean(2))


class Image(nn.Module):
    """As Sequence, over (N, 2, H, W); two uses of the shared norm side by side, not one after the other."""

    shape: tuple[int, ...] = (2, 3, 2)

    def __init__(self, norm: Callable[..., Beside]) -> None:
        super().__init__()
        self.shared = norm(2, 3, "layer")
        self.enter, self.again, self.leave = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

    def forward(self, x: Tensor, uses: int, mask: Tensor | None) -> Tensor:
        h = torch.relu(self.enter(x))
        branches = [self.shared(self.again(h) + 0.1 * use, mask) for use in range(uses)]
        return self.leave((h + 0.3 * torch.stack(branches).sum(0)).mean((2, 3)))


class Volume(nn.Module):
    """One norm over (N, 2, D, H, W), used again and again."""

    shape: tuple[int, ...] = (2, 2, 1, 2)

    def __init__(self, norm: Callable[..., Beside]) -> None:
        super().__init__()
        self.shared = norm(3, 2, "channel")
        self.enter, self.leave = nn.Conv3d(2, 2, 1), nn.Linear(2, 2)

    def forward(self, x: Tensor, uses: int, mask: Tensor | None) -> Tensor:
        h = self.enter(x)
        for _ in range(uses):
            h = torch.tanh(self.shared(h, mask))
        return self.leave(h.mean((2, 3, 4)))


NETWORKS: list[Callable[..., Any]] = [Vector, Sequence, Image, Volume]
LAYERS = {1: sn.StreamingNorm1d, 2: sn.StreamingNorm2d, 3: sn.StreamingNorm3d}


@pytest.mark.parametrize(("p", "center", "scale", "rule"), CASES, ids=lambda value: f"{value}")
@pytest.mark.parametrize("engine", ENGINES)
def test_two_hundred_updates(engine: str, p: float, center: str, scale: str, rule: str) -> None:
    case = CASES.index((p, center, scale, rule))
    rng = np.random.default_rng(case)
    rules = WINDOW if rule == "window" else EXPLICIT
    stream, constants = rules[case // 2 % len(rules)]

    def norm(dims: int, channels: int, ref: str | tuple[str, int], **options: Any) -> Beside:
        options |= {"p": p, "center": center, "scale": scale, "ref": ref, "dtype": torch.float64}
        layer = LAYERS[dims](channels, **options)
        layer.set_stream(stream)
        return Beside(layer, ref, p=p, center=center, scale=scale, **constants)

    net = NETWORKS[(case // 2 + case // 8) % len(NETWORKS)](norm).double()
    with ops.force(engine):
        _train(net, rng)


def _train(net: Any, rng: np.random.Generator) -> None:
    norms = [module for module in net.modules() if isinstance(module, Beside)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for update in range(UPDATES):
        optimizer.zero_grad()
        for norm in norms:
            norm.zero_expected_gradients()
        for _ in range(int(rng.choice([1, 1, 1, 2]))):
            _mini_batch(net, rng)
        if update % 10 == 3:
            _evaluate(net, rng)
        for norm in norms:
            norm.check_state()
            norm.check_parameter_gradients()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)  # with streaming gradients not every case is stable
        optimizer.step()  # the layers notice by themselves
        for norm in norms:
            norm.oracle.commit()
            norm.check_state()
    assert all(norm.uses > UPDATES for norm in norms)
    assert all(norm.gradients > UPDATES / 2 for norm in norms)


def _mini_batch(net: Any, rng: np.random.Generator) -> None:
    x, mask = _inputs(net, rng)
    target = torch.from_numpy(rng.normal(0, 1, (len(x), 2)))
    what = rng.choice(["backward"] * 8 + ["no_grad", "thrown away"])
    with torch.set_grad_enabled(what != "no_grad"):
        loss = (net(x, int(rng.choice([1, 1, 2, 3])), mask) - target).square().mean()
    if what == "backward":
        loss.backward()


def _inputs(net: Any, rng: np.random.Generator) -> tuple[Tensor, Tensor | None]:
    shape = (int(rng.choice([1, 1, 2, 3, 5])), *net.shape)
    x = torch.from_numpy(rng.normal(0.5, 1.5, shape))
    kind = rng.choice(["none", "none", "samples", "places"])
    if kind == "none":
        return x, None
    # Masks may leave whole samples out, and at times all of them.
    return x, torch.from_numpy(rng.random(shape[:1] if kind == "samples" else shape[:1] + shape[2:]) < 0.7)


@torch.no_grad()
def _evaluate(net: Any, rng: np.random.Generator) -> None:
    net.eval()
    net(*_with_uses(_inputs(net, rng)))
    net.train()


def _with_uses(inputs: tuple[Tensor, Tensor | None]) -> tuple[Tensor, int, Tensor | None]:
    return inputs[0], 2, inputs[1]
