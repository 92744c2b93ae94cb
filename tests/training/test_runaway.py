"""Training that runs away is said once for each layer; training that goes well, and data that jump, are not.

Warnings are errors in tests, so that each test without one says that there is none.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import streamnorm as sn
from streamnorm import ops
from streamnorm.layers import streaming_layers
from streamnorm.ops import native
from streamnorm.training import runaway


@pytest.fixture(autouse=True)
def _looks_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the engines that are looked at now and then, the sixteenth commit of a test is the first."""
    monkeypatch.setattr(runaway, "_commits", itertools.count(1))
    monkeypatch.setattr(runaway, "_unread", {})


@contextmanager
def said() -> Iterator[list[str]]:
    """What is warned of."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
        texts += [str(warning.message) for warning in caught]


def update(layer: sn.Norm, x: Tensor, gradient: float = 1.0, times: int = 1) -> None:
    """Weight updates: a forward and a backward pass, and a commit."""
    for _ in range(times):
        y = layer(x.clone().requires_grad_())
        y.backward(torch.full_like(y, gradient))
        sn.commit(layer)


def network(**options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        sn.StreamingNorm2d(8, **options),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        sn.StreamingNorm2d(8, **options),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 64, 10),
    )


def train(model: nn.Module, rate: float, updates: int) -> None:
    """On random images and labels, one at a time."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    for _ in range(updates):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(1, 3, 8, 8)), torch.randint(10, (1,))).backward()
        optimizer.step()


@pytest.mark.parametrize("p", [1, 2])
def test_a_rate_that_is_too_high(engine: str, p: float) -> None:
    """With constants, which have no bound and stream gradients in their own unit."""
    model = network(p=p, scale="raw")
    for layer in streaming_layers(model):
        layer.set_stream(sn.Stream(alpha=(0.98, 0.02), beta=(0.98, 0.02), kappa=0.98))
    with said() as texts:
        train(model, 0.5, 150)
    assert [" ".join(texts).count(f"{name} (StreamingNorm2d)") for name in (1, 4)] == [1, 1]
    for text in texts:
        assert "runs away: " in text
        assert "Lower the learning rate" in text
        assert "alpha and kappa" in text


def test_a_rate_that_is_right(engine: str) -> None:
    train(network(), 0.003, 100)


def test_it_is_said_at_the_third_leap() -> None:
    layer = sn.StreamingNorm1d(3, window=5, p=2)
    with ops.force("native"):
        for scale in (1.0, 1e3, 1.0, 1.0, 1e6):
            update(layer, scale * torch.randn(8, 3))
        before = layer.long[1].mean().sqrt().item()
        with pytest.warns(UserWarning, match="runs away: its scale leapt 3 times to more than 10 times what") as caught:
            update(layer, 1e9 * torch.randn(8, 3))
        after = layer.long[1].mean().sqrt().item()
        update(layer, 1e12 * torch.randn(8, 3))  # once is enough
    text = str(caught[0].message)
    assert text.startswith(repr(layer))  # it stands in no model
    assert f"the last time from {before:.3g} to {after:.3g}, which ends in NaN" in text


@pytest.mark.parametrize("p", [1, 2, 7])
@pytest.mark.parametrize("samples", [1, 32])
@pytest.mark.parametrize("options", [{"window": 5}, {"window": 200}, {"window": 1e5}, {"kappa": 0.7}], ids=str)
def test_data_that_jump_are_no_alarm(options: dict[str, float], samples: int, p: float) -> None:
    """However far they lie from the prior, and once more: an average that follows at most doubles after a jump."""
    layer = sn.StreamingNorm1d(16, p=p, **options)  # type: ignore[arg-type]
    for scale in (1e3, 1e4) if p == 7 else (1e4, 1e8):
        for _ in range(100):
            update(layer, scale * (torch.randn(samples, 16) + 3))


def test_outliers_that_come_again_are_no_alarm() -> None:
    """They leap, and no further than before."""
    layer = sn.StreamingNorm1d(4, window=5)
    for step in range(400):
        update(layer, (1e5 if step % 50 == 49 else 1.0) * torch.randn(2, 4))


def test_rare_features_are_no_alarm() -> None:
    layer = sn.StreamingNorm1d(8, window=5)
    for _ in range(500):
        update(layer, F.one_hot(torch.randint(8, (1,)), 8).float())


def test_a_layer_that_wakes_up_is_no_alarm() -> None:
    """Constant inputs let the scale decay towards 0, and the first others lift it by orders of magnitude."""
    layer = sn.StreamingNorm1d(4, window=5)
    for _ in range(4):
        for _ in range(60):
            update(layer, torch.zeros(4, 4))
        for _ in range(20):
            update(layer, torch.randn(4, 4))


