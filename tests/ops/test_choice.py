"""The table of engines: which one runs, what is left to the next, and what happens where one is missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import streamnorm as sn
from streamnorm import ops
from streamnorm.ops import Call, choice, plain
from streamnorm.ops.base import Committed, Engine, Uses


class Picky(Engine):
    """Takes inputs of two channels, unless their first value is 0, and streams of two statistics."""

    name = "picky"
    normalized = committed = 0

    def status(self) -> str:
        return "available: in this test"

    def takes(self, call: Call) -> bool:
        return call.x.shape[1] == 2

    def normalize(self, call: Call) -> Tensor:
        if call.x[0, 0] == 0:
            return NotImplemented
        self.normalized += 1
        return plain.normalize(*call)

    def commit(self, uses: Uses) -> Committed:
        own = [use for use in uses if use[0].count.numel() == 2]
        self.committed += len(own)
        plain.commit(own)
        return Committed([use for use in uses if use[0].count.numel() != 2])


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> Iterator[Picky]:
    """Stands before all others."""
    engine = Picky()
    monkeypatch.setattr(choice, "ENGINES", (engine, *ops.ENGINES))
    with ops.force("picky"):
        yield engine


def test_an_engine_runs_what_it_takes(picky: Picky) -> None:
    layers = sn.StreamingNorm1d(2), sn.StreamingNorm1d(3)
    for layer in layers:
        layer(torch.ones(4, layer.num_features))
    assert picky.normalized == 1
    sn.commit(torch.nn.ModuleList(layers))
    assert picky.committed == 1
    assert all(int(layer.samples) == 0 and bool((layer.long[0] > 0).all()) for layer in layers)


def test_what_it_refuses_on_the_way_goes_to_the_next(picky: Picky) -> None:
    layer = sn.StreamingNorm1d(2)
    layer(torch.zeros(4, 2))
    assert (picky.normalized, int(layer.samples)) == (0, 4)


def test_it_is_listed_and_can_be_left_out(picky: Picky) -> None:
    assert next(iter(sn.engines().items())) == ("picky", "available: in this test")
    with ops.force("torch"):
        assert sn.engines()["picky"] == sn.engines()["native"] == "switched off: torch is forced"
        assert [ops.is_active(name) for name in ("picky", "native", "torch", "plain")] == [False, False, True, True]
        sn.StreamingNorm1d(2)(torch.ones(4, 2))
    assert picky.normalized == 0


def test_signs_are_told_where_the_first_engine_looks_for_them(picky: Picky) -> None:
    state: Any = sn.StreamingNorm1d(2).state
    assert not ops.tells_signs(state)


def test_without_the_extensions_the_others_serve() -> None:
    """As after an installation without a compiler."""
    script = """
import sys
sys.modules["streamnorm.ops._native"] = sys.modules["streamnorm.ops._recurrent"] = None
import torch, streamnorm as sn
assert sn.engines()["native"].startswith("not available: it was not built"), sn.engines()
model = torch.nn.Sequential(torch.nn.Linear(3, 2), sn.StreamingNorm1d(2))
recurrent = sn.GRU(2, 2)
optimizer = torch.optim.SGD([*model.parameters(), *recurrent.parameters()], lr=0.1)
for _ in range(20):
    recurrent(model(torch.randn(4, 3)).unsqueeze(1))[0].sum().backward()
    optimizer.step()
assert int(model[1].samples) == 0 and bool(model[1].long.isfinite().all()) and bool(model[1].long_grad.any())
"""
    subprocess.run([sys.executable, "-c", script], check=True)
