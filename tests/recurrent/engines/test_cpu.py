"""The C++ engine for sequences: what users may put in the place of its tensors, and what it holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import streamnorm as sn
from streamnorm import ops
from streamnorm.recurrent.engines import cpu

GRU: Callable[..., Any] = sn.GRU


def found(model: Any, tensors: dict[str, Tensor], x: Tensor, engine: str) -> list[Tensor]:
    """Output, gradients and state after a step with these tensors in the place of the model's own."""
    mine = {name: value.clone() for name, value in model.named_buffers()} | tensors
    start = x.detach().clone().requires_grad_()
    with ops.force(engine):
        y = functional_call(model, mine, (start,))[0]
        y.square().sum().backward()
    assert start.grad is not None
    return [y.detach(), start.grad, *(value for value in mine.values() if not value.requires_grad)]


REPLACED: dict[str, dict[str, Tensor]] = {
    "a bias with gaps": {"bias_ih_l0": torch.randn(24)[::2]},
    "a bias of one number": {"bias_hh_l0": torch.randn(1).expand(12)},
    "a gain with gaps": {"norm_ih_l0.weight": torch.randn(24)[::2]},
    "statistics with gaps": {"norm_hh_l0.long": torch.rand(2, 24)[:, ::2]},
    "statistics in columns": {"norm_ih_l0.long_grad": torch.randn(12, 2).t()},
    "a weight with the other sign in memory": {"weight_hh_l0": torch.randn(12, 4, dtype=torch.cfloat).conj().imag},
}


@pytest.mark.parametrize("name", REPLACED)
def test_tensors_of_the_user_s_own(name: str) -> None:
    torch.manual_seed(1)
    model, x = GRU(3, 4), torch.randn(5, 2, 3)
    ours, theirs = (
        found(model, {key: value.clone(memory_format=torch.preserve_format) for key, value in given.items()}, x, engine)
        for engine, given in (("native", REPLACED[name]), ("plain", REPLACED[name]))
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_data_with_the_other_sign_in_memory() -> None:
    x = torch.randn(40, 40, 40, dtype=torch.cfloat).conj().imag
    assert x.is_neg()
    model = GRU(40, 40, norm="layer")
    with ops.force("plain"):
        expected = model(x)[0]
    torch.testing.assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_gradient_with_the_other_sign_in_memory() -> None:
    model, x = GRU(3, 4, norm="layer"), torch.randn(5, 2, 3, requires_grad=True)
    dy = torch.randn(5, 2, 4, dtype=torch.cfloat).conj().imag
    (ours,) = torch.autograd.grad(model(x)[0], x, dy)
    (theirs,) = torch.autograd.grad(model(x)[0], x, dy.clone())
    assert ours.equal(theirs)


@pytest.mark.parametrize("gain", [torch.ones(3), torch.ones(13)])
def test_a_gain_of_another_size_is_an_error(gain: Tensor) -> None:
    model = GRU(3, 4)
    model.norm_ih_l0.weight = nn.Parameter(gain)
    with pytest.raises((RuntimeError, ValueError)):
        model(torch.randn(5, 2, 3))


def test_a_factory_s_norm_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"asked for a layer of 12 features, and made StreamingNorm1d\(5"):
        GRU(3, 4, norm=lambda features: sn.StreamingNorm1d(5, bias=False))


def test_statistics_and_gains_that_are_replaced_before_backward() -> None:
    """Backward reads and writes those that forward had, though nobody else has them any more."""
    model, x = GRU(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(copy.deepcopy(model)(x)[0].square().sum(), x)
    y = functional_call(model, {name: value.clone() for name, value in model.named_buffers()}, (x,))[0]
    for parameter in (model.norm_ih_l0.weight, model.bias_hh_l0):
        parameter.data = torch.full_like(parameter, torch.nan)
    taken = [torch.full((2, 12), torch.nan) for _ in range(100)]  # what was freed is given to others
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient.equal(expected)
    assert all(t.isnan().all() for t in taken)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_memory_is_let_go_after_the_only_backward(engine: str) -> None:
    """Though the loss, and with it the graph, lives on."""
    with ops.force(engine):
        loss = sn.LSTM(3, 4)(torch.randn(5, 2, 3))[0].sum()
        (node,) = (node for node in ancestors(loss.grad_fn) if type(node).__name__ == "SequenceBackward")
        loss.backward(retain_graph=True)
        assert node.steps is not None
        loss.backward()
        assert node.steps is None


def ancestors(node: Any) -> list[Any]:
    """A node of the graph and all behind it."""
    behind = [each for each, _ in node.next_functions if each is not None]
    return [node, *(further for each in behind for further in ancestors(each))]


def test_structs_of_other_sources_are_refused() -> None:
    plan, path = cpu._recurrent.layouts()
    cpu.check_layouts((plan, path))
    names = [name for name, _ in path]
    i = names.index("long")
    with pytest.raises(ImportError, match=rf"field {i} of _Path is \('long', 'q'\), but .* has \('short', 'q'\)"):
        cpu.check_layouts((plan, (*path[:i], path[i + 1], path[i], *path[i + 2 :])))
    with pytest.raises(ImportError, match=r"field 0 of _Plan is \('cell', 'q'\), but .* has \('cell', 'd'\)"):
        cpu.check_layouts(((("cell", "d"), *plan[1:]), path))
    with pytest.raises(ImportError, match=r"field \d+ of _Path is \('grad_scale', 'd'\), but .* has None"):
        cpu.check_layouts((plan, path[:-1]))
