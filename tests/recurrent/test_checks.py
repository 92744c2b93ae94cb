"""Recurrent layers refuse tensors that do not fit each other, and memory that is gone, before anything changes."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamnorm as sn
from streamnorm import ops
from streamnorm.core.spec import State

LAYERS: dict[str, Callable[..., Any]] = {
    "RNN": partial(sn.RNN, 3, 4),
    "GRU": partial(sn.GRU, 3, 4),
    "GRU, reset before": partial(sn.GRU, 3, 4, reset_after=False),
    "LSTM": partial(sn.LSTM, 3, 4),
    "LSTM, projected": partial(sn.LSTM, 3, 4, proj_size=2, norm_cell=True),
}
ENGINES = [engine.name for engine in ops.ENGINES if engine.name != "triton"]
every_engine = pytest.mark.parametrize("engine", ENGINES)
every_layer = pytest.mark.parametrize("name", LAYERS)


def trained(layer: Any) -> Any:
    """In the middle of an update, with every row of its states in use."""
    for _ in range(2):
        layer(torch.randn(2, 3, 3, requires_grad=True))[0].square().sum().backward()
        sn.commit(layer)
    layer(torch.randn(2, 3, 3, requires_grad=True))[0].square().sum().backward()
    layer.zero_grad()
    return layer


@contextmanager
def nothing_changes(model: nn.Module, *but: str) -> Iterator[None]:
    before = {name: t.clone() for name, t in model.state_dict().items() if name not in but}
    yield
    after = model.state_dict()
    assert [name for name, t in before.items() if not torch.equal(t, after[name])] == []
    assert all(parameter.grad is None for parameter in model.parameters())


@contextmanager
def refused(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError):
        return
    pytest.fail(f"{what} was taken")


def tensors_of(model: nn.Module) -> list[str]:
    """Names of all that a training step reads."""
    names = [name for name, _ in itertools.chain(model.named_parameters(), model.named_buffers())]
    return [name for name in names if not name.endswith("lp_moment")]


def replace(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    if own in module._buffers:
        module._buffers[own] = value
    else:
        setattr(module, own, nn.Parameter(value))


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "longer": lambda t: torch.cat((t, t)),
    "wider": lambda t: torch.cat((t, t), -1),
    "shorter": lambda t: t[:1].clone(),
    "narrower": lambda t: t[..., :1].clone(),
    "of another rank": lambda t: t[None],
}


@every_engine
@every_layer
def test_a_tensor_of_another_size(name: str, engine: str) -> None:
    for norm in ("streaming", "batch", "layer"):
        model = trained(LAYERS[name](norm=norm))
        x = torch.randn(5, 3, 3, requires_grad=True)
        for tensor, wrong in itertools.product(tensors_of(model), WRONG):
            right = model.state_dict()[tensor].clone()
            if right.dim() == 0 and wrong != "of another rank":
                continue
            replace(model, tensor, WRONG[wrong](right))
            with nothing_changes(model), ops.force(engine), refused(f"{tensor}, {wrong}"):
                model(x)
            replace(model, tensor, right)
        with ops.force(engine):
            model(x)[0].sum().backward()


@every_engine
def test_running_statistics_of_each_step_in_another_form(engine: str) -> None:
    model = sn.GRU(3, 4, norm="batch-per-step", max_steps=5)
    for shape in ((12, 5), (60,), (4, 15), (5, 0), (0,)):
        for name in ("running_mean", "running_var"):
            replace(model, f"norm_ih_l0.{name}", torch.ones(shape))
            with nothing_changes(model), ops.force(engine), pytest.raises(RuntimeError):
                model(torch.randn(8, 3, 3))
            replace(model, f"norm_ih_l0.{name}", torch.ones(5, 12))


@every_engine
@every_layer
def test_a_hidden_size_that_was_changed_by_hand(name: str, engine: str) -> None:
    for field, value in (("hidden_size", 80), ("hidden_size", 2), ("input_size", 5), ("proj_size", 3)):
        model = trained(LAYERS[name]())
        setattr(model, field, value)
        with nothing_changes(model), ops.force(engine), refused(f"{field}={value}"):
            model(torch.randn(5, 3, model.input_size))


@every_engine
@every_layer
def test_hidden_states_of_another_size(name: str, engine: str) -> None:
    model = trained(LAYERS[name]())
    right = [(1, 3, 2 if "projected" in name else 4), (1, 3, 4)][: 2 if "LSTM" in name else 1]
    for number, (axis, size) in itertools.product(range(len(right)), itertools.product(range(3), (0, 1, 2, 7))):
        shapes = [list(shape) for shape in right]
        if shapes[number][axis] == size:
            continue
        shapes[number][axis] = size
        states = tuple(torch.zeros(shape) for shape in shapes)
        with nothing_changes(model), ops.force(engine), pytest.raises(RuntimeError):
            model(torch.randn(5, 3, 3), states if len(states) > 1 else states[0])


@pytest.mark.parametrize("cell", [sn.RNNCell, sn.GRUCell, partial(sn.GRUCell, reset_after=False), sn.LSTMCell])
def test_a_cell_with_a_weight_of_another_size(cell: Any) -> None:
    model = cell(3, 4)
    model(torch.randn(2, 3))
    for tensor, wrong in itertools.product([name for name, _ in model.named_parameters()], WRONG):
        right = model.state_dict()[tensor].clone()
        replace(model, tensor, WRONG[wrong](right))
        with nothing_changes(model), refused(f"{tensor}, {wrong}"):
            model(torch.randn(2, 3))
        replace(model, tensor, right)


def _given(name: str, x: Tensor) -> tuple[Tensor, ...]:
    h = torch.randn(1, 3, 2 if "projected" in name else 4)
    return (x, h, torch.randn(1, 3, 4)) if "LSTM" in name else (x, h)


def _run(model: Any, given: tuple[Tensor, ...]) -> Any:
    x, *states = given
    return model(x, tuple(states) if len(states) > 1 else states[0])


@every_engine
@every_layer
@pytest.mark.parametrize("left", [0, 3])
def test_memory_that_is_gone_before_forward(left: int, name: str, engine: str) -> None:
    model = trained(LAYERS[name]())
    given = _given(name, torch.randn(5, 3, 3))
    state = model.state_dict(keep_vars=True)
    victims = {f"input {i}": t for i, t in enumerate(given)} | {key: state[key] for key in tensors_of(model)}
    for which, victim in victims.items():
        whole = victim.detach().clone()
        victim.untyped_storage().resize_(left)
        with (
            nothing_changes(model, which),
            ops.force(engine),
            pytest.raises(RuntimeError, match=r"freed or shrunk|out of bounds for storage"),
        ):
            _run(model, given)
        victim.untyped_storage().resize_(whole.nbytes)
        victim.data.copy_(whole)
    with ops.force(engine):
        _run(model, given)[0].sum().backward()


@every_engine
@every_layer
@pytest.mark.parametrize("left", [0, 3])
def test_memory_that_is_gone_before_backward(left: int, name: str, engine: str) -> None:
    model = trained(LAYERS[name]())
    given = _given(name, torch.randn(5, 3, 3, requires_grad=True))
    victims = {f"input {i}": t for i, t in enumerate(given)} | dict(model.named_parameters())
    victims |= {key: t for key, t in model.named_buffers() if "grad" in key} | {"output": given[0]}
    if engine == "plain":
        del victims["output"]  # of which the loop needs nothing
    for which, victim in victims.items():
        state = {key: t.clone() for key, t in model.state_dict().items() if "grad" in key and key != which}
        with ops.force(engine):
            output, _ = _run(model, given)
            victim = output if which == "output" else victim
            whole = victim.detach().clone()
            victim.untyped_storage().resize_(left)
            with pytest.raises(RuntimeError, match="freed or shrunk"):
                torch.autograd.backward([output], [torch.ones(output.shape)])
        victim.untyped_storage().resize_(whole.nbytes)
        victim.data.copy_(whole)
        after = model.state_dict()
        assert all(torch.equal(before, after[key]) for key, before in state.items()), which
        assert all(parameter.grad is None for parameter in model.parameters()), which


@every_engine
@every_layer
def test_a_layer_that_is_converted_between_forward_and_backward(name: str, engine: str) -> None:
    """An error, as PyTorch's own layers have it, or gradients for the streams that forward had; nothing by halves."""
    model = trained(LAYERS[name]())
    before = {key: t.double() for key, t in model.state_dict().items()}
    with ops.force(engine):
        output, _ = model(torch.randn(5, 3, 3, requires_grad=True))
        model.double()
        with suppress(RuntimeError):
            output.sum().backward()
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key].double()) for key in before if "grad" in key)


@pytest.mark.filterwarnings("ignore:.*runs away")
def test_what_is_replaced_while_it_is_used() -> None:
    """Another thread loads other buffers and gives the parameters other memory."""
    model: Any = sn.GRU(8, 400)
    x = torch.randn(30, 8, 8, requires_grad=True)
    torch.set_num_threads(2)
    end = time.monotonic() + 1.5
    swaps = 0

    def swap() -> None:
        nonlocal swaps
        while time.monotonic() < end:
            for norm in (model.norm_ih_l0, model.norm_hh_l0):
                for name in State._fields:
                    norm._buffers[name] = norm._buffers[name].clone()
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
            swaps += 1

    thread = threading.Thread(target=swap, daemon=True)
    thread.start()
    uses = 0
    while time.monotonic() < end:
        output, _ = model(x)
        output.sum().backward()
        sn.commit(model)
        uses += 1
    thread.join()
    assert swaps > 0
    assert uses > 0
