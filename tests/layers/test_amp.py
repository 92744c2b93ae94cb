"""Automatic mixed precision: the training curve of float32, with statistics in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import streamnorm as sn

STEPS = 60


def dense() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 32), sn.StreamingNorm1d(32), nn.ReLU(), nn.Linear(32, 32), sn.StreamingNorm1d(32), nn.ReLU(),
        nn.Linear(32, 4),
    )  # fmt: skip


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 16, 3, padding=1), sn.StreamingNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), sn.StreamingNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip


def data() -> list[tuple[Tensor, Tensor]]:
    """Four classes, each a Gaussian; two mini-batches of 4 to an update."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(4, 8, generator=generator)
    targets = torch.randint(0, 4, (STEPS * 2, 4), generator=generator)
    return [(centres[t] + 0.7 * torch.randn(4, 8, generator=generator), t) for t in targets]


def curve(
    model: nn.Module,
    dtype: torch.dtype | None,
    scaler: torch.amp.GradScaler | None = None,
    skipped: list[int] | None = None,
) -> Tensor:
    """The losses, ten to a number; with a scaler the updates that it skips are noted, without one they are skipped."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sn.bind(model, optimizer, scaler=scaler)
    skipped = [] if skipped is None else skipped
    losses: list[float] = []
    for number, (x, target) in enumerate(data()):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(x).float(), target) / 2
        losses.append(loss.item())
        (loss if scaler is None else scaler.scale(loss)).backward()
        if number % 2:
            if scaler is not None:
                before = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                if scaler.get_scale() < before:
                    skipped.append(number)
            elif number not in skipped:
                optimizer.step()
            optimizer.zero_grad()
    return torch.tensor(losses).view(-1, 10).sum(1) / 5


@pytest.mark.parametrize("make", [dense, convolutional])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_curve_is_that_of_float32(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model = make()
    half = copy.deepcopy(model)
    expected, seen = curve(model, None), curve(half, dtype)
    assert expected[-1] < 0.5 * expected[0]  # it learns
    torch.testing.assert_close(seen, expected, rtol=0.02, atol=0.005)
    kept = {buffer.dtype for buffer in half.buffers() if buffer.is_floating_point()}
    assert kept == {torch.float32}


@pytest.mark.parametrize("make", [dense, convolutional])
def test_a_scale_that_overflows_and_grows_changes_rounding_only(make: Callable[[], nn.Module]) -> None:
    """Beside float32 that leaves out the same updates."""
    model = make()
    half = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=4)
    skipped: list[int] = []
    seen = curve(half, torch.float16, scaler, skipped)
    assert len(skipped) > 4
    assert skipped != list(range(1, 2 * len(skipped), 2))  # the scale grew again, and overflowed again
    torch.testing.assert_close(seen, curve(model, None, skipped=skipped), rtol=0.05, atol=0.01)
    assert all(torch.isfinite(buffer).all() for buffer in half.buffers())


def test_the_scale_leaves_no_trace_in_the_streams() -> None:
    """In float32, where no step overflows, a bound scaler that grows all the time changes nothing but rounding."""
    model = dense()
    scaled = copy.deepcopy(model)
    expected = curve(model, None)
    seen = curve(scaled, None, torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=2))
    torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(scaled.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-4)
