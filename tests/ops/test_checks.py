"""Tensors that do not fit each other, and memory that is gone, are refused on every engine before anything changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamnorm as sn
from streamnorm.core.spec import State


def new_layer(channels: int = 6) -> sn.Norm:
    """A layer in the middle of an update, with every row of its state in use."""
    layer = sn.StreamingNorm1d(channels)
    for _ in range(2):
        layer(torch.randn(4, channels, requires_grad=True)).square().sum().backward()
        sn.commit(layer)
    layer(torch.randn(4, channels, requires_grad=True)).square().sum().backward()
    layer.zero_grad()
    return layer


@contextmanager
def nothing_changes(layer: sn.Norm, *but: str) -> Iterator[None]:
    before = {name: t.clone() for name, t in layer.state_dict().items() if name not in but}
    yield
    after = layer.state_dict()
    assert [name for name, t in before.items() if not torch.equal(t, after[name])] == []
    assert all(parameter.grad is None for parameter in layer.parameters())


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "longer": lambda t: torch.cat((t, t), -1),
    "shorter": lambda t: t[..., :3].clone(),
    "of one number": lambda t: t.flatten()[:1].clone(),
    "empty": lambda t: t.flatten()[:0],
    "of another dtype": lambda t: t.double() if t.is_floating_point() else t.int(),
    "of another rank": lambda t: t[None],
}


CALLED = {"weight": "gain", "long": "the buffer long|the layer's state"}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["weight", "bias", *State._fields])
def test_a_tensor_of_another_size(name: str, wrong: str, engine: str) -> None:
    layer = new_layer()
    if name not in layer._buffers and wrong == "of another dtype":
        return  # gains of any dtype are welcome
    if ("samples" in name or name == "seen") and wrong in ("longer", "shorter", "of one number"):
        wrong = "of another rank"
    given = WRONG[wrong](getattr(layer, name).detach())
    if name in layer._buffers:
        layer._buffers[name] = given
    else:
        setattr(layer, name, nn.Parameter(given))
    for x in (torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, 5, requires_grad=True)):
        with nothing_changes(layer), pytest.raises((RuntimeError, TypeError), match=CALLED.get(name, name)):
            layer(x)


@pytest.mark.parametrize("left", [0, 8])
@pytest.mark.parametrize("name", ["input", "weight", "bias", *State._fields])
def test_memory_that_is_gone_before_forward(name: str, left: int, engine: str) -> None:
    layer, x = new_layer(), torch.randn(4, 6, requires_grad=True)
    layer(x)
    victim = x if name == "input" else getattr(layer, name)
    if left and victim.dim() == 0:
        left = 4
    whole = victim.detach().clone()
    victim.untyped_storage().resize_(left)
    with nothing_changes(layer, name), pytest.raises(RuntimeError, match="freed or shrunk"):
        layer(x)
    victim.untyped_storage().resize_(whole.nbytes)
    victim.data.copy_(whole)
    layer(x).sum().backward()


@pytest.mark.parametrize("left", [0, 8])
@pytest.mark.parametrize("name", ["input", "gradient", "long_grad", "short_grad", "grad_count", "grad_samples"])
@pytest.mark.parametrize("center", ["mean", "zero"])
def test_memory_that_is_gone_before_backward(center: str, name: str, left: int, engine: str) -> None:
    layer = sn.StreamingNorm1d(6, center=center)
    x = torch.randn(4, 6, requires_grad=True)
    for _ in range(2):
        layer(x).sum().backward()
    layer.zero_grad()
    y = layer(x)
    dy = torch.randn(4, 6)
    victim = {"input": x, "gradient": dy}.get(name, layer._buffers.get(name))
    assert victim is not None
    if left and victim.dim() == 0:
        left = 4
    whole = victim.detach().clone()

    def forget(gradient: Tensor) -> Tensor:
        victim.untyped_storage().resize_(left)
        return dy

    y.register_hook(forget)
    with nothing_changes(layer, name), pytest.raises(RuntimeError, match="freed or shrunk"):
        y.backward(torch.randn(4, 6), retain_graph=True)
    victim.untyped_storage().resize_(whole.nbytes)
    victim.data.copy_(whole)


def test_memory_that_was_away_for_a_while(engine: str) -> None:
    """As it is where activations wait in other memory between forward and backward."""
    gradients = []
    for away in (False, True):
        torch.manual_seed(1)
        layer, x = sn.StreamingNorm1d(6), torch.randn(4, 6, requires_grad=True)
        y = layer(x)
        if away:
            kept = x.detach().clone()
            x.untyped_storage().resize_(0)
            x.untyped_storage().resize_(kept.nbytes)
            x.data.copy_(kept)  # autograd does not see it
        y.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]


def test_a_part_of_a_storage(engine: str) -> None:
    """What counts is where the part ends, whichever way it lies."""
    base = torch.randn(5, 6)
    layer = sn.StreamingNorm1d(6)
    for part in (base[1:], base[:4], base[::2], torch.randn(6, 4).t()):
        layer(part)
        end = int(part.storage_offset() + sum((n - 1) * s for n, s in zip(part.shape, part.stride())) + 1) * 4
        assert part.untyped_storage().nbytes() >= end
        part.untyped_storage().resize_(end - 1)
        with pytest.raises(RuntimeError, match="freed or shrunk"):
            layer(part)
        part.untyped_storage().resize_(end)
        layer(part.normal_())  # what was cut off is anything now
        base.untyped_storage().resize_(120)
        base.normal_()


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16])
def test_an_input_of_another_dtype_at_backward(to: torch.dtype, engine: str) -> None:
    layer, x = new_layer(), torch.randn(4, 6, requires_grad=True)
    y = layer(x)
    x.data = x.data.to(to)
    if to == torch.float64:
        with nothing_changes(layer), pytest.raises(RuntimeError):
            y.sum().backward()
    else:
        y.sum().backward()  # a gradient of the input's dtype: autograd's affair


CONVERT: list[Callable[[nn.Module], nn.Module]] = [lambda m: m.double(), lambda m: m.to("meta")]


@pytest.mark.parametrize("convert", CONVERT)
def test_a_layer_that_is_converted_between_forward_and_backward(convert: Any, engine: str) -> None:
    """The gradient goes to the stream that its forward had, averages and counts: none of it to the one of now."""
    layer = new_layer()
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    y = layer(torch.randn(4, 6, requires_grad=True))
    had = layer.state
    convert(layer)
    y.square().sum().backward()
    assert int(had.grad_samples) == 8
    assert had.grad_count.tolist() == [8] * 6
    assert not torch.equal(had.short_grad, before["short_grad"])
    if not layer.long.is_meta:
        assert torch.equal(layer.short_grad, before["short_grad"].double())
        assert torch.equal(layer.grad_count, before["grad_count"])
        assert int(layer.grad_samples) == 4


def test_conversions_that_change_nothing_leave_the_buffers() -> None:
    layer = sn.StreamingNorm1d(6)
    before = layer.state
    layer.float().half().bfloat16()
    assert all(a is b for a, b in zip(before, layer.state))


@pytest.mark.filterwarnings(
    "ignore:.*runs away"
)  # a count that is replaced between a use and its commit was for nothing
@pytest.mark.parametrize("replace", ["buffers", "parameters"])
def test_what_is_replaced_while_it_is_used(replace: str) -> None:
    """Another thread loads other buffers, or converts the parameters: what a kernel works on lives on."""
    layer = sn.StreamingNorm1d(400_000)
    x = torch.randn(2, 400_000, requires_grad=True)
    end = time.monotonic() + 1.5
    names = list(State._fields)
    swaps = 0

    def swap() -> None:
        nonlocal swaps
        while time.monotonic() < end:
            if replace == "buffers":
                for name in names:
                    layer._buffers[name] = layer._buffers[name].clone()  # type: ignore[union-attr]
            else:
                for parameter in layer.parameters():
                    parameter.data = parameter.data.clone()
            swaps += 1

    thread = threading.Thread(target=swap, daemon=True)
    thread.start()
    uses = 0
    while time.monotonic() < end:
        y = layer(x)
        y.backward(y.detach())
        sn.commit(layer)
        uses += 1
    thread.join()
    assert swaps > 0
    assert uses > 0
