"""Formula, View and State: the values that engines are told."""

from __future__ import annotations

import pickle

import torch

import streamnorm as sn


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
