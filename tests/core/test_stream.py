"""Stream and LpMoment: their constants, what evaluation makes of a state, and what a commit does to it."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import pytest
import torch
from scipy import integrate
from torch import Tensor

import streamnorm as sn
from streamnorm import LpMoment, Stream, ops
from streamnorm.core.spec import State

# Constants


def test_the_default_is_the_window_rule() -> None:
    stream = Stream()
    assert stream.window == 200
    assert (stream.alpha, stream.beta, stream.kappa) == (None, None, None)
    assert Stream(window=7).window == 7


def test_layers_for_images_give_a_mini_batch_a_share_of_the_gradient() -> None:
    kinds = (sn.StreamingNorm1d, sn.StreamingNorm2d, sn.StreamingNorm3d)
    assert [kind(2).formula.own for kind in kinds] == [math.inf, 8, 8]
    assert sn.StreamingNorm2d(2, kappa=0.7).formula.own == math.inf
    formula = Stream(window=9, own=8).formula(1, True, 1, 1e-5)
    assert formula.weights(6, 3, 2, use=2).beta == pytest.approx((0.8 * 32 / 35, 0.8 * 3 / 35, 0.2))
    assert formula.weights(6, 3, 2, use=2).kappa == formula.weights(6, 3, 2).kappa
    assert repr(Stream(own=8)) == "Stream(window=200, own=8)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"own": 0}, "a number above 0, or math.inf for no weight, got 0"),
        ({"own": 8, "kappa": 0.7}, "own=8 and kappa=0.7 exclude each other"),
    ],
)
def test_a_share_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stream(**arguments)


@pytest.mark.parametrize("given", [{"alpha": (0.7, 0.3)}, {"beta": (0.7, 0.3, 0)}, {"kappa": 0.7}])
def test_one_constant_brings_the_papers_others(given: dict[str, Any]) -> None:
    stream = Stream(**given)
    assert stream.window is None
    assert (stream.alpha, stream.beta) == ((0.7, 0.3, 0), (0.7, 0.3, 0))
    assert stream.kappa == pytest.approx((0.7, 0.3, 0.7, 0.3))


def test_short_forms() -> None:
    stream = Stream(alpha=[0.25, 0.75], beta=(1, 2), kappa=(0, 1, 0.5, 0.25))
    assert stream.alpha == (0.25, 0.75, 0)
    assert stream.beta == (1, 2, 0)
    assert stream.kappa == (0, 1, 0.5, 0.25)
    assert Stream(kappa=1).kappa == (1, 0, 1, 0)


@pytest.mark.parametrize(
    "stream",
    [
        Stream(),
        Stream(window=12.5),
        Stream(alpha=(0.5, 0.25, 0.25), kappa=0.75),
        Stream(beta=(0, 0, 0), prior=(1.0, 2.0)),
    ],
    ids=str,
)
def test_copies_are_equal(stream: Stream) -> None:
    assert eval(repr(stream)) == stream
    assert copy.deepcopy(stream) == stream
    assert pickle.loads(pickle.dumps(stream)) == stream
    assert dataclasses.replace(stream) == stream
    assert hash(dataclasses.replace(stream)) == hash(stream)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 7])
def test_the_gaussian_scale_is_the_standard_deviation_of_normal_data(p: float) -> None:
    def integrand(x: float) -> float:
        return abs(x) ** p * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    moment, _ = integrate.quad(integrand, -40, 40, points=[0])
    assert LpMoment(p, scale="gaussian").k * moment ** (1 / p) == pytest.approx(1, rel=1e-7)
    assert LpMoment(p).k == 1


def test_the_prior_is_where_the_long_term_starts() -> None:
    layer = sn.Norm(3, sn.NormRef.batch("channel"), LpMoment(2), Stream(prior=(0.5, 4.0)))
    assert layer.long.tolist() == [[0.5] * 3, [4.0] * 3]
    mu, variance = layer.eval_stats()
    assert mu.tolist() == [0.5] * 3
    assert variance.tolist() == [4.0] * 3
    layer.long.fill_(9)
    layer.reset_stats()
    assert layer.long.tolist() == [[0.5] * 3, [4.0] * 3]


def test_the_constants_can_change_while_the_state_stays() -> None:
    layer = sn.StreamingNorm1d(2, window=10)
    layer(torch.randn(5, 2))
    before = layer.short.clone()
    layer.set_stream(Stream(kappa=(0, 1, 0, 1)))
    assert layer.short.equal(before)
    sn.commit(layer)
    assert layer.long.equal(before)


# Evaluation


def state(samples: int, count: list[int]) -> State:
    """Two indices, with long at 1 and 2 and short at 5 and 6."""
    new = Stream().new_state(2, None, torch.float64)
    new.long.copy_(torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    new.short.copy_(torch.tensor([[5.0, 5.0], [6.0, 6.0]]))
    new.count.copy_(torch.tensor(count))
    new.samples.fill_(samples)
    new.seen.fill_(1000)
    return new


@pytest.mark.parametrize(
    ("stream", "samples", "count", "mu"),
    [
        (Stream(alpha=(0.75, 0.25)), 8, [8, 8], [2, 2]),
        (Stream(alpha=(0.75, 0.25)), 8, [8, 0], [2, 1]),
        (Stream(alpha=(0.3, 0.1, 0.6)), 8, [8, 8], [2, 2]),
        (Stream(alpha=(0, 0, 1)), 8, [8, 8], [1, 1]),
        (Stream(alpha=(0, 1)), 8, [8, 0], [5, 1]),
        (Stream(alpha=(1, 0)), 8, [8, 8], [1, 1]),
        (Stream(window=24), 8, [80, 80], [2, 2]),
        (Stream(window=24), 8, [80, 0], [2, 1]),
        (Stream(window=24), 0, [0, 0], [1, 1]),
        (Stream(window=3048), 1016, [8, 8], [3, 3]),
    ],
    ids=str,
)
def test_evaluation_weighs_long_and_short(stream: Stream, samples: int, count: list[int], mu: list[float]) -> None:
    actual = stream.evaluation(state(samples, count))
    torch.testing.assert_close(actual[0], torch.tensor(mu, dtype=torch.float64))
    torch.testing.assert_close(actual[1], torch.tensor(mu, dtype=torch.float64) + 1)


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("scale", ["raw", "gaussian"])
@pytest.mark.parametrize("ref", ["channel", "layer", ("group", 2)], ids=str)
def test_evaluation_is_a_fixed_affine_map(p: float, scale: str, ref: Any) -> None:
    layer = sn.StreamingNorm1d(4, p=p, scale=scale, ref=ref, window=10).double()
    for n in (3, 5):
        layer(torch.randn(n, 4, dtype=torch.float64) * 3 + 2)
        sn.commit(layer)
    layer(torch.randn(2, 4, dtype=torch.float64))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    share = 2 / 12  # of a memory that is full
    mu, m = (1 - share) * layer.long + share * layer.short
    sigma = LpMoment(p, scale=scale).k * m ** (1 / p)
    channels = torch.arange(4) // (4 // len(mu))
    x = torch.randn(6, 4, dtype=torch.float64)
    x_hat = (x - mu[channels]) / (sigma[channels] ** 2 + 1e-5).sqrt()
    torch.testing.assert_close(layer.eval()(x), x_hat * layer.weight + layer.bias)


# Commit


def filled(
    counts: list[int], grad_counts: list[int], dtype: torch.dtype = torch.float64, stream: Stream | None = None
) -> sn.Norm:
    """A layer of three indices in the middle of an update: what has no count has no short-term average."""
    layer = sn.StreamingNorm1d(3).to(dtype)
    layer.set_stream(stream or Stream())
    for name, count in (("", counts), ("_grad", grad_counts)):
        long, short = layer.get_buffer("long" + name), layer.get_buffer("short" + name)
        long.copy_(torch.randn(2, 3))
        short.copy_(torch.randn(2, 3) * (torch.tensor(count) > 0))
        layer.get_buffer("grad_count" if name else "count").copy_(torch.tensor(count))
    layer.samples.fill_(6)
    layer.grad_samples.fill_(4)
    layer.seen.fill_(2)
    return layer


def mixed(old: Tensor, short: Tensor, used: list[bool], keep: float, take: float) -> Tensor:
    return torch.where(torch.tensor(used), keep * old + take * short, old)


@pytest.mark.parametrize("counts", [[6, 6, 6], [6, 0, 2], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("grad_counts", [[4, 4, 4], [0, 4, 0]], ids=str)
@pytest.mark.parametrize(
    ("stream", "kappa"),
    [
        (Stream(kappa=(0.9, 0.2, 0.6, 0.3)), (0.9, 0.2, 0.6, 0.3)),
        (Stream(kappa=0.7), (0.7, 0.3, 0.7, 0.3)),
        (Stream(kappa=(0, 1, 1, 0)), (0, 1, 1, 0)),
        (Stream(window=5, grad_window=8), (5 / 11, 6 / 11, 8 / 12, 4 / 12)),
        (Stream(window=50, grad_window=50), (18 / 24, 6 / 24, 50 / 54, 4 / 54)),
    ],
    ids=str,
)
def test_commit(
    engine: str, stream: Stream, kappa: tuple[float, ...], counts: list[int], grad_counts: list[int]
) -> None:
    layer = filled(counts, grad_counts, stream=stream)
    forward = mixed(layer.long, layer.short, [n > 0 for n in counts], *kappa[:2])
    backward = mixed(layer.long_grad, layer.short_grad, [n > 0 for n in grad_counts], *kappa[2:])
    sn.commit(layer)
    torch.testing.assert_close(layer.long, forward, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(layer.long_grad, backward, rtol=1e-14, atol=1e-15)
    for name in ("short", "short_grad", "count", "grad_count", "samples", "grad_samples"):
        assert not layer.get_buffer(name).any()
    assert layer.seen == 8


def test_an_index_that_was_not_used_keeps_every_bit(engine: str) -> None:
    for stream in (Stream(), Stream(kappa=0.7)):
        layer = filled([6, 0, 6], [0, 4, 0], stream=stream)
        each = copy.deepcopy(layer)
        sn.commit(each)
        assert each.long[:, 1].equal(layer.long[:, 1])
        assert each.long_grad[:, ::2].equal(layer.long_grad[:, ::2])
        assert not each.long[:, 0].equal(layer.long[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_engines_commit_alike(engine: str, dtype: torch.dtype) -> None:
    streams = (Stream(), Stream(kappa=0.7), Stream(window=3), Stream(alpha=(0, 1)))
    layers = [filled([6, 0, 2], [4, 4, 0], dtype, stream) for stream in streams]
    model, reference = torch.nn.ModuleList(layers), torch.nn.ModuleList(copy.deepcopy(layers))
    sn.commit(model)
    with ops.force("plain"):
        sn.commit(reference)
    for ours, theirs in zip(model.buffers(), reference.buffers()):
        torch.testing.assert_close(ours, theirs)


def test_layers_of_several_dtypes_commit_together(engine: str) -> None:
    model = torch.nn.ModuleList([filled([6, 0, 2], [4, 4, 0], dtype) for dtype in (torch.float32, torch.float64)])
    alone = copy.deepcopy(model)
    sn.commit(model)
    for layer in alone:
        sn.commit(layer)
    for ours, theirs in zip(model.buffers(), alone.buffers()):
        assert ours.equal(theirs)


def test_until_its_memory_is_full_a_window_forgets_nothing(engine: str) -> None:
    """Twelve updates of one sample and one of twelve give the mean of all, with the prior as 16 samples."""
    often, once = (sn.StreamingNorm1d(1, window=28, center="zero").double() for _ in range(2))
    x = torch.full((12, 1), 3.0, dtype=torch.float64)
    for row in x.split(1):
        often(row)
        sn.commit(often)
    once(x)
    sn.commit(once)
    torch.testing.assert_close(often.long, once.long)
    torch.testing.assert_close(once.long[:, 0], torch.tensor([3 * 12, 16 + 3 * 12], dtype=torch.float64) / 28)
    often(x[:1])
    sn.commit(often)
    torch.testing.assert_close(often.long, (28 * once.long + 3) / 29)


def test_an_update_keeps_what_the_last_use_saw(engine: str) -> None:
    layer = sn.StreamingNorm1d(2, window=7).double()
    for n in (3, 5, 1):
        layer(torch.randn(n, 2, dtype=torch.float64))
        layer(torch.randn(n, 2, dtype=torch.float64))
        before = layer.eval_stats()
        sn.commit(layer)
        torch.testing.assert_close(layer.eval_stats(), before)


@pytest.mark.parametrize(
    "stream", [Stream(window=9), Stream(alpha=(0.5, 0.2, 0.3), beta=(0.6, 0.3, 0.1), kappa=(0.9, 0.2, 0.8, 0.1))]
)
def test_a_formula_tells_its_weights(stream: Stream) -> None:
    """They are those that the reference mixes and commits by."""
    formula = stream.formula(1, True, 1, 1e-5)
    alpha, beta, kappa = formula.weights(6, 3, 2)
    if stream.window is None:
        assert (alpha, beta, kappa) == (stream.alpha, stream.beta, stream.kappa)
    else:
        assert alpha == pytest.approx((9 / 15, 6 / 15, 0))
        assert beta == pytest.approx((32 / 35, 3 / 35, 0))
    layer = filled([6, 6, 6], [3, 3, 3], torch.float64, stream)
    layer.samples.fill_(6)
    layer.grad_samples.fill_(3)
    with torch.no_grad():
        long = kappa[0] * layer.long + kappa[1] * layer.short
        long_grad = kappa[2] * layer.long_grad + kappa[3] * layer.short_grad
    sn.commit(layer)
    torch.testing.assert_close(layer.long, long)
    torch.testing.assert_close(layer.long_grad, long_grad)


def test_a_memory_in_samples() -> None:
    window, constants = (stream.formula(1, True, 1, 1e-5) for stream in (Stream(window=200), Stream(kappa=0.7)))
    assert window.weights(1, 1, 1000).memory(1) == pytest.approx(201)
    assert window.weights(1000, 1000, 1000).memory(1000) == pytest.approx(1200)
    assert window.weights(1, 1, 0).memory(1) == pytest.approx(17)
    assert constants.weights(1, 1, 0).memory(1) == pytest.approx(1 / 0.3)
    assert constants.weights(128, 128, 0).memory(128) == pytest.approx(128 / 0.3)
    with pytest.raises(ValueError, match="without a stream"):
        sn.SampleNorm(3).formula.weights(1, 1, 0)
