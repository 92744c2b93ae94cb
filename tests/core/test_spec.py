"""Formula, View and State: the values that engines are told."""

from __future__ import annotations

import pickle

import torch

import streamnorm as sn
from streamnorm.core.spec import FIELDS, GRADIENTS, STATISTICS, State
from streamnorm.training.streaming import Streaming


def test_pickles_from_before_the_move_load() -> None:
    """A pickled layer names its formula and view by the module that they lived in."""
    layer = sn.StreamingNorm1d(3, window=7)
    layer(torch.randn(4, 3))
    old = pickle.dumps(layer, protocol=2).replace(b"cstreamnorm.core.spec\n", b"cstreamnorm.ops.spec\n")
    assert b"streamnorm.ops.spec" in old
    twin = pickle.loads(old)
    assert twin.formula == layer.formula
    x = torch.randn(4, 3)
    assert twin(x).equal(layer(x))


def test_the_table_of_buffers_is_the_state() -> None:
    """Names, order, shapes and types are told once; a module annotates the names for those who read its attributes."""
    assert tuple(FIELDS) == State._fields
    assert FIELDS.keys() <= Streaming.__annotations__.keys()
    layer = sn.StreamingNorm1d(6, ref=("group", 2), dtype=torch.float64)
    for (name, field), buffer in zip(FIELDS.items(), layer.state):
        assert layer.get_buffer(name) is buffer
        assert buffer.shape == field.shape(2)
        assert buffer.dtype == field.dtype(torch.float64)


def test_each_half_is_moved_by_its_own_pass() -> None:
    layer = sn.StreamingNorm1d(3)
    state = layer.state._asdict()
    before = {name: buffer.clone() for name, buffer in state.items()}
    y = layer(torch.randn(4, 3, requires_grad=True))
    assert all(state[name].equal(before[name]) for name in GRADIENTS)
    before = {name: buffer.clone() for name, buffer in state.items()}
    y.square().sum().backward()
    assert all(state[name].equal(before[name]) for name in STATISTICS)
    assert not any(state[name].equal(before[name]) for name in GRADIENTS if FIELDS[name].joined != "same")
