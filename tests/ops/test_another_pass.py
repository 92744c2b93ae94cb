"""Several backward passes through one graph: their gradients add up, and the samples behind them count once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamnorm as sn

OPTIONS: list[dict[str, Any]] = [
    {},
    {"p": 2},
    {"center": "zero", "window": 7},
    {"alpha": (0.5, 0.2, 0.3), "beta": (0.5, 0.3, 0.2)},
    {"alpha": (0, 0, 1), "beta": (0, 0, 1), "p": 2},
    {"ref": "layer"},
]


def same(ours: list[Any], theirs: list[Any]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def step(layer: Any, x: Tensor, dys: list[Tensor], mask: Tensor | None, together: bool) -> list[Tensor]:
    """The gradients of all, and the state."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x) if mask is None else layer(x, mask=mask)
    if together:
        y.backward(sum(dys))
    else:
        for number, dy in enumerate(dys):
            y.backward(dy, retain_graph=number < len(dys) - 1)
    assert x.grad is not None
    return [x.grad, *(p.grad for p in layer.parameters()), *(b.clone() for b in layer.state)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("passes", [3])
def test_passes_are_one_through_the_sum(engine: str, options: dict[str, Any], masked: bool, passes: int) -> None:
    """Over several updates of several uses each, with statistics, samples and all that reaches x."""
    apart: Any = sn.StreamingNorm2d(4, **options).double()
    together = copy.deepcopy(apart)
    for number in range(5):
        x = torch.randn(3, 4, 2, 2, dtype=torch.float64) + number
        dys = [torch.randn(3, 4, 2, 2, dtype=torch.float64) for _ in range(passes)]
        mask = torch.tensor([True, number % 2 == 0, True]) if masked else None
        same(step(apart, x, dys, mask, together=False), step(together, x, dys, mask, together=True))
        if number % 2:
            sn.commit(apart)
            sn.commit(together)


def test_the_same_gradient_twice_is_its_double(engine: str) -> None:
    layer: Any = sn.StreamingNorm1d(3)
    x, dy = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    y = layer(x)
    y.backward(dy, retain_graph=True)
    once = layer.short_grad.clone()
    y.backward(dy)
    torch.testing.assert_close(layer.short_grad, 2 * once)
    assert (int(layer.grad_samples), layer.grad_count.tolist()) == (4, [4, 4, 4])


def test_an_update_between_two_passes(engine: str) -> None:
    """Nothing is left of the first to add to: the second counts for itself."""
    layer: Any = sn.StreamingNorm1d(3)
    x, dys = torch.randn(4, 3, requires_grad=True), torch.randn(2, 4, 3)
    y = layer(x)
    y.backward(dys[0], retain_graph=True)
    sn.commit(layer)
    fresh = copy.deepcopy(layer)
    y.backward(dys[1])
    assert (int(layer.grad_samples), layer.grad_count.tolist()) == (4, [4, 4, 4])
    assert layer.long_grad.equal(fresh.long_grad)
    assert bool(layer.short_grad.any())


def test_two_uses_gone_through_in_turns(engine: str) -> None:
    """Counts and the moment's gradients are those of the sums; the location's depend on the order of mixing."""
    apart: Any = sn.StreamingNorm1d(3).double()
    together = copy.deepcopy(apart)
    xs = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True).unbind()
    dys = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    ys = [apart(x) for x in xs]
    for number in range(2):
        for y, dy in zip(ys, dys[number]):
            y.backward(dy, retain_graph=True)
    for x, dy in zip(xs, dys.sum(0)):
        together(x).backward(dy)
    assert int(apart.grad_samples) == int(together.grad_samples) == 8
    assert apart.grad_count.equal(together.grad_count)
    same([apart.short, apart.short_grad[1]], [together.short, together.short_grad[1]])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, by which Triton's interpreter computes
def test_what_is_not_finite_enters_no_stream(engine: str) -> None:
    layer: Any = sn.StreamingNorm1d(3)
    x, dy = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    y = layer(x)
    y.backward(dy, retain_graph=True)
    before = layer.short_grad.clone()
    dy[0, 1] = torch.inf
    y.backward(dy)
    assert layer.short_grad[:, 1].equal(before[:, 1])
    assert not layer.short_grad[:, 0].equal(before[:, 0])


def test_a_second_pass_for_the_gain_alone_streams_nothing(engine: str) -> None:
    layer: Any = sn.StreamingNorm1d(3)
    y = layer(torch.randn(4, 3))
    for last in (False, True):
        y.sum().backward(retain_graph=not last)
    assert int(layer.grad_samples) == 0


def passes(apart: Any, together: Any, steps: int) -> tuple[Tensor | None, Tensor | None]:
    """Two backward passes through one graph, and one of their sum; the gradients of the input."""
    x = torch.randn(steps, 2, 3, dtype=torch.float64, requires_grad=True)
    dys = torch.randn(2, steps, 2, 4, dtype=torch.float64)
    y = apart(x)[0]
    y.backward(dys[0], retain_graph=True)
    y.backward(dys[1])
    ours, x.grad = x.grad, None
    together(x)[0].backward(dys.sum(0))
    return ours, x.grad


KINDS: dict[str, Callable[..., Any]] = {"GRU": sn.GRU, "LSTM": sn.LSTM, "RNN": sn.RNN}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("options", [{}, {"window": 9}])
def test_recurrent_layers(engine: str, kind: Callable[..., Any], options: dict[str, Any]) -> None:
    """Their norms are used at each time step: what they count is what one pass counts."""
    apart = kind(3, 4, **options).double()
    together = copy.deepcopy(apart)
    for _ in range(2):
        passes(apart, together, 3)
        for ours, theirs in zip(apart.modules(), together.modules()):
            if isinstance(ours, sn.Norm) and isinstance(theirs, sn.Norm):
                assert ours.grad_count.equal(theirs.grad_count)
                assert ours.grad_samples.equal(theirs.grad_samples)
                assert ours.short.equal(theirs.short)
        sn.commit(apart)
        sn.commit(together)


def test_a_whole_sequence_in_cpp_is_that_of_the_sum() -> None:
    apart = sn.GRU(3, 4).double()
    together = copy.deepcopy(apart)
    for _ in range(3):
        ours, theirs = passes(apart, together, 6)
        assert ours is not None
        assert theirs is not None
        same([ours, *(p.grad for p in apart.parameters())], [theirs, *(p.grad for p in together.parameters())])
        same(list(apart.buffers()), list(together.buffers()))
        sn.commit(apart)
        sn.commit(together)


def test_two_losses_train_as_their_sum_does() -> None:
    """One trunk, two heads."""
    models = [nn.ModuleList([sn.StreamingNorm1d(3), nn.Linear(3, 1), nn.Linear(3, 1)]) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for _ in range(5):
        x = torch.randn(4, 3)
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            norm, first, second = model
            h = norm(x)
            losses = first(h).square().mean(), second(h).square().mean()
            if model is models[0]:
                losses[0].backward(retain_graph=True)
                losses[1].backward()
            else:
                (losses[0] + losses[1]).backward()
            optimizer.step()
    for ours, theirs in zip(models[0].state_dict().values(), models[1].state_dict().values()):
        torch.testing.assert_close(ours, theirs)