def test_calibration_is_no_alarm() -> None:
    layer = sn.StreamingNorm1d(4)
    for scale in (1e2, 1e4, 1e6, 1e8):
        sn.calibrate(layer, [scale * torch.randn(8, 4) for _ in range(3)])
        for _ in range(5):
            update(layer, scale * torch.randn(8, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_again_and_again(value: float) -> None:
    layer = sn.StreamingNorm1d(4)
    bad = torch.randn(8, 4)
    bad[2, 1] = value
    with ops.force("native"):
        for x in (bad, torch.randn(8, 4), bad, torch.randn(8, 4)):
            update(layer, x)
        with pytest.warns(UserWarning, match=r"NaN and infinity were all that statistics met \(1 of 4\)") as caught:
            update(layer, bad)
        update(layer, bad, times=5)
    assert len(caught) == 1
    assert "Look for the first of them in the data, the weights and the loss. Lower the learning rate" in str(
        caught[0].message
    )


def test_gradients_that_are_not_finite_again_and_again() -> None:
    layer = sn.StreamingNorm1d(4)
    with ops.force("native"):
        update(layer, torch.randn(8, 4), math.nan, times=2)
        with pytest.warns(UserWarning, match=r"all that gradients of its statistics met \(4 of 4\)"):
            update(layer, torch.randn(8, 4), math.nan)


def test_a_mini_batch_among_others_is_no_alarm(engine: str) -> None:
    layer = sn.StreamingNorm1d(4)
    for _ in range(20):
        layer(torch.full((8, 4), math.nan))
        update(layer, torch.randn(8, 4))


def test_what_a_mask_hides_is_no_alarm(engine: str) -> None:
    """A place that is padding in every sequence has no values at all."""
    layer = sn.StreamingNorm1d(2, ref=sn.NormRef.of("n c l -> c l", l=5))
    everything = sn.StreamingNorm1d(2)
    mask = torch.tensor([True, True, True, False, False]).expand(4, 5)
    for _ in range(20):
        layer(torch.randn(4, 2, 5), mask)
        sn.commit(layer)
        everything(torch.randn(4, 2, 5), torch.zeros(4, 5, dtype=torch.bool))
        sn.commit(everything)
    if engine == "native":
        for _ in range(2):
            layer(torch.full((4, 2, 5), math.nan), mask)
            sn.commit(layer)
        layer(torch.full((4, 2, 5), math.nan), mask)
        with pytest.warns(UserWarning, match=r"\(10 of 10\)"):
            sn.commit(layer)


def test_a_moment_of_a_high_order_overflows_early() -> None:
    layer = sn.StreamingNorm1d(4, p=7)
    with ops.force("native"), pytest.warns(UserWarning, match=r"take a smaller p: \|x\|\^7 overflows early"):
        update(layer, 1e7 * torch.randn(8, 4), times=3)


def test_constants_in_place_of_a_window_are_named() -> None:
    layer = sn.StreamingNorm1d(4, kappa=0.5)
    with ops.force("native"), pytest.warns(UserWarning, match="alpha and kappa, the weights of the past"):
        update(layer, math.nan * torch.randn(8, 4), times=3)


def test_layers_that_run_away_at_the_same_update_are_named_together() -> None:
    model = nn.Sequential(sn.StreamingNorm1d(4), sn.StreamingNorm1d(4, affine=False))
    with ops.force("native"), said() as texts:
        for _ in range(5):
            model(torch.full((8, 4), math.nan))
            sn.commit(model)
    assert len(texts) == 1
    assert texts[0].startswith("0 (StreamingNorm1d) runs away: ")
    assert texts[0].endswith("At the same update: 1 (StreamingNorm1d)")


@pytest.mark.parametrize("again", [sn.reset_stats, copy.deepcopy])
def test_a_layer_that_starts_over_is_looked_at_anew(again: Callable[[sn.Norm], Any]) -> None:
    layer = sn.StreamingNorm1d(4)
    with ops.force("native"):
        for _ in range(2):
            with pytest.warns(UserWarning, match="runs away"):
                update(layer, math.nan * torch.randn(8, 4), times=3)
            layer = again(layer) or layer


def test_other_engines_look_now_and_then() -> None:
    """At every sixteenth commit, and three looks are needed."""
    layer = sn.StreamingNorm1d(4)
    with ops.force("torch"):
        update(layer, math.nan * torch.randn(8, 4), times=3 * runaway.EVERY - 1)
        with pytest.warns(UserWarning, match="runs away"):
            update(layer, math.nan * torch.randn(8, 4))


def test_an_accelerator_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer is read at the next look, and left alone if it has not come by then."""
    answered = iter([True, False, True, True, True])
    monkeypatch.setattr(torch, "Event", lambda _: SimpleNamespace(record=lambda: None, query=lambda: next(answered)))
    layer, device = sn.StreamingNorm1d(4), torch.device("cpu")
    layer(math.nan * torch.randn(8, 4))
    missed = []
    for _ in range(4):
        runaway._judge_later(device, [layer])
        missed.append(runaway._records[layer].missed if layer in runaway._records else 0)
    assert missed == [0, 1, 1, 2]
    with pytest.warns(UserWarning, match="runs away"):
        runaway._judge_later(device, [layer])
    other = sn.StreamingNorm1d(2)
    runaway._unread.clear()
    runaway._judge_later(device, [other])
    del other  # gone before the answer is read
    runaway._judge_later(device, [layer])


def test_nothing_is_measured_where_values_cannot_be_read() -> None:
    layer = sn.StreamingNorm1d(4, device="meta")
    runaway._commits = itertools.count(runaway.EVERY)
    with ops.force("torch"):
        layer(torch.empty(8, 4, device="meta"))
        sn.commit(layer)
    assert layer not in runaway._records


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_signs_of_the_cpp_engine(p: float, dtype: torch.dtype) -> None:
    """Beside what the reference makes of the same states."""
    kinds = set()
    for seed in range(40):
        torch.manual_seed(seed)
        stream = sn.Stream(window=5) if seed % 2 else sn.Stream(kappa=(0.2, 0.8, 0.3, 0.7))
        layer = sn.Norm(9, sn.NormRef.batch("channel"), sn.LpMoment(p), stream, dtype=dtype)
        state = layer.state
        state.long[1] = torch.rand(9) + 0.1
        state.short.copy_(torch.rand(2, 9) * 10 ** (p * torch.randint(0, 4, ()).item()))
        state.count.fill_(3)
        state.grad_count.fill_(3)
        state.samples.fill_(int(seed % 7 > 0))
        state.grad_samples.fill_(int(seed % 5 > 0))
        for counts in (state.count, state.grad_count):
            if torch.rand(()) < 0.3:
                counts[torch.randint(9, (2,))] = 0
        before, present = state.long[1].sum().item(), state.short[1].sum().item()
        missed = [
            int((c == 0).sum()) * int(s > 0)
            for c, s in ((state.count, state.samples), (state.grad_count, state.grad_samples))
        ]
        twin = copy.deepcopy(layer)
        ops.plain.commit([(twin.state, twin.formula)])
        after = twin.state.long[1].sum().item()
        rest, signs = native.ENGINE.commit([(state, layer.formula)])
        assert not rest
        for ours, theirs in zip(state, twin.state):
            torch.testing.assert_close(ours, theirs)
        expected = after > runaway.LEAP**p * before, *map(bool, missed)
        kinds.add(expected)
        outgrown = present > layer.formula.limit**p * before
        assert len(signs) == (any(expected) or outgrown)
        for sign in signs:
            assert (sign.use, sign.missed, sign.missed_gradients) == (0, *missed)
            assert (sign.before, sign.present) == pytest.approx((before, present), rel=1e-5)
            assert sign.after == pytest.approx(after, rel=1e-5)
    assert {(True, False, False), (False, False, False), (False, True, False), (False, False, True)} <= kinds


def outgrow(layer: sn.Norm, updates: int, scale: float = 1e3) -> None:
    """Inputs of a scale that the layer had never seen."""
    for _ in range(updates):
        update(layer, scale * torch.randn(8, 3))


def test_a_memory_that_is_outgrown(engine: str) -> None:
    layer = sn.StreamingNorm1d(3, window=100_000)
    layer.seen.fill_(10**6)  # as after `convert` of a trained network
    with said() as texts:
        outgrow(layer, 60)
    assert texts == []
    with said() as texts:
        outgrow(layer, 2 * runaway.EVERY + 10)
    (text,) = texts
    assert text.startswith(f"{layer!r} runs away: for 64 weight updates its input has had more than 4 times the scale")
    assert "or shorten the memory of the statistics (window, now 100000)" in text
    outgrow(layer, 100)  # once is enough


def test_a_memory_that_is_outgrown_now_and_then_is_no_alarm(engine: str) -> None:
    """Beside commits in which it is not, and behind a jump that a usual memory follows."""
    layer = sn.StreamingNorm1d(3, window=100_000)
    layer.seen.fill_(10**6)
    for _ in range(40):
        outgrow(layer, 3)
        outgrow(layer, 17, scale=1.0)
    layer = sn.StreamingNorm1d(3, window=200)
    outgrow(layer, 100, scale=1.0)
    outgrow(layer, 100)
